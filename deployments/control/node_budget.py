"""The policy's host-memory budget, written into the ledger of the node that a replica runs on.

The ledger binds every engine of the node, whichever application started it; see
`select_n_core.memory.reservation`. A budget below what is pinned takes nothing away: no more is
pinned until that has gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from deployments.control.messages import Controller, Known, Receipt
from select_n_core.memory.domain import find_domain
from select_n_core.memory.reservation import Reservation

_log = logging.getLogger(__name__)


class NodeBudget:
    """Keeps the budget of this node's ledger at what the controller says.

    It holds a place in the ledger, and no bytes: a budget stands as long as anybody holds a place.

    Args:
        name: of the holder, for people.
        open_ledger: takes the place, in a thread.
    """

    def __init__(
        self,
        name: str,
        open_ledger: Callable[[str], Reservation] = lambda name: Reservation(find_domain(), name),
    ) -> None:
        self._name = name
        self._open_ledger = open_ledger
        self._ledger: Reservation | None = None
        self._budget: int | None = None

    async def ask(self, controller: Controller) -> None:
        """Take the budget over before anything is pinned, if there is a controller that answers."""
        try:
            changes = await controller.watch(Known(), 0.0)
        except Exception as error:
            _log.info("no host-memory budget before the first report: %r", error)
            return
        if changes.policy is not None:
            await self._take(changes.policy.budgets.host_memory)

    async def hear(self, receipt: Receipt) -> None:
        """Take over what a report was answered with; raises HostMemoryError where it cannot be."""
        if not receipt.refused:
            await self._take(receipt.host_memory)

    async def _take(self, budget: int | None) -> None:
        if budget == self._budget:
            return
        if self._ledger is None:
            self._ledger = await asyncio.to_thread(self._open_ledger, self._name)
        await asyncio.to_thread(self._ledger.set_budget, budget)
        self._budget = budget

    def close(self) -> None:
        """Give the place in the ledger back."""
        if self._ledger is not None:
            self._ledger.close()
