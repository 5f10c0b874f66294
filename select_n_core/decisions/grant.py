"""What a grant of a bus means for an iteration: how long it takes, and how large k may be.

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
from select_n_core.decisions.latency import LatencyModel, StepShape
from select_n_core.decisions.pace import pace_of

_GRID = math.log(1.03)  # times are taken in such steps: models and their tables are reused
_ALONE = 1.03  # within this of the recorded transfer time, a time is the recorded one


def streamed_bytes(model: LatencyModel, k: int, unit_bytes: int) -> float:
    """Bytes of pi's first `k` units; `unit_bytes` are the largest unit's."""
    return unit_bytes * model.copies_s(k) / model.transfer_s


def link_use(model: LatencyModel, shape: StepShape, k: int, slots: int, unit_bytes: int) -> float:
    """Bytes/s over the link, on average, while `k` units are streamed: k*S/T.

    A member's demand is its link use at the k that it wants, from the model of a link that it has
    to itself. From a model that already shares the bus, demands would shrink as shares do.
    """
    if k == 0:
        return 0.0
    return streamed_bytes(model, k, unit_bytes) / pace_of(model, k, slots).step_s(shape)


def within_grant(model: LatencyModel, unit_bytes: int, grant: Grant) -> LatencyModel:
    """The model of a link to oneself, made that of a member of a bus; times err on the late side.

    It tells what the member could have if it asked for it, beside what the others want: its fair
    share, not its present one, which is no more than it demanded.
    """
    alone = unit_bytes / model.transfer_s
    return _slowed(
        model, _steps(alone / grant.copy_bytes_per_s), _steps(alone / grant.fair_bytes_per_s)
    )


def k_within(
    model: LatencyModel,
    shape: StepShape,
    k_most: int,
    slots: int,
    unit_bytes: int,
    grant: Grant,
    budget_s: float,
) -> int:
    """The largest k up to `k_most` whose step ends within `budget_s` and whose link use fits.

    What fits is what was granted now, with the reserve that a bus keeps for what predictions miss.
    Where all members want more than there is, every k fits: steps grow longer with it, and the
    budget, the TPOT that the step has to keep, is what makes a k of a share.

    Args:
        model: of a link to oneself.
    """
    beside = within_grant(model, unit_bytes, grant)
    most_bytes_per_s = grant.bytes_per_s / SHARED
    low, high = 0, k_most
    while low < high:
        middle = (low + high + 1) // 2
        step_s = pace_of(beside, middle, slots).step_s(shape)
        moved = streamed_bytes(model, middle, unit_bytes)
        if step_s <= budget_s and moved <= most_bytes_per_s * step_s:
            low = middle
        else:
            high = middle - 1
    return low


def _steps(slower: float) -> int:
    """A factor on the grid, rounded up; 0 where it is none."""
    return math.ceil(math.log(slower) / _GRID) if slower > _ALONE else 0


@lru_cache(maxsize=256)
def _slowed(model: LatencyModel, transfer: int, share: int) -> LatencyModel:
    if not transfer and not share:
        return model
    return replace(
        model,
        transfer_s=model.transfer_s * math.exp(transfer * _GRID),
        share_s=model.transfer_s * math.exp(share * _GRID) if share else 0.0,
    )
