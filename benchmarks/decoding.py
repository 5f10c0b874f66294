"""Running a placed model without a server: one batch of prompts to its last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from select_n_core.config import DType, LinkConfig
from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.engine.engine import Engine
from select_n_core.engine.messages import Request, SamplingParams
from select_n_core.engine.scheduler import Limits, Scheduler
from select_n_core.links.base import Link
from select_n_core.models.load import LoadedModel, load_model
from select_n_core.models.source import resolve
from select_n_core.offload.executor import Executor
from select_n_core.offload.placement import Placement, StepRow, model_memory
from select_n_core.profiling.fingerprint import fingerprint
from select_n_core.profiling.measure import Effort, measure_record
from select_n_core.record import PerformanceRecord
from select_n_core.slo import SLO

DEMO = "demo:smollm2-135m-instruct"
BLOCK_TOKENS = 32
CPU = torch.device("cpu")


def load(source: str, dtype: DType) -> tuple[Path, LoadedModel]:
    """The model and where it lies."""
    directory = resolve(source)
    return directory, load_model(directory, dtype)


def record_here(
    source: str,
    directory: Path,
    model: LoadedModel,
    dtype: DType,
    link_bytes_per_s: float,
    effort: Effort,
) -> PerformanceRecord:
    """A record made now, on this machine and link."""
    link = LinkConfig(kind="emulated", bandwidth=link_bytes_per_s)
    return measure_record(model, fingerprint(source, directory, dtype, link), link, effort)


def place(
    model: LoadedModel,
    link: Link,
    *,
    k: int,
    slots: int,
    requests: int,
    tokens: int,
    threads: int | None = None,
) -> Executor:
    """An executor whose arena just holds `requests` requests of `tokens` tokens each."""
    memory = model_memory(model, BLOCK_TOKENS)
    blocks = requests * memory.blocks_of(tokens)
    placement = Placement(
        arena_bytes=arena_bytes_for(memory, k, slots, blocks) + 256,
        k=k,
        slots=slots,
        block_tokens=BLOCK_TOKENS,
        threads=threads,
    )
    return Executor(model, placement, link, CPU)


class Iteration(NamedTuple):
    """Seconds of one iteration, and of those the ones that compute waited for copies."""

    seconds: float
    stall_s: float


class MovingBatch:
    """A decoding batch in an arena in which k may turn from 0 to `k_max`; one compute thread."""

    def __init__(
        self,
        model: LoadedModel,
        link: Link,
        *,
        slots: int,
        k_max: int,
        requests: int,
        context: int = 160,
    ) -> None:
        memory = model_memory(model, BLOCK_TOKENS)
        blocks = requests * memory.blocks_of(context + 1)
        placement = Placement(
            arena_bytes=arena_bytes_for(memory, 0, slots, blocks + 1) + slots * memory.slot_bytes,
            k=0,
            k_min=0,
            k_max=k_max,
            mirrors=k_max,
            slots=slots,
            block_tokens=BLOCK_TOKENS,
            threads=1,
        )
        self.executor = Executor(model, placement, link, CPU)
        self._names = [str(index) for index in range(requests)]
        self._context = context
        for name in self._names:
            self.executor.blocks.reserve(name, context + 1)

    def iteration(self, k: int) -> Iteration:
        """One decode iteration with k turned to `k`."""
        executor = self.executor
        stalled_s, begun_s = executor.link.counters.stall_s, time.perf_counter()
        executor.turn(k)
        rows = [StepRow(executor.blocks.table(name), self._context, [1]) for name in self._names]
        executor.step(rows).argmax(-1).tolist()
        seconds = time.perf_counter() - begun_s
        return Iteration(seconds, executor.link.counters.stall_s - stalled_s)

    def iterations(
        self, k: int, count: int, before: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Seconds of `count` of them; `before` is called before each and not timed."""
        seconds = []
        for _ in range(count):
            before()
            seconds.append(self.iteration(k).seconds)
        return seconds

    def close(self) -> None:
        """Give the arena and the mirrors back."""
        self.executor.close()


def complete(
    executor: Executor,
    record: PerformanceRecord,
    prompts: Sequence[Sequence[int]],
    output: int,
    chunk_tokens: int = 256,
) -> list[list[int]]:
    """Greedy tokens of every prompt, all in one continuous batch, end-of-sequence ignored."""
    scheduler = Scheduler(
        limits=Limits(
            max_batch=len(prompts),
            max_step_tokens=chunk_tokens + len(prompts),
            max_queue=len(prompts),
            max_tokens=1 << 20,
            vocab_size=executor.model.vocab_size,
        ),
        slo=SLO(tpot_s=1.0, ttft_s=60.0),
        latency=record.latency_model(),
        blocks=executor.blocks,
        k=executor.k,
        slots=executor.placement.slots,
        clock=time.monotonic,
    )
    engine = Engine(executor, scheduler, ())
    found: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        engine.submit(Request(str(index), tuple(prompt), sampling))
    while not engine.idle:
        for out in engine.step().outputs:
            if out.error is not None:
                raise out.error
            found[out.request_id] += out.tokens
    return list(found.values())
