"""1 -> 2 -> 1 replicas of a real engine, by the headroom that the replicas report."""

import asyncio
import contextlib
import re
import threading
import time

import httpx
import openai
import pytest
from server import serving
from tiny import save_tiny

DEADLINE_S = 90.0

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A tiny model that serves one request at a time: a queue is a broken TTFT promise."""
    directory = tmp_path_factory.mktemp("scaling")
    model = {
        "name": "tiny",
        "source": str(save_tiny(directory / "model")),
        "dtype": "float32",
        "device_memory": "64MiB",
        "host_memory": "64MiB",
        "link": {"kind": "emulated", "bandwidth": "10GB/s"},
        "slo": {"tpot": "100ms", "ttft": "500ms"},
        "max_batch": 1,
        "replicas": {"min": 1, "max": 2, "upscale_delay": "300ms", "downscale_delay": "1s"},
    }
    document = {
        "applications": [
            {
                "name": "serve",
                "route_prefix": "/",
                "import_path": "deployments.app:build_app",
                "args": {"models": [model]},
            }
        ]
    }
    with serving(document, directory, SELECT_N_CACHE=str(directory / "cache")) as running:
        yield running


def replicas(server) -> int:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(r'^select_n_replicas\{model="tiny"\} ([\d.]+)$', text, re.MULTILINE)
    return int(float(found.group(1)))


def reaches(server, number: int) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if replicas(server) == number:
            return True
        time.sleep(0.3)
    return False


@contextlib.contextmanager
def clients(server, count: int):
    """`count` chats at any time; all must succeed, if need be after waiting as they were told."""
    done, failures = threading.Event(), []

    async def chat() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=100
        ) as client:
            while not done.is_set():
                await client.completions.create(
                    model="tiny", prompt="the fox", max_tokens=200, extra_body={"ignore_eos": True}
                )

    async def everyone() -> None:
        await asyncio.gather(*(chat() for _ in range(count)))

    def run() -> None:
        try:
            asyncio.run(everyone())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not failures


def test_a_second_replica_comes_with_the_load_and_leaves_with_it(server):
    assert replicas(server) == 1
    with clients(server, 8):
        assert reaches(server, 2)
    assert reaches(server, 1)
