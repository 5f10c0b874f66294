"""A replica that is lent host memory: what it says, what it takes and when it answers."""

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from standins import soon

from deployments.control.lessee import HostLessee
from deployments.control.memory import Lent, ReplicaMemory
from deployments.control.messages import Receipt
from select_n_core.decisions.lease import Ladder
from select_n_core.decisions.orders import Order
from select_n_core.engine.messages import EngineStats
from select_n_core.errors import HostMemoryError
from select_n_core.memory.ledger import Holder, Ledger, Pin

UNIT = 4000
PAGE = 4096
LADDER = Ladder(1, (UNIT,) * 4, (0.0, 2.0, 4.0, 6.0, 8.0), host_kv_bytes=100, tokens=100)


class Engine:
    """An engine's lease; a test says when what is revoked is free."""

    def __init__(self) -> None:
        self.now = EngineStats(
            lease_bytes=UNIT, host_bytes=UNIT, mirrored=1, reserved_bytes=2 * PAGE
        )
        self.asked: list[tuple[str, int]] = []
        self.refusal: HostMemoryError | None = None
        self.gives_back = asyncio.Event()
        self.gives_back.set()
        self.is_late = False

    def stats(self) -> EngineStats:
        return self.now

    async def offer(self, nbytes: int, valid_until_s: float = 0.0) -> None:
        self.asked.append(("offer", nbytes))
        if self.refusal:
            raise self.refusal
        self.has(self.now.lease_bytes + nbytes)

    async def revoke(self, nbytes: int, deadline_s: float) -> None:
        self.asked.append(("revoke", nbytes))
        if self.refusal:
            raise self.refusal
        self.now = replace(self.now, lease_bytes=self.now.lease_bytes - nbytes)
        if self.is_late:
            raise HostMemoryError("still in use")
        await self.gives_back.wait()
        self.has(self.now.lease_bytes)

    def has(self, nbytes: int) -> None:
        self.now = replace(self.now, lease_bytes=nbytes, host_bytes=nbytes, mirrored=nbytes // UNIT)


class Domain:
    """A ledger in which the engine holds what it mirrors."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.readings = 0
        self.broken: Exception | None = None

    def read(self) -> Ledger:
        self.readings += 1
        if self.broken:
            raise self.broken
        mirrors = self._engine.now.host_bytes // UNIT
        pins = {f"f{unit}": Pin(what=f"unit {unit}", nbytes=PAGE) for unit in range(mirrors)}
        held = Holder(place=1, name="m", pid=7, group="g", floor_bytes=2 * PAGE, pins=pins)
        empty = Holder(place=2, name="its actor", pid=8)
        return Ledger(capacity_bytes=100 * PAGE, budget_bytes=50 * PAGE, holders=(held, empty))


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def domain(engine) -> Domain:
    return Domain(engine)


@pytest.fixture
def lessee(engine, domain) -> HostLessee:
    return HostLessee("m", engine, LADDER, "g", 1.0, domain="d", read=domain.read)


@asynccontextmanager
async def running(lessee: HostLessee):
    task = asyncio.create_task(lessee.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()


async def says(lessee: HostLessee, **facts: object) -> ReplicaMemory:
    """Wait until what is to be reported has these facts."""

    async def is_said() -> bool:
        memory = lessee.memory
        return memory is not None and all(
            getattr(memory, name) == value for name, value in facts.items()
        )

    await soon(is_said)
    assert lessee.memory is not None
    return lessee.memory


def order(number: int, mirrors: int, *, epoch: int = 1, ttl_s: float = 60.0, **facts) -> Lent:
    """An order to have so many mirrors; the engine has one."""
    nbytes = facts.pop("nbytes", (mirrors - 1) * PAGE)
    valid_until_s = time.monotonic() + ttl_s
    told = Order("d/g", epoch, number, nbytes, mirrors - 1, 1.0, valid_until_s)
    return Lent(told, mirrors, facts.pop("writes", True))


def receipt(*lent: Lent, epoch: int = 1, **facts) -> Receipt:
    return Receipt(epoch, lent=lent, **facts)


async def test_it_says_what_it_holds_and_what_the_ledger_says(lessee):
    async with running(lessee):
        memory = await says(lessee, answered=0)
    assert (memory.group, memory.k_min, memory.epoch, memory.priority) == ("g", 1, 0, 0)
    assert (memory.floor_bytes, memory.host_kv_bytes) == (2 * PAGE, PAGE)
    assert [rung.nbytes for rung in memory.rungs] == [PAGE] * 3
    assert memory.reserved_bytes == 2 * PAGE
    ledger = memory.ledger
    assert (ledger.domain, ledger.limit_bytes) == ("d", 50 * PAGE)
    assert dict(ledger.held_bytes) == {"g": PAGE, "place 2": 0}
    assert [each.name for each in ledger.holders] == ["m"]


async def test_a_grant_is_taken_and_answered_with_a_reading_that_shows_it(lessee, engine):
    async with running(lessee):
        await says(lessee, answered=0)
        lessee.hear(receipt(order(1, 3)))
        memory = await says(lessee, answered=1)
    assert engine.asked == [("offer", 2 * UNIT)]
    assert memory.epoch == 1
    assert memory.ledger.held_bytes["g"] == 3 * PAGE


async def test_an_order_that_is_told_again_is_followed_once(lessee, engine):
    async with running(lessee):
        grant = receipt(order(1, 3))
        for _ in range(3):
            lessee.hear(grant)
        await says(lessee, answered=1)
        lessee.hear(grant)
    assert engine.asked == [("offer", 2 * UNIT)]


async def test_a_grant_that_comes_too_late_or_is_refused_is_answered_all_the_same(lessee, engine):
    async with running(lessee):
        lessee.hear(receipt(order(1, 3, ttl_s=0.0)))
        await says(lessee, answered=1)
        assert engine.asked == []
        engine.refusal = HostMemoryError("others were quicker")
        lessee.hear(receipt(order(2, 3)))
        await says(lessee, answered=2)
    assert engine.now.lease_bytes == UNIT


async def test_a_revocation_is_answered_when_the_bytes_are_free(lessee, engine):
    engine.has(4 * UNIT)
    engine.gives_back.clear()
    async with running(lessee):
        lessee.hear(receipt(order(1, 2, nbytes=-2 * PAGE)))
        memory = await says(lessee, epoch=1)
        assert memory.answered == 0
        engine.gives_back.set()
        memory = await says(lessee, answered=1)
    assert engine.asked == [("revoke", 2 * UNIT)]
    assert memory.ledger.held_bytes["g"] == 2 * PAGE


async def test_a_late_revocation_is_answered_when_the_bytes_follow(lessee, engine, domain):
    engine.has(4 * UNIT)
    engine.is_late = True
    async with running(lessee):
        lessee.hear(receipt(order(1, 2, nbytes=-2 * PAGE)))

        async def is_lowered() -> bool:
            return engine.now.lease_bytes == 2 * UNIT

        await soon(is_lowered)
        before = domain.readings

        async def is_read_again() -> bool:
            return domain.readings > before + 1

        await soon(is_read_again)
        assert lessee.memory.answered == 0
        engine.has(2 * UNIT)
        await says(lessee, answered=1)


async def test_the_floor_is_never_given_back(lessee, engine):
    engine.has(3 * UNIT)
    async with running(lessee):
        lessee.hear(receipt(order(1, 0, nbytes=-3 * PAGE)))
        await says(lessee, answered=1)
    assert engine.now.lease_bytes == UNIT


async def test_who_shares_and_does_not_write_only_takes_over_what_is_written(lessee, engine):
    async with running(lessee):
        lessee.hear(receipt(order(1, 3, writes=False)))
        await says(lessee, answered=1)
        assert engine.asked == []
        lessee.hear(receipt(Lent(None, 2, writes=False)))

        async def has_two() -> bool:
            return engine.now.lease_bytes == 2 * UNIT

        await soon(has_two)
        lessee.hear(receipt(Lent(None, 1, writes=False)))
    assert engine.asked == [("offer", UNIT)]


async def test_a_later_controller_is_heard_and_a_former_one_no_more(lessee, engine):
    async with running(lessee):
        lessee.hear(receipt(order(7, 2)))
        await says(lessee, epoch=1, answered=7)
        lessee.hear(receipt(epoch=2))
        await says(lessee, epoch=2, answered=0)
        lessee.hear(receipt(order(8, 4)))
        lessee.hear(receipt(order(1, 3, epoch=2), epoch=2))
        await says(lessee, epoch=2, answered=1)
    assert engine.now.lease_bytes == 3 * UNIT


async def test_what_a_succeeded_controller_says_is_not_followed(lessee, engine):
    lessee.hear(receipt(order(1, 3), refused=("m",)))
    async with running(lessee):
        await says(lessee, epoch=0)
    assert engine.asked == []


async def test_a_ledger_that_cannot_be_read_is_read_again_later(lessee, domain, caplog):
    domain.broken = HostMemoryError("somebody keeps it locked")
    async with running(lessee):

        async def is_tried_again() -> bool:
            return domain.readings > 2

        await soon(is_tried_again)
        assert lessee.memory is None
        domain.broken = None
        await says(lessee, answered=0)
    assert "somebody keeps it locked" in caplog.text
