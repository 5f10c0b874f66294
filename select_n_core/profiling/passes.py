"""Passes: real steps of a placed model on synthetic requests, timed from inside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from select_n_core.decisions.latency import StepShape, chunk_pairs
from select_n_core.offload.executor import Executor
from select_n_core.offload.placement import StepRow
from select_n_core.profiling.clock import DeviceClock, HostClock

BLOCK_TOKENS = 32
RING_WARM_UP = 2  # the period of a ring in its steady state is one or two iterations


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
            chunks=len(chunks),
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


def typical(
    passes: Sequence[Pass],
    name: Literal["wall_s", "home_s", "streamed_s", "wait_s", "outside_s"],
) -> float:
    """The median."""
    return float(statistics.median(getattr(each, name) for each in passes))


def middle(passes: Sequence[Pass]) -> list[Pass]:
    """About half of them, those whose walls lie in the middle: their means add up to a wall."""
    ordered = sorted(passes, key=lambda each: each.wall_s)
    off = (len(ordered) + 1) // 4
    return ordered[off : len(ordered) - off]


def run_passes(
    executor: Executor,
    clock: HostClock | DeviceClock,
    shape: Shape,
    repeats: int,
    warm_up: int,
) -> list[Pass]:
    """Run `shape` `warm_up` times for nothing, then `repeats` times."""
    names = [f"shape-{index}" for index in range(len(shape.rows))]
    for name, (context, tokens) in zip(names, shape.rows, strict=True):
        executor.blocks.reserve(name, context + tokens)
    rows = [
        StepRow(executor.blocks.table(name), context, [1] * tokens)
        for name, (context, tokens) in zip(names, shape.rows, strict=True)
    ]
    try:
        return [_one_pass(executor, clock, rows) for _ in range(warm_up + repeats)][warm_up:]
    finally:
        for name in names:
            executor.blocks.release(name)


def _one_pass(executor: Executor, clock: HostClock | DeviceClock, rows: list[StepRow]) -> Pass:
    begun_s = time.perf_counter()
    executor.step(rows).argmax(-1).tolist()
    wall_s = time.perf_counter() - begun_s
    times = clock.take()
    units = executor.memory.units
    if times is None:  # all that a graph tells is its sum
        return Pass(wall_s, wall_s / units, wall_s / units, 0.0, 0.0)
    streaming = set(executor.streamed)
    kinds = units // len(executor.model.kv)
    home_s, streamed_s = unit_means_s(times.computes_s, streaming, kinds)
    return Pass(
        wall_s=wall_s,
        home_s=home_s,
        streamed_s=streamed_s,
        wait_s=statistics.mean([times.waits_s[unit] for unit in streaming] or [0.0]),
        outside_s=max(0.0, wall_s - sum(times.computes_s) - sum(times.waits_s)),
    )


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
