"""What a replica is asked for, in typical requests per second, and by which class of them.

Two views of it, of which the larger counts: what came lately, refused or not, and what it takes
to serve those that run and wait in the time they have.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from select_n_core.decisions.lease import Ladder
from select_n_core.decisions.loans import Rung
from select_n_core.engine.messages import EngineStats

_WINDOW_S = 1.0  # of arrivals
_MIX_S = 10.0  # of the classes among them
_MATERIAL = 0.1  # share by which a demand must change to count as another


class Demand:
    """The demand of one replica.

    Args:
        ladder: of its plan.
        ttft_s: who waits is to be let in within.
    """

    def __init__(self, ladder: Ladder, ttft_s: float) -> None:
        self._ladder = ladder
        self._ttft_s = ttft_s
        self._seen: deque[tuple[float, Mapping[int, int]]] = deque()
        self._offered_per_s = 0.0
        self._waiting_per_s = 0.0
        self._rungs = ladder.rungs(0.0)
        self._priority = 0

    @property
    def offered_per_s(self) -> float:
        """Typical requests per second; it stands until it has changed by a tenth."""
        return self._offered_per_s

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """What every mirror above the floor would be worth."""
        return self._rungs

    def saw(self, now_s: float, stats: EngineStats) -> None:
        """Note what the engine says, several times per second.

        Args:
            now_s: on a clock that only grows.
        """
        self._seen.append((now_s, stats.offered_tokens))
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - _MIX_S:
            self._seen.popleft()
        tokens, ladder = self._ladder.tokens, self._ladder
        came_per_s = sum(self._came(now_s - _WINDOW_S).values()) / tokens / _WINDOW_S
        running = max(stats.running, (stats.kv_tokens - stats.kv_free_tokens) / tokens)
        waiting_per_s = stats.waiting / self._ttft_s
        offered_per_s = max(came_per_s, running / ladder.lifetime_s + waiting_per_s)
        if _differ(offered_per_s, self._offered_per_s) or _differ(
            waiting_per_s, self._waiting_per_s
        ):
            self._offered_per_s, self._waiting_per_s = offered_per_s, waiting_per_s
            self._rungs = ladder.rungs(offered_per_s, waiting_per_s)
        self._priority = self._priority_of(self._came(now_s - _MIX_S))

    @property
    def priority(self) -> int:
        """Of the class that the first mirror above the floor would serve.

        The highest classes are served by the floor, as far as it goes. What all of them together
        leave of it is the lowest one's. While nobody comes it stays what it was.
        """
        return self._priority

    def _priority_of(self, came: Counter[int]) -> int:
        total, served_per_s, priority = came.total(), 0.0, self._priority
        for priority in sorted(came, reverse=True):
            served_per_s += self._offered_per_s * came[priority] / total
            if served_per_s > self._ladder.floor_rate_per_s:
                break
        return priority

    def _came(self, since_s: float) -> Counter[int]:
        """Tokens offered since then, by priority."""
        before = self._seen[0][1]
        for at_s, offered in self._seen:
            if at_s > since_s:
                break
            before = offered
        return Counter(self._seen[-1][1]) - Counter(before)


def _differ(one: float, other: float) -> bool:
    return abs(one - other) > _MATERIAL * max(one, other)
