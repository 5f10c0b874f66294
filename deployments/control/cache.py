"""An ingress' end: the latest snapshot in memory, kept fresh by one long poll."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from deployments.control.backoff import Backoff
from deployments.control.messages import Changes, Controller, Known, Snapshot

_POLL_S = 10.0
_GAP_S = 0.03  # between two polls: reports that come meanwhile arrive together


class SnapshotCache:
    """The cluster as last heard of; whoever decides reads it and never waits.

    While the controller is gone the last snapshot stays, and `age_s` grows.

    Args:
        controller: it may be absent or down for any time.
    """

    def __init__(
        self, controller: Controller, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._controller = controller
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._heard_s = 0.0

    @property
    def snapshot(self) -> Snapshot | None:
        """The latest one; None while no controller was ever heard."""
        return self._snapshot

    @property
    def age_s(self) -> float | None:
        """Seconds since the controller was last heard; None while it never was."""
        return None if self._snapshot is None else self._clock() - self._heard_s

    def demands(self, tenant: str, *, but: str) -> list[tuple[float, float]]:
        """What every living ingress but one was asked for in a tenant's name: see `IngressReport`.

        One that was asked for nothing is among them: it has its part of a quota too.
        """
        ingresses = {} if self._snapshot is None else self._snapshot.ingresses
        return [
            each.demands.get(tenant, (0.0, 0.0)) for name, each in ingresses.items() if name != but
        ]

    def take(self, changes: Changes) -> None:
        """What the controller said last."""
        self._snapshot = (self._snapshot or Snapshot(0, 0)).after(changes)
        self._heard_s = self._clock()

    async def run(self) -> None:
        """Watch until cancelled."""
        backoff = Backoff("snapshots")
        while True:
            known = Known() if self._snapshot is None else self._snapshot.known
            try:
                self.take(await self._controller.watch(known, _POLL_S))
                backoff.worked()
            except Exception as error:
                await asyncio.sleep(backoff.failed(error))
            await asyncio.sleep(_GAP_S)
