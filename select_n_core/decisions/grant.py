"""What a grant of a bus means for iterations: how long they take, and when the next may begin.

Two things are slower on a shared bus, and they are not the same. A single copy runs at what the
others leave it, so a unit's transfer takes longer and may stall compute. And on average a member
may not move more than its share, so an iteration takes at least its bytes over its share. With few
units the second binds nobody: their copies run at nearly the link's speed and the link rests in
between. Taking the share as the link's speed would predict stalls that do not happen.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from select_n_core.decisions.bus import SHARED, Grant
from select_n_core.decisions.latency import LatencyModel

_GRID = math.log(1.03)  # times are taken in such steps: models and their tables are reused
_COUNTED = 0.975  # of its part of the bus that a prediction counts on
_ALONE = 1.03  # within this of the recorded transfer time, a time is the recorded one


def streamed_bytes(model: LatencyModel, k: int, unit_bytes: int) -> float:
    """Bytes of pi's first `k` units; `unit_bytes` are the largest unit's."""
    return unit_bytes * model.copies_s(k) / model.transfer_s


def within_grant(model: LatencyModel, unit_bytes: int, grant: Grant) -> LatencyModel:
    """The model of a link to oneself, made that of a member of a bus; times err late."""
    alone = unit_bytes / model.transfer_s
    share = _whole(grant) * _COUNTED
    return _slowed(model, _steps(alone / grant.copy_bytes_per_s), _steps(alone / share))


def _whole(grant: Grant) -> float:
    """What may be used if shares of all of the bus are meant, its reserve too.

    Who asked for nothing and yet moves something does so as copies run.
    """
    return (grant.usable_bytes_per_s or grant.copy_bytes_per_s) / SHARED


def _steps(slower: float) -> int:
    """A factor on the grid, rounded up; 0 where it is none."""
    return math.ceil(math.log(slower) / _GRID) if slower > _ALONE else 0


class Ration:
    """When the next step may begin, so that what a member moves stays within its grant.

    A step that was late owes nothing, and one step's bytes may come early: what counts is the
    average. The reserve of the bus is not held back here, only what others may use.
    """

    def __init__(self) -> None:
        self._due_s = -math.inf

    def moved(self, nbytes: float, begun_s: float, grant: Grant) -> None:
        """A step that began then moved `nbytes` over the bus."""
        if nbytes:
            spent_s = nbytes / _whole(grant)
            self._due_s = max(self._due_s, begun_s - spent_s) + spent_s

    def rest_s(self, now_s: float) -> float:
        """Seconds until the next step may begin."""
        return max(0.0, self._due_s - now_s)


@lru_cache(maxsize=256)
def _slowed(model: LatencyModel, transfer: int, share: int) -> LatencyModel:
    if not transfer and not share:
        return model
    return replace(
        model,
        transfer_s=model.transfer_s * math.exp(transfer * _GRID),
        share_s=model.transfer_s * math.exp(share * _GRID) if share else 0.0,
    )
