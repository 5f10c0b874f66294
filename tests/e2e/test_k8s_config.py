"""The serveConfigV2 of the rendered manifests runs on a Ray: here a local one."""

import time

import pytest
import yaml
from tiny import save_tiny

from deployments import ray_compat
from deployments.calls import Accepted, Call, Delta, SamplingWish
from deployments.cli.render import RenderOptions, render
from deployments.naming import deployment_name
from select_n_core.config import parse_config

APP = "serve"
DEADLINE_S = 120.0


@pytest.fixture
def config(tmp_path, monkeypatch):
    return parse_config(
        {
            "applications": [
                {
                    "name": APP,
                    "route_prefix": "/",
                    "import_path": "deployments.app:build_app",
                    "runtime_env": {"env_vars": {"SELECT_N_CACHE": str(tmp_path / "cache")}},
                    "args": {
                        "models": [
                            {
                                "name": "tiny",
                                "source": str(save_tiny(tmp_path / "model")),
                                "dtype": "float32",
                                "device_memory": "16MiB",
                                "host_memory": "16MiB",
                                "link": {"kind": "emulated", "bandwidth": "10GB/s"},
                                "slo": {"tpot": "1s", "ttft": "10s"},
                                "interval": 2,
                            }
                        ]
                    },
                }
            ]
        }
    )


def wait_until_running(serve) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        application = serve.status().applications.get(APP)
        if application is not None and application.status.value == "RUNNING":
            return
        assert application is None or application.status.value != "DEPLOY_FAILED", application
        time.sleep(0.2)
    raise AssertionError("the application never ran")


def test_the_rendered_serve_config_serves_on_a_local_ray(serve_on_ray, config):
    service = yaml.safe_load(render(config, RenderOptions())["rayservice.yaml"])
    document = yaml.safe_load(service["spec"]["serveConfigV2"])
    ray_compat.deploy(document)
    try:
        wait_until_running(serve_on_ray)
        (report,) = ray_compat.broadcast(APP, deployment_name("tiny"), "report", timeout_s=10)
        assert report.info.k == report.info.units // 2
        handle = serve_on_ray.get_deployment_handle(deployment_name("tiny"), APP)
        call = Call(
            id="one",
            prompt="the fox",
            max_tokens=5,
            sampling=SamplingWish(temperature=0.0, ignore_eos=True),
        )
        chunks = list(handle.options(stream=True, method_name="generate").remote(call))
        assert isinstance(chunks[0], Accepted)
        assert sum(chunk.tokens for chunk in chunks if isinstance(chunk, Delta)) == 5
    finally:
        serve_on_ray.delete(APP)
