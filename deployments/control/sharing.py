"""Quotas over several ingresses: each reports what it is asked for, and computes its own part.

All parts follow from the same reports, by way of the controller's snapshots. While it is away,
nobody knows what the others are asked for: each then keeps to an even part of every quota, so that
the sum still holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from deployments.control.cache import SnapshotCache
from deployments.control.messages import IngressReport
from deployments.tenants.charges import Demand, Quotas

_STALE_S = 3.0
_UNKNOWN = Demand(math.inf, math.inf)


class SharedQuotas:
    """An ingress' quotas, and its part in sharing them.

    Args:
        ingress: its name, which no other has.
        cache: where the others' reports arrive.
        clock: seconds that only grow.

    Attributes:
        quotas: what requests are charged to.
    """

    def __init__(
        self, ingress: str, cache: SnapshotCache, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.quotas = Quotas(self._others, clock)
        self._ingress = ingress
        self._cache = cache

    def report(self, sequence: int) -> IngressReport:
        """What this ingress is asked for, as it stands."""
        return IngressReport(self._ingress, sequence, time.time(), self.quotas.demands())

    def _others(self, tenant: str) -> Sequence[Demand]:
        asked = self._cache.demands(tenant, but=self._ingress)
        age_s = self._cache.age_s
        if age_s is not None and age_s > _STALE_S:
            return [_UNKNOWN] * len(asked)
        return [Demand(*each) for each in asked]
