"""A small real tokenizer, an engine that speaks from a script, and an HTTP server around them."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence

import httpx
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deployments.calls import Call, Failure, Report
from deployments.http.api import create_api
from deployments.http.metrics import IngressMetrics
from deployments.replica import Replica
from deployments.series import Sink
from deployments.tenants.gate import PolicySource, open_to_all
from select_n_core.config import ServeArgs, parse_args
from select_n_core.engine.messages import (
    EngineInfo,
    EngineStats,
    FinishReason,
    Output,
    Request,
    TokenLogprob,
)
from select_n_core.engine.text import TextCodec
from select_n_core.errors import EngineError, SelectNError
from select_n_core.slo import SLO

MODEL = "tiny/model"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HANG = "<hang>"  # in a script: nothing comes any more


def codec(generation_config: dict | None = None, template: str | None = TEMPLATE) -> TextCodec:
    """One token per byte, so that tests can count characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = template
    return TextCodec(fast, generation_config or {})


class ScriptedEngine:
    """An `EngineClient` that answers every request with the same text, one token per step.

    Args:
        script: the text, then optionally HANG or an error. A seed starts that many characters
            later, so that sequences differ.
        refusal: raised at every submission.
        verdict_after_s: what it takes to accept or refuse.
    """

    def __init__(
        self,
        codec: TextCodec,
        *script: str | Exception,
        refusal: SelectNError | None = None,
        verdict_after_s: float = 0.0,
        max_tokens: int = 1000,
        predicted_iteration_s: float = 0.05,
    ) -> None:
        self._codec = codec
        self._script = script
        self._refusal = refusal
        self._verdict_after_s = verdict_after_s
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.health: EngineError | None = None
        self.cached_tokens = 0
        self.now = EngineStats(
            k=10,
            interval=3.0,
            mirrored=12,
            lease_bytes=2,
            link_bytes_by={("h2d", "weights"): 7},
            kv_tokens=1000,
            turns={"tpot": 4},
            host_bytes=1,
        )
        self.info = EngineInfo(
            plan_line="N = 3 was chosen",
            units=30,
            k=10,
            interval=3.0,
            max_batch=8,
            max_tokens=max_tokens,
            device_bytes=1,
            host_bytes=2,
            kv_tokens=1000,
            predicted_tpot_s=0.05,
            predicted_iteration_s=predicted_iteration_s,
            link_kind="emulated",
            link_bytes_per_s=1e9,
        )
        self._closing = asyncio.Event()

    async def is_asked(self) -> bool:
        return bool(self.requests)

    async def start(self, *, lent: bool = False) -> EngineInfo:
        return self.info

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        self.requests.append(request)
        finished = False
        try:
            await asyncio.sleep(self._verdict_after_s)
            if self._refusal:
                finished = True
                raise self._refusal
            yield Output(request.id, cached_tokens=self.cached_tokens)  # accepted
            async for output in self._outputs(request):
                finished = output.finish is not None
                yield output
        finally:
            if not finished:
                self.cancelled.append(request.id)

    async def _outputs(self, request: Request) -> AsyncIterator[Output]:
        sampling = request.sampling
        drawn = 0
        for line in self._script:
            if line == HANG:
                await self._closing.wait()
                yield self._error(request, EngineError("the engine is shutting down"))
                return
            if isinstance(line, Exception):
                yield self._error(request, line)
                return
            for token in self._codec.encode(line[sampling.seed or 0 :]):
                await asyncio.sleep(0)
                drawn += 1
                last = drawn == sampling.max_tokens
                yield Output(
                    request.id,
                    (token,),
                    self._logprobs(token),
                    FinishReason.LENGTH if last else None,
                )
                if last:
                    return
        yield Output(request.id, finish=FinishReason.STOP)

    def _logprobs(self, token: int) -> tuple[TokenLogprob, ...]:
        wanted = self.requests[-1].sampling.logprobs
        if wanted is None:
            return ()
        return (TokenLogprob(-0.5, tuple((token + i, -0.5 - i) for i in range(wanted))),)

    def _error(self, request: Request, error: Exception) -> Output:
        return Output(request.id, finish=FinishReason.ERROR, error=error)

    def stats(self) -> EngineStats:
        return self.now

    def check_health(self) -> None:
        if self.health:
            raise self.health

    async def close(self, *, grace_s: float = 0.0) -> None:
        self._closing.set()


class LocalBackend:
    """One replica in the same process, as the ingress sees a model."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def generate(self, call: Call):
        return self._replica.generate(call)

    async def check(self, timeout_s: float) -> Failure | None:
        try:
            self._replica.check()
        except EngineError as error:
            return Failure.of(error)
        return None

    async def reports(self, timeout_s: float) -> list[Report]:
        return [self._replica.report()]


def args(*names: str, stream_timeout: str = "5s", **model: object) -> ServeArgs:
    """The configuration of emulated models by these names."""
    common = {
        "source": "demo:nothing",
        "device_memory": "1MiB",
        "host_memory": "1MiB",
        "link": {"kind": "emulated", "bandwidth": "1GB/s"},
        "slo": {"tpot": "100ms", "ttft": "2s"},
    }
    models = [{"name": name, **common, **model} for name in names or (MODEL,)]
    return parse_args({"models": models, "stream_timeout": stream_timeout})


def replica(engine: ScriptedEngine, text: TextCodec) -> Replica:
    return Replica("replica-1", text, engine, engine.info, SLO(tpot_s=0.1, ttft_s=2.0))


@contextlib.contextmanager
def serving(
    engine: ScriptedEngine,
    text: TextCodec,
    *,
    stream_timeout: str = "5s",
    sinks: Sequence[Sink] = (),
    policy: PolicySource = open_to_all,
    models: Sequence[str] = (MODEL,),
) -> Iterator[str]:
    """The HTTP side around one replica, of every model, on a loopback port; yields its URL."""
    backends = dict.fromkeys(models, LocalBackend(replica(engine, text)))
    asked = args(*models, stream_timeout=stream_timeout)
    slos = {model.name: model.slo.targets() for model in asked.models}
    api = create_api(backends, asked, policy=policy, metrics=IngressMetrics(slos, sinks))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(
            uvicorn.Config(api, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            eventually(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Client:
    """Talks to a served script as any HTTP client would."""

    def __init__(self, url: str, engine: ScriptedEngine, key: str | None = None) -> None:
        self.engine = engine
        self.url = url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, timeout=20, headers=headers)

    def chat(self, **fields) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def complete(self, **fields) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": MODEL, "prompt": "Hi", **fields})

    def send(self, path: str, body: str | bytes) -> httpx.Response:
        """A body as it is, under JSON's content type."""
        headers = {"Content-Type": "application/json"}
        return self.http.post(path, content=body, headers=headers)

    def stream(self, path: str = "/v1/chat/completions", **fields) -> list[dict | str]:
        """Every event of a streamed answer, `[DONE]` as it is."""
        asked = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {}
        body = {"model": MODEL, "stream": True, **asked, **fields}
        with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            return [
                event if event == "[DONE]" else json.loads(event)
                for event in events(list(response.iter_lines()))
            ]


def eventually(holds, deadline_s: float = 10.0) -> None:
    """Wait until `holds()`, and fail when it does not in time."""
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


async def soon(holds, deadline_s: float = 10.0) -> None:
    """`eventually` for coroutines."""
    async with asyncio.timeout(deadline_s):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def events(lines: Sequence[str]) -> list[str]:
    """The data of server-sent events."""
    return [line.removeprefix("data: ") for line in lines if line]
