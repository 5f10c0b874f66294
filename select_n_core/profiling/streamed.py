"""What streaming costs beside the copies' own time, fitted to whole steps that streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from select_n_core.decisions.latency import LatencyModel
from select_n_core.profiling.fit import closeness, least_squares
from select_n_core.record import PerformanceRecord, StreamedSample

_Array = npt.NDArray[np.float64]

_ROUNDS = 8
_SLOWER = 0.02  # a step of the slope's finite difference, as a share of a unit's time


def fit_streamed(record: PerformanceRecord) -> PerformanceRecord:
    """The record with `streamed_extra_s` and `copy_slowdown` fitted to its streamed steps.

    Both lengthen a step by about as much for every unit more that is streamed; together they
    are well known, each by itself is not. Neither is negative. Unchanged where nothing was
    measured with units streamed.
    """
    cold = record.streaming.cold
    if not record.streamed or cold is None:
        return record
    model = record.latency_model()
    extra_s, slowdown = _fitted(model, record.streamed)
    found = cold.model_copy(update={"streamed_extra_s": extra_s, "copy_slowdown": slowdown})
    streaming = record.streaming.model_copy(update={"cold": found})
    return record.model_copy(update={"streaming": streaming})


def _fitted(model: LatencyModel, samples: Sequence[StreamedSample]) -> tuple[float, float]:
    """Gauss and Newton's method: the law is close to linear in both, but for its corners."""
    unit_s = float(np.median([model.streaming.unit_s(sample.shape()) for sample in samples]))
    steps = np.array([_SLOWER * unit_s, _SLOWER])
    measured_s = np.array([sample.typical_s for sample in samples])

    def ratios(at: _Array) -> _Array:
        compute = replace(
            model.streaming, streamed_extra_s=float(at[0]), copy_slowdown=float(at[1])
        )
        tried = replace(model, streaming=compute)
        predicted_s = [
            tried.iteration_s(sample.shape(), sample.k, sample.slots, rows=sample.rows)
            for sample in samples
        ]
        found: _Array = np.array(predicted_s) / measured_s
        return found

    at, best, least = np.zeros(2), np.zeros(2), np.inf
    for _ in range(_ROUNDS):
        here = ratios(at)
        weights = closeness(here)
        error = float(np.sum((weights * (here - 1)) ** 2))
        if error < least:
            best, least = at, error
        columns = [ratios(at + step) - here for step in np.diag(steps)]
        slopes = np.column_stack(columns) / steps
        at = least_squares(slopes * weights[:, None], (1 - here + slopes @ at) * weights)
    return float(best[0]), float(best[1])
