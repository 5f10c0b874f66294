"""From samples to the latency model's coefficients. Pure; numpy only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from select_n_core.decisions.latency import ComputeModel, StepShape
from select_n_core.record import ColdSample, ComputeSample, ModeRecord


def fit_mode(
    samples: Sequence[ComputeSample], cold: ColdSample | None, threads: int, noise: float = 0.0
) -> ModeRecord:
    """Fit one thread mode.

    Attention terms are slopes between shapes of equal tokens; what remains is a function of the
    tokens alone, kept as measured points and made monotone; g is a line over rows of logits.
    """
    per_context = _slope(samples, lambda s: s.context_tokens, prefill=False)
    per_pair = _slope(samples, lambda s: s.prefill_pairs, prefill=True)
    rest: dict[int, list[float]] = defaultdict(list)
    for s in samples:
        linear_s = s.unit_s - per_context * s.context_tokens - per_pair * s.prefill_pairs
        rest[s.decode_rows + s.prefill_tokens].append(max(linear_s, 0.1 * s.unit_s))
    tokens = sorted(rest)
    seconds = _monotone([float(np.median(rest[count])) for count in tokens])
    outside_s, per_row_s = _line([s.rows for s in samples], [s.outside_s for s in samples])
    mode = ModeRecord(
        threads=threads,
        samples=tuple(samples),
        cold=cold,
        token_grid=tuple(zip(tokens, seconds, strict=True)),
        per_context_token_s=per_context,
        per_pair_s=per_pair,
        outside_s=outside_s,
        outside_per_row_s=per_row_s,
        fit_error=0.0,
        noise=noise,
    )
    return mode.model_copy(update={"fit_error": _error(mode.compute_model(), samples)})


def shape_of(sample: ComputeSample) -> StepShape:
    """The sample's step shape."""
    return StepShape(
        decode_rows=sample.decode_rows,
        context_tokens=sample.context_tokens,
        prefill_tokens=sample.prefill_tokens,
        prefill_pairs=sample.prefill_pairs,
    )


def _slope(
    samples: Sequence[ComputeSample], amount: Callable[[ComputeSample], int], *, prefill: bool
) -> float:
    """Median slope of unit_s over `amount` between samples of equal tokens; never negative."""
    groups: dict[int, list[ComputeSample]] = defaultdict(list)
    for sample in samples:
        if bool(sample.prefill_tokens) is prefill:
            groups[sample.decode_rows + sample.prefill_tokens].append(sample)
    slopes: list[float] = []
    weights: list[float] = []
    for group in groups.values():
        ordered = sorted(group, key=amount)
        for low, high in pairwise(ordered):
            if (reach := amount(high) - amount(low)) > 0:
                slopes.append((high.unit_s - low.unit_s) / reach)
                weights.append(reach)
    if not slopes:
        return 0.0
    # Weighted by reach: a short reach measures noise.
    return max(0.0, float(np.average(slopes, weights=weights)))


def _monotone(values: list[float]) -> list[float]:
    """Midway between the smallest non-descending curve above and the largest below."""
    above = np.maximum.accumulate(values)
    below = np.minimum.accumulate(values[::-1])[::-1]
    return [float(value) for value in (above + below) / 2]


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least-squares (intercept, slope), both kept at zero or above."""
    if len(set(x)) < 2:
        return float(np.median(y)), 0.0
    slope = max(0.0, float(np.polyfit(x, y, 1)[0]))
    return max(0.0, float(np.mean(y) - slope * np.mean(x))), slope


def _error(model: ComputeModel, samples: Sequence[ComputeSample]) -> float:
    return max(abs(model.unit_s(shape_of(sample)) / sample.unit_s - 1) for sample in samples)
