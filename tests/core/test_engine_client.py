"""One contract for both clients: the engine in a process of its own, and in a thread."""

import asyncio
import os
import pickle
import signal
import sys
import threading
import time
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from tiny import VOCAB_SIZE, save_tiny, tiny_llama

from select_n_core.config import ModelConfig
from select_n_core.engine import loop
from select_n_core.engine.client import InlineClient, ProcessClient
from select_n_core.engine.factory import create_client
from select_n_core.engine.messages import FinishReason, Output, Request, SamplingParams
from select_n_core.errors import (
    ContextLengthError,
    EngineError,
    HostMemoryError,
    InfeasibleError,
    LinkError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
)
from select_n_core.models.cache import CACHE_VARIABLE

torch.set_num_threads(1)
pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTEXT = 4096
ENDLESS = 3500  # tokens: many seconds' worth
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), max_context=CONTEXT)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One private cache: the first start measures the model, the others find its record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=["process", "inline"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(directory):
    """Makes a configuration of the tiny model, with fields changed."""

    def make(**changes) -> ModelConfig:
        facts = {
            "name": "tiny",
            "source": str(directory),
            "dtype": "float32",
            "device_memory": "24MiB",
            "host_memory": "16MiB",
            "link": {"kind": "emulated", "bandwidth": "100GB/s"},
            "slo": {"tpot": "5s", "ttft": "30s"},
            "interval": 2,
            "max_batch": 4,
            "max_step_tokens": 64,
            "max_queue": 3,
        }
        return ModelConfig(**{**facts, **changes})

    return make


@pytest.fixture(scope="module")
def configured(config, kind):
    """The same for this kind of client."""
    return partial(config, engine=kind)


@asynccontextmanager
async def started(config: ModelConfig):
    client = create_client(config)
    try:
        yield client, await client.start()
    finally:
        await client.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(configured):
    async with started(configured()) as (client, info):
        yield client, info


@pytest.fixture
def client(engine):
    return engine[0]


def request(name: str, tokens: int = 8, length: int = 9, **rules) -> Request:
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()
    rules = {"ignore_eos": True} | rules
    return Request(name, tuple(prompt), SamplingParams(max_tokens=tokens, **rules))


async def collect(client, asked: Request) -> list[Output]:
    return [output async for output in client.generate(asked)]


async def until(condition) -> None:
    """Wait for it, with a deadline."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "it never happened"
        await asyncio.sleep(0.01)


async def begun(client, asked: Request) -> tuple[asyncio.Task, list[Output]]:
    """A request of which a token was seen, and its outputs as they come."""
    outputs: list[Output] = []

    async def read() -> None:
        async for output in client.generate(asked):
            outputs.append(output)

    task = asyncio.create_task(read())
    await until(lambda: task.done() or any(output.tokens for output in outputs))
    assert not task.done()
    return task, outputs


def at_rest(client) -> bool:
    stats = client.stats()
    return stats.running == stats.waiting == 0 and stats.kv_free_tokens == stats.kv_tokens > 0


class TestServing:
    async def test_the_configuration_chooses_the_client(self, client, kind):
        assert type(client) is {"process": ProcessClient, "inline": InlineClient}[kind]

    async def test_starting_tells_the_facts(self, engine):
        info = engine[1]
        assert (info.units, info.k, info.interval) == (6, 3, 2.0)
        assert info.device_bytes == 24 << 20
        assert info.host_bytes == 3 * 147_968
        assert info.max_tokens == min(CONTEXT, info.kv_tokens) == CONTEXT
        assert info.max_batch == 4
        assert info.link_kind == "emulated"
        assert info.predicted_iteration_s > 0
        assert info.eos_token_ids == (1,)
        assert info.plan_line.startswith("tiny: requested interval 2.0, tpot 5 s, device 24 MiB")
        assert "N = 2 (k = 3 of 6 layers streamed over the emulated link" in info.plan_line

    async def test_a_verdict_comes_first_then_the_tokens_that_transformers_generates(self, client):
        asked = request("tokens", tokens=12)
        outputs = await collect(client, asked)
        assert outputs[0] == Output("tokens")
        ids = torch.tensor([asked.prompt])
        with torch.inference_mode():
            expected = tiny_llama(max_context=CONTEXT, eos_token_id=None).generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
        assert [token for output in outputs for token in output.tokens] == expected[0, 9:].tolist()
        assert [output.finish for output in outputs] == [None] * 12 + [FinishReason.LENGTH]

    async def test_many_at_once_each_get_their_own(self, client):
        alone = [await collect(client, request(f"alone-{n}", length=n)) for n in (3, 20, 70)]
        together = await asyncio.gather(
            *(collect(client, request(f"together-{n}", length=n)) for n in (3, 20, 70))
        )
        for one, other in zip(alone, together, strict=True):
            assert [output.tokens for output in one] == [output.tokens for output in other]

    async def test_closing_the_iterator_early_cancels_the_request_in_the_engine(self, client):
        async with aclosing(client.generate(request("left", ENDLESS))) as outputs:
            async for output in outputs:
                if output.tokens:
                    break
            await until(lambda: client.stats().running == 1)
        await until(lambda: at_rest(client))
        assert client.stats().iterations < ENDLESS

    async def test_cancelling_the_reading_task_does_so_too(self, client):
        task, _ = await begun(client, request("dropped", ENDLESS))
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await until(lambda: at_rest(client))

    async def test_statistics_move_and_health_is_good(self, client):
        before = client.stats()
        await collect(client, request("counted", tokens=10))
        await until(lambda: at_rest(client))
        after = client.stats()
        assert after.iterations >= before.iterations + 10
        assert after.streamed_units >= before.streamed_units + 30
        assert (after.k, after.interval) == (3, 2.0)
        client.check_health()


class TestErrors:
    async def test_a_request_too_long_is_refused_as_such_with_the_limit(self, client):
        with pytest.raises(ContextLengthError, match=f"at most {CONTEXT} tokens") as caught:
            await collect(client, request("long", tokens=CONTEXT))
        assert caught.value.field == "max_tokens"

    async def test_a_malformed_request_is_refused_as_such(self, client):
        with pytest.raises(RequestError) as caught:
            await collect(client, Request("bad", (VOCAB_SIZE,), SamplingParams(max_tokens=1)))
        assert caught.value.field == "prompt"

    async def test_a_live_id_is_refused_and_its_owner_runs_on(self, client):
        task, outputs = await begun(client, request("same", tokens=60))
        with pytest.raises(RequestError, match="'same' is in use"):
            await collect(client, request("same"))
        await task
        assert outputs[-1].finish is FinishReason.LENGTH

    async def test_a_full_queue_says_when_to_come_back_and_keeps_whom_it_has(self, client):
        running = [await begun(client, request(f"run-{n}", ENDLESS)) for n in range(4)]
        queued = [asyncio.create_task(collect(client, request(f"wait-{n}"))) for n in range(3)]
        await until(lambda: client.stats().waiting == 3)
        with pytest.raises(OverloadedError) as caught:
            await collect(client, request("one-too-many"))
        assert caught.value.reason == "queue"
        assert caught.value.retry_after_s > 0
        for task, _ in running:
            task.cancel()
        for outputs in await asyncio.gather(*queued):
            assert outputs[-1].finish is FinishReason.LENGTH
        await until(lambda: at_rest(client))

    async def test_host_memory_is_offered_and_taken_back_and_what_cannot_be_is_an_error(
        self, client
    ):
        await until(lambda: client.stats().host_bytes > 0)
        before = client.stats()
        assert before.reserved_bytes >= before.host_bytes
        await client.offer(1 << 20)
        assert client.stats().lease_bytes == before.lease_bytes + (1 << 20)
        await client.revoke(1 << 20, DEADLINE_S)
        assert client.stats().lease_bytes == before.lease_bytes
        with pytest.raises(HostMemoryError, match="below the floor"):
            await client.revoke(1 << 30, DEADLINE_S)
        with pytest.raises(HostMemoryError, match="came too late"):
            await client.offer(1 << 20, time.monotonic())
        assert client.stats().lease_bytes == before.lease_bytes

    async def test_what_it_is_asked_for_is_counted(self, client):
        before = client.stats().offered_tokens.get(0, 0)
        await collect(client, request("counted", tokens=5, length=9))
        await until(lambda: client.stats().offered_tokens[0] == before + 9 + 5)

    async def test_after_all_that_it_still_serves(self, client):
        assert (await collect(client, request("last")))[-1].finish is FinishReason.LENGTH


class TestStarting:
    async def test_what_cannot_start_raises_what_its_loading_raised(self, configured):
        client = create_client(configured(device_memory="100KiB", interval="auto"))
        with pytest.raises(InfeasibleError, match="raise device_memory") as caught:
            await client.start()
        assert caught.value.reason == "device_too_small"
        with pytest.raises(EngineError, match="the engine did not start: "):
            client.check_health()
        with pytest.raises(EngineError, match="the engine did not start: "):
            await collect(client, request("a"))
        await client.close()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    async def test_a_cuda_link_without_cuda_names_emulated(self, configured):
        client = create_client(configured(link={"kind": "cuda"}))
        with pytest.raises(LinkError, match="emulated"):
            await client.start()
        await client.close()

    async def test_before_the_start_nothing_runs(self, configured):
        client = create_client(configured())
        with pytest.raises(EngineError, match="was not started"):
            client.check_health()
        with pytest.raises(EngineError, match="was not started"):
            await collect(client, request("a"))
        await client.close()


class TestEnding:
    async def test_with_grace_a_running_request_finishes_and_without_it_ends_in_an_error(
        self, configured
    ):
        before = left_over()
        patient, hasty = create_client(configured()), create_client(configured())
        await asyncio.gather(patient.start(), hasty.start())
        short, finished = await begun(patient, request("short", tokens=100))
        endless, cut = await begun(hasty, request("endless", ENDLESS))
        assert left_over() > before
        await asyncio.gather(patient.close(grace_s=DEADLINE_S), hasty.close())
        await asyncio.gather(short, endless)
        assert finished[-1].finish is FinishReason.LENGTH
        assert sum(len(output.tokens) for output in finished) == 100
        assert cut[-1].finish is FinishReason.ERROR
        assert isinstance(cut[-1].error, EngineError)
        assert "shutting down" in str(cut[-1].error)
        for client in (patient, hasty):
            with pytest.raises(EngineError, match="engine of model tiny was stopped"):
                client.check_health()
            with pytest.raises(EngineError, match="was stopped"):
                await collect(client, request("late"))
            await client.close()
        assert left_over() <= before


def left_over() -> set[object]:
    """Our threads and child processes."""
    threads = {t for t in threading.enumerate() if t.name.startswith("select-n")}
    return threads | set(psutil.Process().children())


class TestChildProcess:
    async def test_a_killed_child_ends_its_requests_with_an_error_and_is_unhealthy(self, config):
        client = ProcessClient(config())
        await client.start()
        tasks = [await begun(client, request(str(number), ENDLESS)) for number in range(2)]
        os.kill(client.pid, signal.SIGKILL)
        await asyncio.gather(*(task for task, _ in tasks))
        for _, outputs in tasks:
            assert outputs[-1].finish is FinishReason.ERROR
            assert isinstance(outputs[-1].error, EngineError)
            assert str(outputs[-1].error) == (
                "the engine of model tiny died: its process ended with -9"
            )
        with pytest.raises(EngineError, match="died"):
            client.check_health()
        with pytest.raises(EngineError, match="died"):
            await collect(client, request("late"))
        await client.close()

    async def test_a_child_dies_with_its_parent(self, config, tmp_path):
        (tmp_path / "config").write_bytes(pickle.dumps(config()))
        parent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            PARENT,
            str(tmp_path / "config"),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            child = psutil.Process(int(await parent.stdout.readline()))
            assert child.is_running()
        finally:
            parent.kill()
            await parent.wait()
        await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


PARENT = """
import asyncio, pickle, sys
from select_n_core.engine.client import ProcessClient

async def main():
    client = ProcessClient(pickle.load(open(sys.argv[1], "rb")))
    await client.start()
    print(client.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class StubbornError(Exception):
    """Pickles, and cannot be made again from its pickle."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class TestHazards:
    async def test_grace_is_not_for_ever(self, config):
        async with started(config(engine="inline")) as (client, _):
            task, outputs = await begun(client, request("endless", ENDLESS))
            await client.close(grace_s=0.2)
            await task
            assert outputs[-1].finish is FinishReason.ERROR
            assert len(outputs) < ENDLESS

    async def test_a_model_that_is_not_there_is_said_so(self, config, tmp_path):
        client = InlineClient(config(source=str(tmp_path / "nowhere")))
        with pytest.raises(ModelNotFoundError, match="nowhere"):
            await client.start()
        await client.close()

    async def test_a_librarys_error_that_cannot_travel_still_ends_the_start(
        self, config, monkeypatch
    ):
        def build(*_, **__):
            raise StubbornError("no", "luck")

        monkeypatch.setattr(loop, "build_engine", build)
        client = InlineClient(config())
        with pytest.raises(EngineError, match="StubbornError: no luck"):
            await asyncio.wait_for(client.start(), DEADLINE_S)
        await client.close()

    async def test_a_failing_loop_ends_its_requests_with_an_error(self, config, monkeypatch):
        client = InlineClient(config())
        monkeypatch.setattr(threading, "excepthook", lambda _: None)  # it is meant to fall
        await client.start()
        task, outputs = await begun(client, request("a", ENDLESS))

        def fail(*_):
            raise RuntimeError("a bug")

        monkeypatch.setattr("select_n_core.engine.engine.Engine.step", fail)
        await task
        assert outputs[-1].finish is FinishReason.ERROR
        assert "died" in str(outputs[-1].error)
        with pytest.raises(EngineError, match="died"):
            client.check_health()
        await client.close()

    async def test_a_start_that_was_given_up_leaves_nothing_behind(self, config, monkeypatch):
        before, gate, real = left_over(), threading.Event(), loop.build_engine

        def slow(*arguments, **options):
            gate.wait(DEADLINE_S)
            return real(*arguments, **options)

        monkeypatch.setattr(loop, "build_engine", slow)
        client = InlineClient(config())
        start = asyncio.create_task(client.start())
        await until(lambda: client._started is not None)
        start.cancel()
        with suppress(asyncio.CancelledError):
            await start
        gate.set()
        await client.close()
        assert left_over() <= before

    async def test_an_engine_that_says_nothing_for_long_is_unhealthy(self, config, monkeypatch):
        async with started(config(engine="inline")) as (client, _):
            client.check_health()
            later_s = time.monotonic() + 61
            monkeypatch.setattr(time, "monotonic", lambda: later_s)
            with pytest.raises(EngineError, match="has not reported for 6"):
                client.check_health()
            monkeypatch.undo()
