"""The iteration-time law: how long one iteration takes when k of L units are streamed.

The ground truth is a max-plus recurrence over the streamed units (`iteration_s`); the closed
form (`law_s`) explains it and bounds it from below. Planner, simulator, benchmarks and tests
all use the recurrence.

Symbols: L units of compute c each, g per iteration outside the units, k streamed units of
transfer time t each, d slots in the staging ring, N = L / k.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache

from select_n_core.decisions.order import streamed_units

_WARM_UP = 8
_MEASURED = 12  # a multiple of 1, 2, 3 and 4: the recurrence's period divides d


def iteration_s(
    units: int, k: int, slots: int, unit_compute_s: float, outside_s: float, transfer_s: float
) -> float:
    """Steady-state seconds per iteration of pi's first `k` units streamed through `slots` slots.

    Source: DESIGN's recurrence `copy_end_j = max(copy_end_{j-1}, unit_done_{j-d}) + t`,
    `unit_start_j = max(copy_end_j, prev_unit_done)`, prefetched cyclically across iterations.
    """
    return _steady_state(streamed_units(units, k), units, slots, unit_compute_s, outside_s, transfer_s)


def placement_s(
    streamed: tuple[int, ...],
    units: int,
    slots: int,
    unit_compute_s: float,
    outside_s: float,
    transfer_s: float,
) -> float:
    """As `iteration_s`, for any set of streamed units in call order."""
    return _steady_state(streamed, units, slots, unit_compute_s, outside_s, transfer_s)


@lru_cache(maxsize=65536)
def _steady_state(
    streamed: tuple[int, ...],
    units: int,
    slots: int,
    unit_compute_s: float,
    outside_s: float,
    transfer_s: float,
) -> float:
    if not streamed:
        return units * unit_compute_s + outside_s
    # Compute between two streamed units is one block: the units at home in between.
    gaps = [
        (unit - before - 1) * unit_compute_s
        for before, unit in zip((-1, *streamed), streamed, strict=False)
    ]
    tail_s = (units - 1 - streamed[-1]) * unit_compute_s + outside_s
    done: deque[float] = deque([0.0] * slots, maxlen=slots)  # unit_done of the last d tickets
    clock_s = copy_end_s = 0.0
    started_s = 0.0
    for iteration in range(_WARM_UP + _MEASURED):
        if iteration == _WARM_UP:
            started_s = clock_s
        for gap_s in gaps:
            copy_end_s = max(copy_end_s, done[0]) + transfer_s
            clock_s = max(copy_end_s, clock_s + gap_s) + unit_compute_s
            done.append(clock_s)
        clock_s += tail_s
    return (clock_s - started_s) / _MEASURED


def law_s(
    units: int, k: int, slots: int, unit_compute_s: float, outside_s: float, transfer_s: float
) -> float:
    """Closed form: exact for even spacing (k divides L, k > d), a lower bound for pi's prefixes.

    T = max(L*c + g, k*t, k*(t + c)/d, (k - d)*t + (N + 1)*c + g); for one slot the last term
    reads (k - 1)*(t + c) + N*c + g.
    """
    compute_s = units * unit_compute_s + outside_s
    if k == 0:
        return compute_s
    per_group_s = units / k * unit_compute_s
    if slots == 1:
        last_s = (k - 1) * (transfer_s + unit_compute_s) + per_group_s + outside_s
    else:
        last_s = (k - slots) * transfer_s + per_group_s + unit_compute_s + outside_s
    return max(compute_s, k * transfer_s, k * (transfer_s + unit_compute_s) / slots, last_s)


def stall_free_k(units: int, unit_compute_s: float, outside_s: float, transfer_s: float) -> int:
    """Largest k whose copies the compute can hide at all: k*t <= L*c + g."""
    if transfer_s <= 0:
        return units
    return min(units, int((units * unit_compute_s + outside_s) / transfer_s))
