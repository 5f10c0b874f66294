"""From samples to the latency model's coefficients. Pure; numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from select_n_core.decisions.latency import ComputeModel
from select_n_core.record import ColdSample, ComputeSample, ModeRecord

_Array = npt.NDArray[np.float64]

_LEAST = 0.1  # of a unit's own time that is left to it, whatever is outside
_TOLERANCE = 1e-10
_FAR = 0.03  # relative error from which on a sample may be a disturbed one
_ROUNDS = 8


def fit_mode(
    samples: Sequence[ComputeSample],
    cold: ColdSample | None,
    threads: int,
    units: int,
    noise: float = 0.0,
) -> ModeRecord:
    """Fit one thread mode of a model of `units` units.

    c is a piecewise linear function of the tokens, with knots at sizes of the grid, plus
    attention's terms; g is a line over rows of logits, and what it leaves is spread over the
    units. No coefficient is negative, so that more work never takes less time; the relative
    error is least in the sense of squares, but for samples that a neighbour disturbed.
    """
    outside_s, per_row_s = _outside(samples)
    spread_s = [(s.outside_s - outside_s - per_row_s * s.rows) / units for s in samples]
    unit_s = np.array(
        [
            max(s.unit_s + extra_s, _LEAST * s.unit_s)
            for s, extra_s in zip(samples, spread_s, strict=True)
        ]
    )
    knots = _knots(samples)
    ramps = _ramps(np.array([s.decode_rows + s.prefill_tokens for s in samples]), knots)
    terms = _terms(samples)
    found = _robust(np.hstack([ramps, terms]) / unit_s[:, None])
    steps_s, coefficients = found[: len(knots)], found[len(knots) :]
    # A grid that starts at zero would be no time at all: it keeps a part of the smallest.
    steps_s[0] = max(steps_s[0], 1e-3 * float(unit_s.min()))
    seconds = np.cumsum(steps_s)
    mode = ModeRecord(
        threads=threads,
        samples=tuple(samples),
        cold=cold,
        token_grid=tuple((knot, float(s)) for knot, s in zip(knots, seconds, strict=True)),
        per_context_token_s=float(coefficients[0]),
        per_pair_s=float(coefficients[1]),
        per_part_s=float(coefficients[2]),
        outside_s=outside_s,
        outside_per_row_s=per_row_s,
        fit_error=0.0,
        noise=noise,
    )
    return mode.model_copy(update={"fit_error": _error(mode.compute_model(), samples, units)})


def _robust(columns: _Array) -> _Array:
    """x >= 0 with columns x near 1; where a sample lies far off, its distance counts unsquared."""
    weights = np.ones(len(columns))
    for _ in range(_ROUNDS):
        found = least_squares(columns * weights[:, None], weights)
        weights = closeness(columns @ found)
    return found


def closeness(ratios: _Array) -> _Array:
    """Weights of ratios near 1: what lies far off counts by its distance, not by its square."""
    weights: _Array = np.sqrt(np.minimum(1.0, _FAR / np.maximum(np.abs(ratios - 1), 1e-12)))
    return weights


def least_squares(columns: _Array, target: _Array) -> _Array:
    """The x >= 0 that minimises |columns x - target|, by Lawson and Hanson's active sets.

    Args:
        columns: [rows, unknowns]. target: [rows].
    """
    scale = np.linalg.norm(columns, axis=0)
    scale[scale == 0] = 1.0
    a = columns / scale
    x = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], dtype=bool)  # unknowns that are not held at zero
    for _ in range(3 * a.shape[1]):
        gain = np.where(free, -np.inf, a.T @ (target - a @ x))
        best = int(np.argmax(gain))
        if gain[best] <= _TOLERANCE * max(1.0, float(np.linalg.norm(target))):
            break
        free[best] = True
        while free.any():
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(a[:, free], target, rcond=None)[0]
            negative = free & (trial <= 0)
            if not negative.any():
                x = trial
                break
            # As far towards the trial as nothing turns negative; what reaches zero stays there.
            step = float(np.min(x[negative] / (x[negative] - trial[negative])))
            x = np.maximum(x + step * (trial - x), 0.0)
            free &= x > _TOLERANCE
            x[~free] = 0.0
    found: _Array = x / scale
    return found


def _knots(samples: Sequence[ComputeSample]) -> list[int]:
    """Token counts of steps of one kind, more than a doubling apart: closer ones share noise."""
    alone = {s.prefill_tokens or s.decode_rows for s in samples if not _is_mixed(s)}
    sizes = sorted(alone or {s.decode_rows + s.prefill_tokens for s in samples})
    knots = sizes[:1]
    for tokens in sizes:
        if tokens > 2 * knots[-1]:
            knots.append(tokens)
    if sizes[-1] > knots[-1]:
        knots[-1:] = [sizes[-1]] if knots[1:] else [knots[0], sizes[-1]]
    return knots


def _is_mixed(sample: ComputeSample) -> bool:
    return bool(sample.decode_rows and sample.prefill_tokens)


def _ramps(tokens: _Array, knots: Sequence[int]) -> _Array:
    """[samples, knots]: a constant, then each segment's share; the last goes on beyond its end."""
    columns = [np.ones(len(tokens))]
    for number, (low, high) in enumerate(pairwise(knots), start=2):
        share = (tokens - low) / (high - low)
        columns.append(np.clip(share, 0.0, None if number == len(knots) else 1.0))
    return np.column_stack(columns)


def _terms(samples: Sequence[ComputeSample]) -> _Array:
    """[samples, 3]: what `ComputeModel.unit_s` multiplies its attention coefficients with."""
    terms = [(s.context_tokens, s.prefill_pairs, s.shape().parts - 1) for s in samples]
    return np.array(terms, dtype=np.float64)


def _outside(samples: Sequence[ComputeSample]) -> tuple[float, float]:
    """g at no rows and per row of logits; what prompt tokens add is told apart from them."""
    weights = np.array([1 / (s.outside_s or s.unit_s) for s in samples])
    columns = np.array([[1.0, s.rows, s.prefill_tokens] for s in samples])
    target = np.array([s.outside_s for s in samples])
    if len({s.rows for s in samples}) < 2:
        columns[:, 1] = 0.0
    found = least_squares(columns * weights[:, None], target * weights)
    return float(found[0]), float(found[1])


def _error(model: ComputeModel, samples: Sequence[ComputeSample], units: int) -> float:
    """The largest relative error of whole steps."""
    return max(
        abs(
            (units * model.unit_s(s.shape()) + model.outside(s.rows))
            / (units * s.unit_s + s.outside_s)
            - 1
        )
        for s in samples
    )
