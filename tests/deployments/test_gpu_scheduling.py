"""Replicas of a `cuda` model get a GPU each, on a Ray node that claims to have two."""

import os

import pytest
from standins import args

from deployments import ray_compat
from deployments.cli.serve import check_capacity
from deployments.sizing import actor_options
from select_n_core.errors import ConfigError


def cuda(replicas: int):
    return args("big", link={"kind": "cuda"}, replicas={"min": replicas, "max": replicas})


def test_only_a_cuda_link_claims_a_gpu():
    assert actor_options(cuda(1).models[0])["num_gpus"] == 1
    assert "num_gpus" not in actor_options(args().models[0])


def test_two_replicas_see_different_gpus_and_a_third_is_refused(serve_on_ray):
    serve = serve_on_ray

    class Device:
        def visible(self) -> str:
            return os.environ["CUDA_VISIBLE_DEVICES"]

    model = cuda(2).models[0]
    options = actor_options(model) | {"num_cpus": 0.1}  # the test's node has two cores for all
    deployment = serve.deployment(Device).options(
        name="device", num_replicas=2, ray_actor_options=options
    )
    handle = serve.run(deployment.bind(), name="gpus", route_prefix=None)
    try:
        seen = handle.broadcast("visible").results(timeout_s=10)
        assert sorted(seen) == ["0", "1"]
        resources = ray_compat.node_resources()
        check_capacity(cuda(2), resources)
        with pytest.raises(ConfigError, match=r"3 in all .* has 2"):
            check_capacity(cuda(3), resources)
    finally:
        serve.delete("gpus")
