"""Who goes first: class priority within shares, then earliest deadline, then fair in tokens.

A tenant far ahead of the least served one is above its share and yields to everybody who is not.
Waiting lifts a request by one class per `patience_s`, so that nobody waits for ever. Fairness is
counted in weighted tokens per tenant. Source: the Virtual Token Counter, arXiv 2401.00588.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

INPUT_WEIGHT = 1.0  # of a prompt token, as in the paper
OUTPUT_WEIGHT = 2.0  # of an output token: it takes a whole step
_MOST_QUANTA = 1 << 40
_LEAST = (False, 0.0)  # standing of a tenant that nobody counted yet

Lane = tuple[bool, int]
ServiceKey = tuple[bool, int, int, float, float]


@dataclass(frozen=True, slots=True)
class ServicePolicy:
    """The constants of the order.

    Attributes:
        quantum_s: deadlines in the same quantum count as equal, and fairness decides.
        patience_s: waiting as long lifts a request by one class.
        overtaken_s: one that is due later lets smaller ones pass while it does not fit.
        share_tokens: weighted tokens ahead of the least served tenant that are still within a
            tenant's share.
    """

    quantum_s: float
    patience_s: float
    overtaken_s: float
    share_tokens: float


class Served(Protocol):
    """What the order looks at; see `RequestFacts`."""

    @property
    def tenant(self) -> str: ...  # noqa: D102
    @property
    def priority(self) -> int: ...  # noqa: D102
    @property
    def waited_s(self) -> float: ...  # noqa: D102
    @property
    def slack_s(self) -> float: ...  # noqa: D102
    @property
    def arrived_s(self) -> float: ...  # noqa: D102


AnyServed = TypeVar("AnyServed", bound=Served)


class ServiceOrder:
    """The order at one moment, as a sort key: the smallest goes first.

    Args:
        levels: weighted tokens served so far, of every tenant with a live request.
    """

    def __init__(self, policy: ServicePolicy, levels: Mapping[str, float]) -> None:
        self._quantum_s, self._patience_s = policy.quantum_s, policy.patience_s
        least = min(levels.values(), default=0.0)
        self._standings = {
            tenant: (level - least > policy.share_tokens, level - least)
            for tenant, level in levels.items()
        }

    def above_share(self, tenant: str) -> bool:
        """Whether the tenant has had more than its share."""
        return self._standings.get(tenant, _LEAST)[0]

    def rank(self, request: Served) -> int:
        """Its class, lifted by the time it waited."""
        return request.priority + int(request.waited_s / self._patience_s)

    def below(self, requests: Iterable[AnyServed], rank: int) -> list[AnyServed]:
        """Those of a lower rank."""
        patience_s = self._patience_s
        return [
            each
            for each in requests
            if each.priority < rank and each.priority + int(each.waited_s / patience_s) < rank
        ]

    def has_below(self, requests: Iterable[Served], rank: int) -> bool:
        """Whether any is of a lower rank."""
        return any(each.priority < rank and self.rank(each) < rank for each in requests)

    def lane(self, request: Served) -> Lane:
        """The first parts of its key: whether its tenant is above its share, and its rank."""
        above_share, _ = self._standings.get(request.tenant, _LEAST)
        rank, waited_s = request.priority, request.waited_s
        if waited_s >= self._patience_s:
            rank += int(waited_s / self._patience_s)
        return above_share, -rank

    def key(self, request: Served) -> ServiceKey:
        """Sorts requests into the order of service; equals stay in the order given."""
        above_share, ahead = self._standings.get(request.tenant, _LEAST)
        rank, waited_s = request.priority, request.waited_s
        if waited_s >= self._patience_s:
            rank += int(waited_s / self._patience_s)
        # Late is late: among those who missed their deadline, fairness decides at once.
        quanta = request.slack_s / self._quantum_s
        if quanta > _MOST_QUANTA:
            quanta = _MOST_QUANTA
        return above_share, -rank, int(quanta) if quanta > 0 else -1, ahead, request.arrived_s

    def first_to_last(self, requests: Iterable[AnyServed]) -> Iterator[AnyServed]:
        """In the order of service, sorted no further than one looks."""
        lanes = self._by_lane(requests)
        for lane in sorted(lanes):
            yield from sorted(lanes[lane], key=self.key)

    def last_to_first(self, requests: Iterable[AnyServed]) -> Iterator[AnyServed]:
        """The other way round."""
        lanes = self._by_lane(requests)
        for lane in sorted(lanes, reverse=True):
            yield from sorted(lanes[lane], key=self.key)[::-1]

    def _by_lane(self, requests: Iterable[AnyServed]) -> dict[Lane, list[AnyServed]]:
        lanes: dict[Lane, list[AnyServed]] = defaultdict(list)
        for request in requests:
            lanes[self.lane(request)].append(request)
        return lanes


class TenantLedger:
    """The virtual token counters of all tenants."""

    def __init__(self) -> None:
        self._weights: dict[str, float] = {}
        self._live: Counter[str] = Counter()
        self._levels: dict[str, float] = {}
        self._floor = 0.0  # the least level when somebody was last active

    def join(self, tenant: str, weight: float = 1.0) -> None:
        """A request of the tenant arrived; from now on its tokens count by `weight`.

        A tenant that was away is lifted to the least level of the active ones: idling earns no
        credit.
        """
        self._weights[tenant] = weight
        if not self._live[tenant]:
            level = max(self._levels.get(tenant, 0.0), self._least())
            self._levels[tenant] = level
        self._live[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A request of the tenant ended."""
        self._floor = self._least()
        self._live[tenant] -= 1
        if self._live[tenant]:
            return
        del self._live[tenant], self._weights[tenant]
        if not self._live:
            self._floor = self._levels[tenant]
        floor = self._least()
        self._levels = {
            name: level
            for name, level in self._levels.items()
            if name in self._live or level > floor  # the others would be lifted anyway
        }

    def charge(self, tenant: str, tokens: float) -> None:
        """The tenant was served weighted `tokens`."""
        self._levels[tenant] += tokens / self._weights[tenant]

    def levels(self) -> dict[str, float]:
        """Of the tenants with live requests."""
        return {tenant: self._levels[tenant] for tenant in self._live}

    def _least(self) -> float:
        return min((self._levels[tenant] for tenant in self._live), default=self._floor)
