"""What a bus can carry, from what its members' copies saw.

A copy that shares the bus with others runs at a part of its bandwidth, so what it saw counts for
as much more as members were copying beside it. Each member keeps the median of its last second:
one copy that stalls, or a time that cannot be, moves it nowhere, and a bus that really is slower
is found within a second. The bus's capacity is the median of what its members found.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

_WINDOW_S = 1.2  # of sightings that count
_LEAST_SIGHTINGS = 5  # however old: slow iterations are few
_STEADY = 0.03  # a found capacity stays until it is off by this share


def copying_beside(shares: Iterable[float]) -> float:
    """The mean part of the bus that a copy gets beside others.

    It is the mean of 1 / (1 + n), where each of the others copies for its share of the time, on
    its own: n of them at a time.
    """
    chances = [1.0]  # of n others copying
    for share in shares:
        chances = [
            among * (1 - share) + more * share
            for among, more in zip([*chances, 0.0], [0.0, *chances], strict=True)
        ]
    return sum(chance / (1 + n) for n, chance in enumerate(chances))


def combined(found: Sequence[float], last: float) -> float:
    """The bus's capacity from what each member that copies has found; `last` where none does."""
    return statistics.median(found) if found else last


class Sightings:
    """One member's sightings of the bus's bandwidth."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=256)  # when, capacity
        self._found = 0.0

    def add(self, seen_bytes_per_s: float, beside: Iterable[float], now_s: float) -> bool:
        """Copies saw this bandwidth while others copied for these shares of the time.

        Returns False, and forgets it, where it is no bandwidth.
        """
        if not 0 < seen_bytes_per_s < math.inf:
            return False
        while len(self._seen) >= _LEAST_SIGHTINGS and self._seen[0][0] < now_s - _WINDOW_S:
            self._seen.popleft()
        self._seen.append((now_s, seen_bytes_per_s / copying_beside(beside)))
        middle = statistics.median(capacity for _, capacity in self._seen)
        if abs(middle - self._found) > _STEADY * self._found:
            self._found = middle
        return True

    def capacity(self, now_s: float) -> float | None:
        """What was found, in bytes/s; None where too little was seen, or nothing lately."""
        if len(self._seen) < _LEAST_SIGHTINGS or now_s - self._seen[-1][0] > 2 * _WINDOW_S:
            return None
        return self._found
