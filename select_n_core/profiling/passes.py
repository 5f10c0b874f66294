"""Passes: real steps of a placed model on synthetic requests, timed from inside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from select_n_core.decisions.latency import StepShape, chunk_pairs
from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.links.base import Link
from select_n_core.models.load import LoadedModel
from select_n_core.offload.executor import Executor
from select_n_core.offload.placement import Placement, StepRow, model_memory

BLOCK_TOKENS = 32
_WARM_UP = 2
_UNDISTURBED = 1.08


@dataclass(frozen=True, slots=True)
class Shape:
    """Synthetic requests of one pass: (context, new tokens) each."""

    rows: tuple[tuple[int, int], ...]

    def facts(self) -> StepShape:
        """The shape as the latency model takes it."""
        decode = [context for context, tokens in self.rows if tokens == 1]
        chunks = [(context, tokens) for context, tokens in self.rows if tokens > 1]
        return StepShape(
            decode_rows=len(decode),
            context_tokens=sum(decode),
            prefill_tokens=sum(tokens for _, tokens in chunks),
            prefill_pairs=sum(chunk_pairs(context, tokens) for context, tokens in chunks),
        )

    def blocks(self) -> int:
        """KV blocks that one pass takes."""
        return sum(-(-(context + tokens) // BLOCK_TOKENS) for context, tokens in self.rows)


class Pass(NamedTuple):
    """Seconds of one pass; home, streamed and wait are means per unit."""

    wall_s: float
    home_s: float
    streamed_s: float
    wait_s: float
    outside_s: float


def quiet(
    passes: Sequence[Pass],
    name: Literal["wall_s", "home_s", "streamed_s", "wait_s", "outside_s"],
) -> float:
    """The lower quartile: on a shared machine neighbours only ever add time, and in bursts."""
    return float(np.percentile([getattr(each, name) for each in passes], 25))


Sweep = dict[Shape, list[Pass]]
"""Every shape's passes, taken one shape after another."""


def sweep_s(sweep: Sweep) -> float:
    """Seconds of a sweep: one quiet pass of every shape."""
    return sum(quiet(passes, "wall_s") for passes in sweep.values())


def undisturbed(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """Those within 8% of the fastest: what took longer shared the machine with somebody."""
    limit_s = _UNDISTURBED * min((sweep_s(sweep) for sweep in sweeps), default=0.0)
    return [sweep for sweep in sweeps if sweep_s(sweep) <= limit_s]


def run_passes(executor: Executor, shape: Shape, repeats: int) -> list[Pass]:
    """Run `shape` a few times to warm up, then `repeats` times."""
    names = [f"shape-{index}" for index in range(len(shape.rows))]
    for name, (context, tokens) in zip(names, shape.rows, strict=True):
        executor.blocks.reserve(name, context + tokens)
    rows = [
        StepRow(executor.blocks.table(name), context, [1] * tokens)
        for name, (context, tokens) in zip(names, shape.rows, strict=True)
    ]
    try:
        return [_one_pass(executor, rows) for _ in range(_WARM_UP + repeats)][_WARM_UP:]
    finally:
        for name in names:
            executor.blocks.release(name)


@contextmanager
def placed(
    model: LoadedModel,
    link: Link,
    device: torch.device,
    *,
    k: int,
    slots: int,
    blocks: int,
    threads: int | None = None,
) -> Iterator[Executor]:
    """The model in an arena that just holds `blocks` KV blocks."""
    memory = model_memory(model, BLOCK_TOKENS)
    placement = Placement(
        # An aligned region may end up to one alignment before the arena does.
        arena_bytes=arena_bytes_for(memory, k, slots, blocks) + 256,
        k=k,
        slots=slots,
        block_tokens=BLOCK_TOKENS,
        threads=threads,
    )
    executor = Executor(model, placement, link, device)
    try:
        yield executor
    finally:
        executor.close()


def unit_means_s(
    computes_s: Sequence[float], streaming: Collection[int], kinds: int
) -> tuple[float, float]:
    """Seconds of a mean unit at home, and of one in a slot.

    Units of different kinds, as the halves of a layer, take turns and differ by themselves:
    each is compared with its own kind.
    """
    home_s = []
    for kind in range(kinds):
        alike = range(kind, len(computes_s), kinds)
        at_home = [computes_s[unit] for unit in alike if unit not in streaming]
        home_s.append(statistics.mean(at_home or [computes_s[unit] for unit in alike]))
    extras_s = [computes_s[unit] - home_s[unit % kinds] for unit in streaming]
    mean_s = statistics.mean(home_s)
    return mean_s, mean_s + statistics.mean(extras_s or [0.0])


def _one_pass(executor: Executor, rows: list[StepRow]) -> Pass:
    begun_s = time.perf_counter()
    executor.step(rows).argmax(-1).tolist()
    wall_s = time.perf_counter() - begun_s
    span, streaming = executor.streamer.span, set(executor.streamed)
    computes_s, waits_s = span.computes_s(), span.waits_s()
    kinds = len(computes_s) // len(executor.model.kv)
    home_s, streamed_s = unit_means_s(computes_s, streaming, kinds)
    return Pass(
        wall_s=wall_s,
        home_s=home_s,
        streamed_s=streamed_s,
        wait_s=statistics.mean([waits_s[unit] for unit in streaming] or [0.0]),
        outside_s=max(0.0, wall_s - sum(computes_s) - sum(waits_s)),
    )
