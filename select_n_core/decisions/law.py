"""The iteration-time law: how long one iteration takes when k of L units are streamed.

It is a max-plus recurrence over the streamed units; planner, benchmarks and tests all use it.
What it comes to is T = max(L*c + g, k*t, k*(t + c)/d), which bounds it from below: L units of
compute c each, g per iteration outside the units, k streamed units of transfer time t each,
d slots in the staging ring. Above that it lies near balance only (k*t = L*c + g), where the
order pi leaves few gaps that d copies ahead do not fill.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache

from select_n_core.decisions.order import streamed_units

_PERIOD = 2  # iterations averaged: the recurrence's own period is one or two
_MOST_ITERATIONS = 64


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Compute seconds of one unit, by where its bytes come from.

    Attributes:
        home_s: at home (c).
        streamed_s: from a slot, its copy there in time. Above `home_s` where fresh bytes are
            colder than resident ones, as on a CPU.
        stalled_s: from a slot, after compute idled `stall_s` for it: caches and clocks cool.
        stall_s: the wait at which `stalled_s` was seen; shorter waits cost in proportion.
    """

    home_s: float
    streamed_s: float
    stalled_s: float
    stall_s: float

    @classmethod
    def uniform(cls, compute_s: float) -> UnitCost:
        """A device on which it makes no difference."""
        return cls(compute_s, compute_s, compute_s, 1.0)

    def after_wait(self, wait_s: float) -> float:
        """Compute seconds of a streamed unit that waited `wait_s`."""
        share = min(1.0, wait_s / self.stall_s)
        return self.streamed_s + share * (self.stalled_s - self.streamed_s)


def iteration_s(
    units: int,
    k: int,
    slots: int,
    cost: UnitCost | float,
    outside_s: float,
    transfer_s: float | tuple[float, ...],
) -> float:
    """Steady-state seconds per iteration with pi's first `k` units streamed through `slots` slots.

    The recurrence `copy_end_j = max(copy_end_{j-1}, unit_done_{j-d}) + t`,
    `unit_start_j = max(copy_end_j, prev_unit_done)`, prefetched cyclically across iterations.

    Args:
        cost: of a unit; a plain number of seconds is a uniform cost c.
        outside_s: g. transfer_s: t, of one unit; of every unit in call order where they differ.
    """
    if not isinstance(cost, UnitCost):
        cost = UnitCost.uniform(cost)
    streamed = streamed_units(units, k)
    if isinstance(transfer_s, tuple):
        transfers_s = tuple(transfer_s[unit] for unit in streamed)
    else:
        transfers_s = (transfer_s,) * k
    return steady_state_s(streamed, units, slots, cost, outside_s, transfers_s)


@lru_cache(maxsize=65536)
def steady_state_s(
    streamed: tuple[int, ...],
    units: int,
    slots: int,
    cost: UnitCost,
    outside_s: float,
    transfers_s: tuple[float, ...],
) -> float:
    """`iteration_s` of any placement: `streamed` units in call order and the transfer of each."""
    if not streamed:
        return units * cost.home_s + outside_s
    copies_s = sum(transfers_s)
    # Compute between two streamed units is one block: the units at home in between.
    gaps_s = [
        (unit - before - 1) * cost.home_s
        for before, unit in zip((-1, *streamed), streamed, strict=False)
    ]
    tail_s = (units - 1 - streamed[-1]) * cost.home_s + outside_s
    done_s: deque[float] = deque([0.0] * slots, maxlen=slots)  # of the last d tickets
    clock_s = copy_end_s = 0.0
    ends_s = [0.0]
    for _ in range(_MOST_ITERATIONS):
        for gap_s, transfer_s in zip(gaps_s, transfers_s, strict=True):
            copy_end_s = max(copy_end_s, done_s[0]) + transfer_s
            clock_s += gap_s
            wait_s = max(0.0, copy_end_s - clock_s)
            clock_s += wait_s + cost.after_wait(wait_s)
            done_s.append(clock_s)
        clock_s += tail_s
        ends_s.append(clock_s)
        if len(ends_s) > 2 * _PERIOD:
            now_s = ends_s[-1] - ends_s[-1 - _PERIOD]
            before_s = ends_s[-1 - _PERIOD] - ends_s[-1 - 2 * _PERIOD]
            # Faster than the copies alone is not steady: units copied ahead are being used up.
            steady = abs(now_s - before_s) <= 1e-9 * now_s
            if steady and now_s >= _PERIOD * copies_s * (1 - 1e-9):
                break
    # Slots filled during a cold first stall are spent over many iterations that look steady.
    return max((ends_s[-1] - ends_s[-1 - _PERIOD]) / _PERIOD, copies_s)
