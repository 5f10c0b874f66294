"""The live policy as an ingress knows it: before the controller was heard, and while it is gone.

Where a controller belongs to the cluster, nobody is let in before it said who may come: an ingress
that starts while the controller is away must not open what was closed.
"""

from __future__ import annotations

import asyncio

from deployments.control.cache import SnapshotCache
from select_n_core.config import CONTROL_APPLICATION
from select_n_core.live import LivePolicy


class HeardPolicy:
    """The policy that was heard last; it outlives the controller.

    Args:
        cache: where snapshots arrive.
    """

    def __init__(self, cache: SnapshotCache) -> None:
        self._cache = cache
        self._last: LivePolicy | None = None

    def __call__(self) -> LivePolicy | None:
        """As of now; None while there is one that is not known."""
        snapshot = self._cache.snapshot
        if snapshot is not None and snapshot.policy is not None:
            self._last = snapshot.policy
        return self._last

    async def find_out(self) -> None:
        """Let everybody in if no controller belongs to the cluster; one that comes later counts."""
        if not await asyncio.to_thread(has_controller):
            self._last = LivePolicy()


def has_controller() -> bool:
    """Whether Serve was told to run one, whatever became of it; it blocks for a moment."""
    from ray import serve

    return CONTROL_APPLICATION in serve.status().applications
