"""Who gets how much of a domain's host memory: loans by marginal goodput under class priority.

Every holder has its floor. The rest is lent in rungs, one mirror each, to whom they bring the most
requests per second and byte; a higher class goes first. Who has a rung keeps it against anybody
whose gain is not clearly larger, so that memory does not move for noise.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

HYSTERESIS = 0.2  # a loan is worth so much more to whom it was made


class Rung(NamedTuple):
    """One mirror more: what it takes and the requests per second that it adds.

    Attributes:
        spare: it would add them only if more came than does; the gain is then a small part of
            that, so that memory which nobody needs is lent as well.
    """

    nbytes: int
    gain_per_s: float
    spare: bool = False


@dataclass(frozen=True, slots=True)
class Holder:
    """Who pins memory in a domain: a replica, or all that share their mirrors, as one.

    Attributes:
        id: of one life: who starts again has another one.
        priority: of its class; a larger one goes first.
        floor_bytes: what it cannot serve without.
        held_bytes: written down for it in the domain's file, its floor among them.
        rungs: every mirror above the floor, in the order in which they are pinned.
    """

    id: str
    priority: int
    floor_bytes: int
    held_bytes: int
    rungs: tuple[Rung, ...] = ()

    @property
    def wanted(self) -> int:
        """Rungs that it has a use for: up to the last one that gains anything."""
        return max((at for at, rung in enumerate(self.rungs, 1) if rung.gain_per_s > 0), default=0)

    @property
    def needed(self) -> int:
        """Rungs that it has a use for at the load there is."""
        needed = (
            at for at, rung in enumerate(self.rungs, 1) if rung.gain_per_s > 0 and not rung.spare
        )
        return max(needed, default=0)

    @property
    def lent(self) -> int:
        """Rungs that it holds whole."""
        loan_bytes = self.held_bytes - self.floor_bytes
        return sum(top <= loan_bytes for top in accumulate(rung.nbytes for rung in self.rungs))

    def bytes_of(self, rungs: int) -> int:
        """The floor and so many rungs."""
        return self.floor_bytes + sum(rung.nbytes for rung in self.rungs[:rungs])


class _Bundle(NamedTuple):
    """Rungs of one holder that are only worth their bytes together; the best is the smallest."""

    rank: tuple[int, float, int]  # class, then gain per byte, both negative; then who
    upto: int
    nbytes: int


def share_out(
    capacity_bytes: int, holders: Sequence[Holder], hysteresis: float = HYSTERESIS
) -> tuple[int, ...]:
    """The rungs that each holder should have, beyond the floors; all fit the capacity.

    What somebody wants and nobody else does is lent. Where the floors alone do not fit, nobody
    gets any.
    """
    left = capacity_bytes - sum(each.floor_bytes for each in holders)
    rungs = [0] * len(holders)
    bundles = [_bundles(each, index, hysteresis) for index, each in enumerate(holders)]
    heap = [first for each in bundles if (first := next(each, None)) is not None]
    heapq.heapify(heap)
    kept: list[_Bundle] = []
    while heap:
        bundle = heapq.heappop(heap)
        if bundle.nbytes > left:
            kept.append(bundle)  # its holder gets no more bundles, but maybe some rungs
            continue
        index = bundle.rank[2]
        left -= bundle.nbytes
        rungs[index] = bundle.upto
        if (following := next(bundles[index], None)) is not None:
            heapq.heappush(heap, following)
    for bundle in kept:
        index = bundle.rank[2]
        for rung in holders[index].rungs[rungs[index] : holders[index].wanted]:
            if rung.nbytes > left:
                break
            left -= rung.nbytes
            rungs[index] += 1
    return tuple(rungs)


def _bundles(holder: Holder, index: int, hysteresis: float) -> Iterator[_Bundle]:
    """The holder's wanted rungs in bundles of falling gain per byte: the gains' concave hull."""
    lent = holder.lent
    gains = [
        rung.gain_per_s * (1 + hysteresis if at < lent else 1)
        for at, rung in enumerate(holder.rungs)
    ]
    done = 0
    while done < holder.wanted:
        nbytes, gain = 0, 0.0
        best = (0.0, done, 0)
        for at in range(done, holder.wanted):
            nbytes += holder.rungs[at].nbytes
            gain += gains[at]
            if gain / nbytes > best[0]:
                best = (gain / nbytes, at + 1, nbytes)
        density, upto, nbytes = best
        yield _Bundle((-holder.priority, -density, index), upto, nbytes)
        done = upto
