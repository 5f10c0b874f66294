"""How good the fit is on steps that it never saw, and how good it could be told to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from select_n_core.decisions.latency import LatencyModel
from select_n_core.profiling.passes import Pass
from select_n_core.profiling.rig import Case
from select_n_core.record import HeldOutSample

_SPLITS = 200
_LEAST_GOAL = 0.05
_NOISES = 1.5


def split_half_noise(seconds: Sequence[float]) -> float:
    """By how much the medians of two random halves differ, in the median of many splits."""
    draw = np.random.default_rng(0)
    shuffled = draw.permuted(np.tile(np.asarray(seconds), (_SPLITS, 1)), axis=1)
    half = len(seconds) // 2
    first, second = shuffled[:, :half], shuffled[:, half : 2 * half]
    ratios = np.median(first, axis=1) / np.median(second, axis=1)
    return float(np.median(np.abs(ratios - 1)))


def p95(shares: Sequence[float]) -> float | None:
    """The 95th percentile; None of nothing."""
    return float(np.percentile(shares, 95)) if shares else None


def goal(noise: float) -> float:
    """The largest P95 error that counts as good: 5%, or 1.5 times the split-half noise."""
    return max(_LEAST_GOAL, _NOISES * noise)


def judged(
    model: LatencyModel, passes: Mapping[Case, Sequence[Pass]], slots: int
) -> tuple[HeldOutSample, ...]:
    """Every held-out case with what `model` predicts for it."""
    return tuple(_sample(model, case, each, slots) for case, each in passes.items())


def _sample(model: LatencyModel, case: Case, passes: Sequence[Pass], slots: int) -> HeldOutSample:
    facts, rows = case.shape.facts(), len(case.shape.rows)
    seconds = tuple(each.wall_s for each in passes)
    return HeldOutSample(
        decode_rows=facts.decode_rows,
        context_tokens=facts.context_tokens,
        prefill_tokens=facts.prefill_tokens,
        prefill_pairs=facts.prefill_pairs,
        chunks=facts.chunks,
        rows=rows,
        k=case.k,
        slots=slots,
        seconds=seconds,
        predicted_s=model.iteration_s(facts, case.k, slots, rows=rows),
        noise=split_half_noise(seconds),
    )
