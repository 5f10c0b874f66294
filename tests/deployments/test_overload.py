"""A real engine behind HTTP, with one place: who waits in vain gets a whole 429 and no stream."""

import threading
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from standins import MODEL, LocalBackend, args, eventually
from test_http_errors import error_of
from tiny import save_tiny

from deployments.http.api import create_api
from deployments.replica import Replica
from select_n_core.engine.client import InlineClient
from select_n_core.engine.text import TextCodec
from select_n_core.models.cache import CACHE_VARIABLE

torch.set_num_threads(1)

WAIT_S = 0.3


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[httpx.Client]:
    directory = save_tiny(tmp_path_factory.mktemp("tiny"), max_context=4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        with serving(str(directory)) as client:
            yield client


@contextmanager
def serving(source: str) -> Iterator[httpx.Client]:
    asked = args(
        MODEL,
        source=source,
        dtype="float32",
        device_memory="24MiB",
        host_memory="16MiB",
        link={"kind": "emulated", "bandwidth": "100GB/s"},
        slo={"tpot": "5s", "ttft": "30s", "max_wait": WAIT_S},
        interval=2,
        max_batch=1,
        max_step_tokens=64,
        max_queue=2,
    )
    (model,) = asked.models
    backends = {}

    @asynccontextmanager
    async def engine(_: FastAPI):
        client = InlineClient(model)
        info = await client.start()
        replica = Replica("only", TextCodec.load(Path(source)), client, info, model.slo.targets())
        backends[MODEL] = LocalBackend(replica)
        yield
        await replica.close()

    api = create_api(backends, asked, lifespan=engine)
    server = uvicorn.Server(
        uvicorn.Config(api, host="127.0.0.1", port=0, log_level="critical", lifespan="on")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive(), deadline_s=120)
        assert server.started, "the engine did not start"
        (port,) = {each.getsockname()[1] for s in server.servers for each in s.sockets}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def endless(client: httpx.Client) -> Iterator[None]:
    """A stream that takes the only place, from its first token on until it is left."""
    body = {"prompt": "the quick", "stream": True, "max_tokens": 3000, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json={"model": MODEL, **body}) as response:
        lines = response.iter_lines()
        next(lines)
        yield


def complete(client: httpx.Client, **fields) -> httpx.Response:
    return client.post(
        "/v1/completions", json={"model": MODEL, "prompt": "the end", "max_tokens": 2, **fields}
    )


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 2}])
def test_who_waited_in_vain_is_told_why_and_when_to_come_again(served, fields):
    with endless(served):
        began_s = time.monotonic()
        response = complete(served, **fields)
        assert time.monotonic() - began_s >= WAIT_S
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded_queue")
    assert "was not let in: others were there before it" in error["message"]
    assert int(response.headers["Retry-After"]) >= 1


def test_more_than_may_wait_are_turned_away_at_once(served):
    with endless(served):
        error = error_of(complete(served, n=4), 429)
    assert error["code"] == "overloaded_queue"
    assert "requests are waiting already" in error["message"]


def test_once_there_is_a_place_again_one_is_served_and_all_is_counted(served):
    eventually(lambda: complete(served).status_code == 200)
    page = served.get("/metrics").text
    (line,) = [
        line
        for line in page.splitlines()
        if line.startswith("select_n_engine_admissions_total") and 'reason="queue"' in line
    ]
    assert 'outcome="refused"' in line
    assert float(line.split()[-1]) >= 4
