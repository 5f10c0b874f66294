"""A replica's end of the lending of host memory: it says what it holds, and follows orders.

What it says of itself is as of one reading of its domain's ledger. Orders are followed one at a
time and answered when they are done: a grant as soon as room for it is kept or was refused, a
revocation when the bytes are free, however late. While the controller is away, what is held stays.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol

from deployments.control.backoff import Backoff
from deployments.control.demand import Demand
from deployments.control.memory import HolderReading, LedgerReading, Lent, ReplicaMemory
from deployments.control.messages import Receipt
from select_n_core.decisions.lease import Ladder
from select_n_core.decisions.orders import Fence, Order, is_void
from select_n_core.engine.messages import EngineStats
from select_n_core.errors import HostMemoryError
from select_n_core.memory.domain import find_domain
from select_n_core.memory.ledger import Ledger
from select_n_core.memory.ledger_file import LedgerReader
from select_n_core.memory.room import runtime_directory

_LOOK_S = 0.1  # between two readings of the ledger, and two looks at the load
_RECHECK_S = 0.5  # a dead holder is noticed so late where nobody else wrote

_log = logging.getLogger(__name__)


class LeasedEngine(Protocol):
    """What is asked of an engine's client; see `select_n_core.engine.client.EngineClient`."""

    def stats(self) -> EngineStats:
        """See `EngineClient.stats`."""
        ...

    async def offer(self, nbytes: int, valid_until_s: float = math.inf) -> None:
        """See `EngineClient.offer`."""
        ...

    async def revoke(self, nbytes: int, deadline_s: float) -> None:
        """See `EngineClient.revoke`."""
        ...


class HostLessee:
    """The host memory of one replica, as it is lent.

    Args:
        name: of the model, for the log.
        client: the started engine's.
        ladder: of its plan. group: see `ReplicaMemory`.
        ttft_s: the model's target.
        domain: names its ledger.
        read: that domain's ledger; called in a thread, never twice at a time.
        clock: the machine's monotonic one, by which orders end.
    """

    def __init__(
        self,
        name: str,
        client: LeasedEngine,
        ladder: Ladder,
        group: str,
        ttft_s: float,
        *,
        domain: str,
        read: Callable[[], Ledger],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._client = client
        self._ladder = ladder
        self._group = group
        self._demand = Demand(ladder, ttft_s)
        self._domain = domain
        self._read = read
        self._clock = clock
        self._fence = Fence()
        self._answered = 0
        self._memory: ReplicaMemory | None = None
        self._news = asyncio.Event()
        self._obeying: asyncio.Task[None] | None = None
        self._late: Order | None = None  # a revocation whose deadline was missed

    @classmethod
    def here(
        cls, name: str, client: LeasedEngine, ladder: Ladder, group: str, ttft_s: float
    ) -> HostLessee:
        """In the domain of this process, which is its engine's too."""
        domain, directory = find_domain(), runtime_directory()
        reader = LedgerReader(domain, directory, recheck_s=_RECHECK_S)
        # Containers under one limit that do not share the folder keep a ledger each.
        found = directory.stat()
        told = f"{domain.id}-{found.st_dev:x}-{found.st_ino:x}"
        return cls(name, client, ladder, group, ttft_s, domain=told, read=reader.read)

    @property
    def memory(self) -> ReplicaMemory | None:
        """What is to be reported; None before the ledger was read."""
        return self._memory

    def hear(self, receipt: Receipt) -> None:
        """Follow what a report was answered with, in the background."""
        if receipt.refused:
            return
        if receipt.epoch > self._fence.epoch:
            self._fence, self._answered = self._fence.seen(receipt.epoch), 0
            self._news.set()
        for lent in receipt.lent:
            if lent.order is None:
                self._follow(lent.mirrors)
            elif self._fence.admits(lent.order):
                self._fence = self._fence.after(lent.order)
                self._start(self._obey(lent.order, lent))

    async def run(self) -> None:
        """Read the ledger and look at the load until cancelled."""
        backoff = Backoff(f"readings of the ledger of {self._domain}")
        try:
            while True:
                self._news.clear()
                try:
                    await self._look()
                    backoff.worked()
                except Exception as error:
                    await asyncio.sleep(backoff.failed(error))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._news.wait()
        finally:
            if self._obeying is not None:
                self._obeying.cancel()

    async def _look(self) -> None:
        if self._late is not None and self._is_free():
            self._answer(self._late)
        # Before the reading: what is answered stands in it, and what was written by then.
        epoch, answered, read_s = self._fence.epoch, self._answered, self._clock()
        ledger = await asyncio.to_thread(self._read)
        stats, ladder = self._client.stats(), self._ladder
        self._demand.saw(read_s, stats)
        self._memory = ReplicaMemory(
            group=self._group,
            priority=self._demand.priority,
            k_min=ladder.k_min,
            floor_bytes=ladder.floor_bytes,
            host_kv_bytes=ladder.host_kv_pages,
            rungs=self._demand.rungs,
            reserved_bytes=stats.reserved_bytes,
            epoch=epoch,
            answered=answered,
            ledger=reading_of(self._domain, ledger, read_s),
        )

    def _start(self, obey: Coroutine[Any, Any, None]) -> None:
        if self._obeying is not None:
            self._obeying.cancel()
        self._obeying = asyncio.create_task(obey)
        self._obeying.add_done_callback(self._log_failure)

    def _follow(self, mirrors: int) -> None:
        """Take over what others of the group have written, unless an order is under way."""
        is_busy = self._obeying is not None and not self._obeying.done()
        if is_busy or self._late is not None or mirrors <= self._client.stats().mirrored:
            return
        if self._missing_bytes(mirrors) > 0:
            self._start(self._raise(mirrors, math.inf))

    async def _obey(self, order: Order, lent: Lent) -> None:
        self._late = None
        if order.nbytes < 0:
            await self._lower(lent.mirrors, order.within_s)
            if not self._is_free():
                self._late = order
                return
        elif lent.writes and not is_void(order, self._clock()):
            await self._raise(lent.mirrors, order.valid_until_s)
        self._answer(order)

    def _answer(self, order: Order) -> None:
        self._late = None
        if order.epoch == self._fence.epoch:
            self._answered = order.number
            self._news.set()

    def _is_free(self) -> bool:
        """Whether mirrors take no more than the lease."""
        stats = self._client.stats()
        return stats.host_bytes <= stats.lease_bytes

    async def _raise(self, mirrors: int, valid_until_s: float) -> None:
        missing_bytes = self._missing_bytes(mirrors)
        if missing_bytes <= 0:
            return
        try:
            await self._client.offer(missing_bytes, valid_until_s)
        except HostMemoryError as error:
            _log.warning("%s does not take what it was lent: %s", self._name, error)

    async def _lower(self, mirrors: int, within_s: float) -> None:
        mirrors = max(mirrors, self._ladder.k_min)
        try:
            # More than once where an offer was still under way.
            while (over_bytes := -self._missing_bytes(mirrors)) > 0:
                await self._client.revoke(over_bytes, within_s)
        except HostMemoryError as error:
            _log.warning("%s does not give back in time: %s", self._name, error)

    def _missing_bytes(self, mirrors: int) -> int:
        """What the lease lacks for so many mirrors, or, below zero, has beyond them."""
        return self._ladder.mirrored_bytes(mirrors) - self._client.stats().lease_bytes

    def _log_failure(self, obeyed: asyncio.Task[None]) -> None:
        if not obeyed.cancelled() and (error := obeyed.exception()) is not None:
            _log.error("%s did not follow an order: %r", self._name, error)


def reading_of(domain: str, ledger: Ledger, read_s: float) -> LedgerReading:
    """What others must know of a ledger."""
    return LedgerReading(
        domain=domain,
        read_s=read_s,
        limit_bytes=ledger.limit_bytes,
        held_bytes=ledger.held_bytes_by_group(),
        holders=tuple(
            HolderReading(
                each.name, each.group_id, each.floor_bytes, each.held_bytes, each.waiting_bytes
            )
            for each in ledger.holders
            if each.held_bytes or each.waiting_bytes or each.floor_bytes
        ),
    )
