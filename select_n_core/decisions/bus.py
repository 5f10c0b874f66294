"""Sharing a bus: one allocation for all members, and the claims that keep them within it.

Every member shows what it wants (its demand) and what it may use (its claim), and all compute the
same max-min fair shares. To raise its claim, a member shows the higher one first and then looks at
the others': it takes what their claims leave. So of two that raise at once the later one sees the
earlier, in whatever order their reads and writes fall: what all claim together never exceeds what
is shared out. An increase therefore waits exactly for those who have to give way. They do so over
the lifetime of a typical request: to those that run, the share was promised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from select_n_core.errors import InputError

SHARED = 0.95  # of the measured capacity; the rest takes up what is not known of it


class Shown(NamedTuple):
    """What a member shows the others, in bytes/s."""

    demand: float
    claim: float


@dataclass(frozen=True, slots=True)
class Grant:
    """What a member may count on.

    Attributes:
        bytes_per_s: its share, an average over iterations; no more than it asked for.
        usable_bytes_per_s: what it may use as it stands: its share, or more where nobody claims
            the rest; while others still give way, an even part of what it asked for.
        copy_bytes_per_s: at which one of its copies runs beside the others.
    """

    bytes_per_s: float
    usable_bytes_per_s: float
    copy_bytes_per_s: float


class Words(Protocol):
    """What a claim is settled over. What was shown is visible to all once `show` returns."""

    def show(self, demand: float, claim: float) -> None:
        """Show this member's demand and claim."""
        ...

    def others(self) -> Sequence[Shown]:
        """What the other living members show now; one after another, no snapshot."""
        ...


def fair_shares(wants: Sequence[float], total: float) -> tuple[float, ...]:
    """Max-min fair shares of `total`: nobody gets more than it wants, the rest is shared evenly.

    The result depends on the wants as a set: members that see the same ones agree to the last bit.
    A want may be infinite.
    """
    left, level = total, math.inf
    for place, want in enumerate(sorted(wants)):
        even = left / (len(wants) - place)
        if want >= even:
            level = even
            break
        left -= want
    return tuple(min(want, level) for want in wants)


def allocate(demands: Sequence[float], capacity_bytes_per_s: float) -> tuple[float, ...]:
    """The share of every member of a bus, in bytes/s: fair shares of 95% of its capacity.

    Raises:
        InputError: a demand is negative or not a number, or the capacity is no bandwidth.
    """
    if not 0 < capacity_bytes_per_s < math.inf:
        raise InputError(
            f"the capacity of a bus must be a bandwidth above 0, got {capacity_bytes_per_s}",
            field="capacity_bytes_per_s",
        )
    for demand in demands:
        if not demand >= 0:
            raise InputError(f"a demand must be 0 or more, got {demand}", field="demands")
    return fair_shares(demands, SHARED * capacity_bytes_per_s)


class Claim:
    """One member's claim on the bus.

    Args:
        lifetime_s: in which it gives the whole bus back, while it still wants it; 0 is at once.

    Attributes:
        in_use: bytes/s that it claims now; never above what it shows.
    """

    def __init__(self, lifetime_s: float = 0.0) -> None:
        self.in_use = 0.0
        self._lifetime_s = lifetime_s
        self._capacity = math.inf
        self._ticked_s = math.inf

    def tick(self, words: Words, demand: float, capacity_bytes_per_s: float, now_s: float) -> Grant:
        """Show `demand` and settle what this member may use from now on.

        Raises:
            InputError: see `allocate`.
        """
        words.show(demand, self.in_use)
        others = words.others()
        wanted = [demand, *(other.demand for other in others)]
        target = allocate(wanted, capacity_bytes_per_s)[0]
        target = max(target, min(demand, self._kept(capacity_bytes_per_s, now_s)))
        if target > self.in_use:
            words.show(demand, target)  # before looking: whoever raises after this sees it
            others = words.others()
            free = SHARED * capacity_bytes_per_s - sum(other.claim for other in others)
            target = max(self.in_use, min(target, free))
        self.in_use = target
        words.show(demand, target)
        return _grant(demand, target, others, capacity_bytes_per_s)

    def _kept(self, capacity: float, now_s: float) -> float:
        """What is left by now of a claim that others want back; a slower bus shrinks all alike."""
        passed_s, self._ticked_s = max(0.0, now_s - self._ticked_s), now_s
        shrunk, self._capacity = min(1.0, capacity / self._capacity), capacity
        if not self._lifetime_s:
            return 0.0
        return self.in_use * shrunk - capacity * passed_s / self._lifetime_s


def _grant(demand: float, own: float, others: Sequence[Shown], capacity: float) -> Grant:
    claims = [other.claim for other in others if other.claim > 0]
    even = capacity / (1 + len(claims))
    left = capacity - sum(claims)
    usable = max(own, left - (1 - SHARED) * capacity, min(demand, SHARED * even))
    # A bus serves copies that overlap evenly: none is slower than its part of the bus.
    return Grant(own, usable, max(own, left, even))


class Vitals:
    """Who lives, as one member sees it: from counters that the living keep turning, and locks.

    A verdict holds for one reading of the counter. A member that turns it again lives again, and
    so does one that takes over a dead one's place: nobody's claim is ever overlooked. A reading
    of 0 is an empty place.

    Args:
        patience_s: a counter that stands still for so long is a dead member's.
    """

    _LEAST_LOOKS = 3  # one look after a clock has jumped must not be enough

    def __init__(self, patience_s: float = 1.0) -> None:
        self._patience_s = patience_s
        self._still: dict[int, tuple[int, float, int]] = {}  # place: reading, since, looks
        self._dead: dict[int, int] = {}  # place: reading

    def look(self, beats: Sequence[int], held: Sequence[bool], now_s: float) -> None:
        """Judge every place by its counter and whether its lock is held; now and then."""
        for place, beat in enumerate(beats):
            before, since_s, looks = self._still.get(place, (0, now_s, 0))
            if beat != before:
                since_s, looks = now_s, 0
            self._still[place] = (beat, since_s, looks + 1)
            still = looks >= self._LEAST_LOOKS and now_s - since_s > self._patience_s
            if beat and (still or not held[place]):
                self._dead[place] = beat

    def living(self, beats: Sequence[int]) -> list[int]:
        """The places of living members."""
        dead = self._dead
        return [place for place, beat in enumerate(beats) if beat and dead.get(place) != beat]
