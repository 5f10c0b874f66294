"""What a replica still has to give, compact enough to travel in every report.

For a few k, KV and the time of a step as a curve over compute: the latency model itself is a
recurrence over many units, too slow for whoever weighs a dozen replicas for every request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from select_n_core.decisions.latency import LatencyModel, StepShape
from select_n_core.decisions.pace import pace_of, with_prompt

_PARTS = 2  # straight lines that a curve consists of


@dataclass(frozen=True, slots=True)
class Level:
    """A replica with `k` units streamed.

    A step of some rows, their context and prompt tokens takes compute, x; how long it takes in all
    is a curve over x: flat as long as copies take longer, then as steep as compute.

    Attributes:
        kv_tokens: that exist at this k.
        row_s, context_token_s, prompt_token_s: compute of a decoding row, of a cached token that
            it attends to, and of a prompt token.
        curve: (x, seconds of the step), ascending in both; straight in between, which errs on the
            late side, and beyond the last one as steep as compute.
    """

    k: int
    kv_tokens: int
    row_s: float
    context_token_s: float
    prompt_token_s: float
    curve: tuple[tuple[float, float], ...]

    def compute_s(self, rows: float, context_tokens: float) -> float:
        """X of decoding rows that attend to so many tokens in all."""
        return rows * self.row_s + context_tokens * self.context_token_s

    def step_s(self, compute_s: float) -> float:
        """Seconds of a step with so much compute."""
        before_x, before_s = self.curve[0]
        if compute_s <= before_x:
            return before_s
        for x, took_s in self.curve[1:]:
            if compute_s <= x:
                return before_s + (took_s - before_s) * (compute_s - before_x) / (x - before_x)
            before_x, before_s = x, took_s
        return before_s + compute_s - before_x

    def compute_within(self, budget_s: float) -> float:
        """The most compute of a step within `budget_s`; minus infinity where none is."""
        before_x, before_s = self.curve[0]
        if budget_s < before_s:
            return -math.inf
        for x, took_s in self.curve[1:]:
            if budget_s < took_s:
                return before_x + (x - before_x) * (budget_s - before_s) / (took_s - before_s)
            before_x, before_s = x, took_s
        return before_x + budget_s - before_s


@dataclass(frozen=True, slots=True)
class Vacancy:
    """A replica's load and what it has, at one moment.

    Attributes:
        levels: for some k from the least to the most it may be, ascending.
        max_batch, max_step_tokens: rows and tokens of a step at most.
        running, waiting: requests. least_priority: of any of them; None while there is none.
        running_tokens, waiting_tokens: KV that they are expected to hold in the end, whole blocks.
        backlog_tokens: prompt tokens of theirs that are yet to be computed.
        reclaimable_tokens: KV that homes hold now and would give at the largest k.
        expected_output: tokens of a typical answer.
        tpot_s: the tightest promise to anyone, as decisions aim at it.
        heard: of every sender, the number of its last request that all of this includes.
    """

    levels: tuple[Level, ...]
    max_batch: int
    max_step_tokens: int
    expected_output: int
    tpot_s: float
    running: int = 0
    waiting: int = 0
    least_priority: int | None = None
    running_tokens: int = 0
    waiting_tokens: int = 0
    backlog_tokens: int = 0
    reclaimable_tokens: int = 0
    heard: Mapping[str, int] = field(default_factory=dict)


def levels_of(
    model: LatencyModel,
    slots: int,
    kv_tokens_at: Sequence[tuple[int, int]],
    max_batch: int,
    max_step_tokens: int,
) -> tuple[Level, ...]:
    """The levels of a replica; `kv_tokens_at` are k and the KV tokens that exist at it."""
    return tuple(
        _level(model, slots, k, kv_tokens, max_batch, max_step_tokens)
        for k, kv_tokens in kv_tokens_at
    )


@lru_cache(maxsize=256)
def _level(
    model: LatencyModel, slots: int, k: int, kv_tokens: int, max_batch: int, max_step_tokens: int
) -> Level:
    pace = pace_of(model, k, slots)
    resident = model.resident if k == 0 else None
    compute = resident or model.streaming
    all_units = model.compute_scale * model.units
    alone_s = compute.unit_s(StepShape(1))
    chunk = max(2, max_step_tokens)
    rows_s = compute.unit_s(StepShape(max_batch)) - alone_s
    prompt_s = compute.unit_s(with_prompt(StepShape(), chunk)) - alone_s
    outside_s = model.compute_scale * compute.outside_per_row_s
    row_s = all_units * rows_s / max(1, max_batch - 1) + outside_s
    context_token_s = all_units * compute.per_context_token_s
    curve: list[tuple[float, float]] = []
    for part in range(_PARTS + 1):
        rows = max(1, max_batch * part // _PARTS)
        context = kv_tokens * part // _PARTS
        x, took_s = rows * row_s + context * context_token_s, pace.step_s(StepShape(rows, context))
        if curve and x <= curve[-1][0]:
            continue
        curve.append((x, max(took_s, curve[-1][1]) if curve else took_s))
    return Level(
        k=k,
        kv_tokens=kv_tokens,
        row_s=row_s,
        context_token_s=context_token_s,
        prompt_token_s=all_units * prompt_s / (chunk - 1),
        curve=tuple(curve),
    )
