"""What all tests share: Ray's switches before anything imports it, and one small Ray node."""

import os

import pytest

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(scope="session")
def ray_node():
    """One Ray node on loopback for all tests of a session, declared with two GPUs it lacks."""
    import ray

    from deployments import ray_compat

    ray_compat.start_local_node(num_cpus=2, num_gpus=2)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def serve_on_ray(ray_node):
    """Ray Serve on that node, without an HTTP proxy; yields `ray.serve`."""
    from ray import serve

    serve.start(proxy_location="Disabled")
    yield serve
    serve.shutdown()
