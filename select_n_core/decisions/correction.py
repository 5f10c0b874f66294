"""What serving teaches the latency model: two factors, corrected after every iteration.

The record was made on an idle machine. While serving, compute and link may be slower (a neighbour,
another replica on the bus, a warm device) or faster. Both factors follow what is seen: quickly
upwards, because a promise is at stake, and slowly downwards. No single iteration moves them far,
and what is no time at all (NaN, negative, infinite) moves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from select_n_core.decisions.latency import LatencyModel, StepShape
from select_n_core.decisions.pace import Pace, pace_of

_UP, _DOWN = 0.25, 0.05  # share of the way to what was seen
_LINK_UP = 0.5  # copies are many and alike: their median is trusted sooner
_JUMP = 1.5  # the most that one iteration can be taken to differ by
_LEAST, _MOST = 0.1, 100.0  # of the record; beyond, something else is wrong
_GRID = math.log(1.02)  # factors are applied in steps of 2%: models and their tables are reused
_COPY_BOUND = 0.98  # of an iteration in copies: compute cannot be told from it
_HIDDEN = 1.05  # an iteration that copies explain to within this


@dataclass(frozen=True, slots=True)
class Seen:
    """One iteration, as it went.

    Attributes:
        shape: what was computed.
        seconds: wall time.
        stall_s: of it, compute waited for copies; None where the host cannot tell.
        transfer_s: median seconds of a copy of the largest unit, of those that ended; None where
            none did.
        copied_s: copies took in all.
    """

    shape: StepShape
    k: int
    seconds: float
    stall_s: float | None = None
    transfer_s: float | None = None
    copied_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Correction:
    """How much slower than recorded.

    Attributes:
        compute: factor on all compute. transfer: on the link's time.
        error: how far iterations lie from their predictions, a smoothed relative error.
    """

    compute: float = 1.0
    transfer: float = 1.0
    error: float = 0.03

    def applied(self, model: LatencyModel) -> LatencyModel:
        """The recorded model as it is now."""
        return _applied(model, _on_grid(self.compute), _on_grid(self.transfer))

    def after(self, seen: Seen, model: LatencyModel, slots: int) -> Correction:
        """The correction once `seen` is known; `model` is the recorded one.

        Args:
            slots: of the staging ring.
        """
        if not _is_time(seen.seconds):
            return self
        transfer, as_seen = self.transfer, self
        if seen.transfer_s is not None and _is_time(seen.transfer_s):
            slower = seen.transfer_s / model.transfer_s
            transfer = _moved(transfer, slower, _LINK_UP)
            as_seen = replace(self, transfer=min(max(slower, _LEAST), _MOST))
        pace = pace_of(replace(self, transfer=transfer).applied(model), seen.k, slots)
        predicted_s = pace.step_s(seen.shape)
        if seen.stall_s is not None:
            ratio = _of_compute(seen.seconds - seen.stall_s, seen.stall_s, pace, seen.shape)
        else:
            # A link that is learnt slowly must not be taken for slow compute meanwhile.
            ratio = _of_all(
                seen.seconds, pace_of(as_seen.applied(model), seen.k, slots), seen.shape
            )
        compute = self.compute
        if ratio is not None:
            compute = _moved(compute, _on_grid(compute) * ratio)
        missed_by = min(1.0, abs(seen.seconds / predicted_s - 1))
        error = self.error + _DOWN * (missed_by - self.error)
        return Correction(compute, transfer, error)


def _of_compute(took_s: float, stall_s: float, pace: Pace, shape: StepShape) -> float | None:
    """How much slower compute was than predicted, its waits known."""
    if not _is_time(took_s) or not stall_s >= 0:
        return None
    return took_s / pace.compute_s(shape)


def _of_all(took_s: float, pace: Pace, shape: StepShape) -> float | None:
    """The same from whole iterations; None where copies hide how long compute took."""
    predicted_s = pace.step_s(shape)
    if pace.copies_s >= _COPY_BOUND * predicted_s and took_s <= _HIDDEN * predicted_s:
        return None
    return took_s / predicted_s


def _moved(factor: float, seen: float, up: float = _UP) -> float:
    near = min(max(seen, factor / _JUMP), factor * _JUMP)
    share = up if near > factor else _DOWN
    return min(max(factor + share * (near - factor), _LEAST), _MOST)


def _on_grid(factor: float) -> float:
    return math.exp(round(math.log(factor) / _GRID) * _GRID)


def _is_time(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds > 0


def _applied(model: LatencyModel, compute: float, transfer: float) -> LatencyModel:
    if compute == 1.0 and transfer == 1.0:
        return model
    return replace(
        model,
        transfer_s=model.transfer_s * transfer,
        compute_scale=model.compute_scale * compute,
    )
