"""An engine on a tiny model, and everything it said: shared by the tests of the engine."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

import torch
from tiny import VOCAB_SIZE, tiny_llama

from select_n_core.decisions.latency import ComputeModel, LatencyModel
from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.engine.engine import Engine
from select_n_core.engine.messages import (
    FinishReason,
    Output,
    Request,
    SamplingParams,
    StepReport,
)
from select_n_core.engine.online import OnlineModel
from select_n_core.engine.residence import Swapping
from select_n_core.engine.scheduler import Limits, Scheduler, Turning
from select_n_core.kv.names import Salts
from select_n_core.kv.swap import HostBlocks
from select_n_core.links.emulated import EmulatedLink
from select_n_core.models.load import take_apart
from select_n_core.offload.executor import Executor
from select_n_core.offload.placement import Placement, model_memory
from select_n_core.slo import SLO

BLOCKS, BLOCK_TOKENS = 24, 16
COMMON = 1000  # the text with which prompts begin that begin alike
LATENCY = LatencyModel(6, 1e-5, ComputeModel(((1, 1e-4), (256, 1e-3)), 0.0, 0.0, 1e-4, 0.0))


@contextmanager
def running_engine(
    k: int = 3,
    eos: tuple[int, ...] = (),
    *,
    k_min: int | None = None,
    mirrors: int | None = None,
    clock: Callable[[], float] = lambda: 0.0,
    blocks: int = BLOCKS,
    host_blocks: int = 0,
    block_copy_s: float = 0.0,
    online: OnlineModel | None = None,
    sleep: Callable[[float], None] = time.sleep,
    salts: Salts | None = None,
    **limits: int,
):
    """A tiny Llama with `k` of 6 layers streamed over a very fast emulated link.

    The arena holds `blocks` KV blocks with `k_min` layers streamed; None is k, which stands still.
    """
    model = take_apart(tiny_llama())
    memory = model_memory(model, BLOCK_TOKENS)
    link = EmulatedLink(1e11)
    executor = Executor(
        model,
        Placement(
            arena_bytes=arena_bytes_for(memory, k if k_min is None else k_min, 2, blocks),
            k=k,
            k_min=k_min,
            k_max=None if k_min is None else 6,
            mirrors=6 if k_min is not None and mirrors is None else mirrors,
            slots=2,
            block_tokens=BLOCK_TOKENS,
            threads=1,
        ),
        link,
        torch.device("cpu"),
    )
    host = HostBlocks(host_blocks, memory.kv_block_bytes, link)
    facts = {
        "max_batch": 4,
        "max_step_tokens": 24,
        "max_queue": 8,
        "max_tokens": 256,
        "vocab_size": model.vocab_size,
        "least_chunk": 8,
        "expected_output": 8,
    }
    scheduler = Scheduler(
        limits=Limits(**{**facts, **limits}),
        slo=SLO(tpot_s=10.0, ttft_s=10.0),
        latency=LATENCY,
        blocks=executor.blocks,
        k=k,
        slots=2,
        clock=clock,
        swapping=Swapping(host, executor.cache.bytes_of, block_copy_s),
        turning=Turning(
            k_min=executor.layout.k_min,
            k_most=lambda: min(executor.m, executor.cap),
            blocks_at=executor.layout.blocks_at,
        ),
        salts=salts,
    )
    engine = Engine(executor, scheduler, eos, clock, host, online, sleep)
    try:
        yield engine
        assert host.free_blocks == host_blocks, "every host block came back"
        assert executor.blocks.free_blocks == executor.blocks.blocks, "every block came back"
    finally:
        engine.close()


def prompt(number: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist())


def request(
    name: str, length: int = 9, tokens: int = 8, text: int = 0, common: int = 0, **rules
) -> Request:
    """The first `common` tokens of its prompt are those of all that have as many in common."""
    common = min(common, length)
    ids = prompt(COMMON, common) + prompt(text, length - common)
    return Request(name, ids, SamplingParams(max_tokens=tokens, **rules))


@cache
def _alone():
    return tiny_llama(eos_token_id=None)


def greedy(asked: Request) -> list[int]:
    """What `transformers` generates for a request, alone and greedily."""
    ids = torch.tensor([asked.prompt])
    with torch.inference_mode():
        out = _alone().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.sampling.max_tokens,
            do_sample=False,
        )
    return out[0, ids.shape[1] :].tolist()


class Heard:
    """Everything the engine reported, by request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[Output]] = {}

    def step(self) -> None:
        self.hear(self.engine.step())

    def hear(self, report: StepReport) -> None:
        for output in report.outputs:
            mine = self.outputs.setdefault(output.request_id, [])
            assert not mine or mine[-1].finish is None, "nothing follows the last output"
            mine.append(output)

    def run(self, most: int = 500) -> None:
        for _ in range(most):
            if self.engine.idle:
                return
            self.step()
        raise AssertionError("the engine never became idle")

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs[name] for token in output.tokens]

    def finish(self, name: str) -> FinishReason | None:
        return self.outputs[name][-1].finish

    def error(self, name: str) -> Exception | None:
        return self.outputs[name][-1].error
