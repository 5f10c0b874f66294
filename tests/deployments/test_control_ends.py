"""Both ends of the way to the controller, around a real state without Ray."""

import asyncio
import logging
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from reports import BASE
from standins import ScriptedEngine, args, replica, soon

from deployments.control.backoff import Backoff
from deployments.control.cache import SnapshotCache
from deployments.control.messages import IngressReport, Receipt, ReplicaReport
from deployments.control.node_budget import NodeBudget
from deployments.control.reporter import is_due, reporter_of_ingress, reporter_of_replica
from deployments.control.state import ClusterState
from select_n_core.errors import HostMemoryError, UnavailableError
from select_n_core.live import parse_policy
from select_n_core.memory.domain import Domain
from select_n_core.memory.reservation import Reservation

WHAT = ("reports", "snapshots")


class LocalController:
    """A controller in this process that can be taken away and come back as a later one."""

    def __init__(self) -> None:
        self.state: ClusterState | None = None
        self.reports = self.on_their_way = self.most_on_their_way = 0
        self.answers = asyncio.Event()
        self.answers.set()

    def start(self, epoch: int) -> None:
        self.state = ClusterState(epoch, time.monotonic)

    def _up(self) -> ClusterState:
        if self.state is None:
            raise ConnectionError("it is down")
        return self.state

    async def report(self, batch):
        self.reports += 1
        self.on_their_way += 1
        self.most_on_their_way = max(self.most_on_their_way, self.on_their_way)
        try:
            await self.answers.wait()
            return self._up().take(batch)
        finally:
            self.on_their_way -= 1

    async def watch(self, known, timeout_s):
        state = self._up()

        async def is_news() -> bool:
            return state is not self.state or known != state.snapshot().known

        await soon(is_news, timeout_s)
        return self._up().changes(known)


@asynccontextmanager
async def running(*ends):
    tasks = [asyncio.create_task(end.run()) for end in ends]
    try:
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()


class Facts:
    """A replica whose facts a test sets."""

    def __init__(self) -> None:
        self.now = replace(BASE, measured_at_s=1.0)

    def read(self, sequence: int) -> ReplicaReport:
        return replace(self.now, sequence=sequence)


@pytest.fixture
def controller():
    return LocalController()


@pytest.fixture
def facts():
    return Facts()


async def hears(cache: SnapshotCache, **wanted: object) -> None:
    """Wait until the cache has replica `a` with these facts."""

    async def is_heard() -> bool:
        replicas = {} if cache.snapshot is None else cache.snapshot.replicas
        return "a" in replicas and all(
            getattr(replicas["a"], name) == value for name, value in wanted.items()
        )

    await soon(is_heard)


async def test_what_a_replica_decides_reaches_the_cache(controller, facts):
    controller.start(1)
    cache = SnapshotCache(controller)
    async with running(reporter_of_replica(facts.read, controller), cache):
        for k in (8, 9, 3):
            facts.now = replace(facts.now, k=k)
            await hears(cache, k=k)
        assert cache.age_s < 5


def test_what_is_decided_leaves_at_once(facts):
    sent = facts.read(1)
    for decision in ({"k": 9}, {"lease_bytes": 1}, {"admitted": 4}, {"returned": {"ttft": 3}}):
        assert is_due(replace(sent, **decision), sent, 0.0), decision


def test_new_measurements_leave_twenty_times_a_second_and_a_sign_of_life_ten_times(facts):
    sent = facts.read(1)
    newer = replace(sent, measured_at_s=2.0, running=5)
    assert not is_due(newer, sent, 0.049)
    assert is_due(newer, sent, 0.051)
    idle = replace(sent, running=0)
    for report, before in ((sent, sent), (replace(idle, measured_at_s=2.0), idle)):
        assert not is_due(report, before, 0.099)
        assert is_due(report, before, 0.101)


async def test_one_report_at_most_is_on_its_way_and_what_changes_meanwhile_follows(
    controller, facts
):
    controller.start(1)
    controller.answers.clear()
    cache = SnapshotCache(controller)
    async with running(reporter_of_replica(facts.read, controller), cache):

        async def is_on_its_way() -> bool:
            return controller.on_their_way == 1

        await soon(is_on_its_way)
        for k in (9, 10, 3):
            facts.now = replace(facts.now, k=k)
        controller.answers.set()
        await hears(cache, k=3)
        assert controller.most_on_their_way == 1


async def test_a_controller_that_is_down_is_said_once_and_again_when_it_is_back(
    controller, facts, caplog
):
    caplog.set_level(logging.INFO, "deployments.control")

    def said() -> list[str]:
        return sorted(record.message for record in caplog.records)

    cache = SnapshotCache(controller)
    async with running(reporter_of_replica(facts.read, controller), cache):

        async def is_tried_again() -> bool:
            return controller.reports > 2

        await soon(is_tried_again)
        assert cache.snapshot is None
        assert cache.age_s is None
        down = [f"no {what} for now: ConnectionError('it is down')" for what in WHAT]
        assert said() == down
        controller.start(1)
        await hears(cache)
        assert said() == [*down, *(f"{what} again" for what in WHAT)]


def test_who_has_no_answer_waits_longer_and_longer_until_there_is_one():
    backoff = Backoff("reports")
    assert [backoff.failed(TimeoutError()) for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    backoff.worked()
    assert backoff.failed(TimeoutError()) == 0.1


def test_a_controller_that_nobody_deployed_is_no_reason_to_warn(caplog):
    caplog.set_level(logging.INFO, "deployments.control")
    backoff = Backoff("reports")
    for _ in range(2):
        assert backoff.failed(UnavailableError("there is no controller")) == 2.0
    [said] = caplog.records
    assert (said.levelname, said.message) == ("INFO", "no reports: there is no controller")


async def test_a_replica_that_cannot_be_read_does_not_end_its_reports(controller, facts):
    controller.start(1)
    broken = [RuntimeError("no statistics"), None]

    def read(sequence: int) -> ReplicaReport:
        if error := broken.pop(0) if broken else None:
            raise error
        return facts.read(sequence)

    cache = SnapshotCache(controller)
    async with running(reporter_of_replica(read, controller), cache):
        await hears(cache)


async def test_a_lost_controller_leaves_the_last_snapshot_and_a_later_one_replaces_it(
    controller, facts
):
    controller.start(1)
    cache = SnapshotCache(controller)
    async with running(reporter_of_replica(facts.read, controller), cache):
        await hears(cache)
        controller.state = None

        async def is_old() -> bool:
            return cache.age_s > 0.2

        await soon(is_old)
        assert cache.snapshot.epoch == 1
        controller.start(2)

        async def is_later() -> bool:
            return cache.snapshot.epoch == 2

        await soon(is_later)
        await hears(cache)


async def test_what_an_ingress_was_asked_for_reaches_the_others_and_not_itself(controller):
    def read(sequence: int) -> IngressReport:
        return IngressReport("here", sequence, 1.0, {"acme": (60.0, 6000.0)})

    controller.start(1)
    cache = SnapshotCache(controller)
    assert cache.demands("acme", but="elsewhere") == []
    async with running(reporter_of_ingress(read, controller), cache):

        async def is_heard() -> bool:
            return bool(cache.snapshot and cache.snapshot.ingresses)

        await soon(is_heard)
    assert cache.demands("acme", but="elsewhere") == [(60.0, 6000.0)]
    assert cache.demands("acme", but="here") == []
    assert cache.demands("nobody", but="elsewhere") == [(0.0, 0.0)]
    assert cache.snapshot.replicas == {}


def test_a_replica_reports_what_its_engine_says(text):
    engine = ScriptedEngine(text, "ok")
    served = replica(engine, text)
    [model] = args(link={"kind": "emulated", "bandwidth": "1GB/s", "bus": {"name": "b"}}).models
    report = ReplicaReport.of(served.report(), model, 7)
    assert (report.replica, report.model, report.bus, report.sequence) == (
        "replica-1",
        "tiny/model",
        "b",
        7,
    )
    assert (report.k, report.mirrored, report.lease_bytes, report.mirrored_bytes) == (10, 12, 2, 1)
    assert report.interval == 3
    assert (report.tpot_s, report.ttft_s) == (0.1, 2.0)
    assert time.time() - report.measured_at_s < 5  # nothing runs: what it said last still holds


async def test_a_replica_that_takes_no_more_calls_says_so_at_once(text):
    engine = ScriptedEngine(text, "ok")
    served = replica(engine, text)
    [model] = args().models
    before = ReplicaReport.of(served.report(), model, 1)
    await served.drain(0.0)
    after = ReplicaReport.of(served.report(), model, 2)
    assert (before.service.draining, after.service.draining) == (False, True)
    assert is_due(after, before, 0.0)


def test_latencies_follow_from_headroom_and_target():
    report = replace(BASE, tpot_headroom=0.25, ttft_headroom=-0.5, tpot_s=0.1, ttft_s=2.0)
    assert report.seen_tpot_s == pytest.approx(0.075)
    assert report.seen_ttft_s == pytest.approx(3.0)
    assert replace(report, tpot_headroom=None).seen_tpot_s is None


# The budget of a node's host memory.

NODE = Domain("test", 4 << 20, 2 << 20)


@pytest.fixture
def budget(tmp_path):
    kept = NodeBudget("actor", lambda name: Reservation(NODE, name, directory=tmp_path / "run"))
    yield kept
    kept.close()


@pytest.fixture
def engine_ledger(tmp_path):
    reservation = Reservation(NODE, "engine", directory=tmp_path / "run")
    yield reservation
    reservation.close()


def budget_of(nbytes: int | None):
    return parse_policy({"budgets": {"host_memory": nbytes and f"{nbytes >> 10}KiB"}})


async def test_a_budget_binds_engines_before_they_start_and_follows_the_policy(
    controller, facts, budget, engine_ledger
):
    controller.start(1)
    controller.state.set_policy(budget_of(1 << 20))
    await budget.ask(controller)
    with pytest.raises(HostMemoryError, match="1 MiB"):
        engine_ledger.set_aside((1 << 20) + 4096)
    async with running(reporter_of_replica(facts.read, controller, budget.hear)):
        for nbytes, limit in ((512 << 10, 512 << 10), (None, NODE.capacity_bytes)):
            controller.state.set_policy(budget_of(nbytes))

            async def is_bound(limit=limit) -> bool:
                facts.now = replace(facts.now, admitted=facts.now.admitted + 1)
                return engine_ledger.ledger().limit_bytes == limit

            await soon(is_bound)
    engine_ledger.set_aside(NODE.capacity_bytes)


async def test_without_a_controller_a_node_has_all_it_has(controller, budget, engine_ledger):
    await budget.ask(controller)
    engine_ledger.set_aside(NODE.capacity_bytes)


async def test_what_a_succeeded_controller_says_binds_nobody(budget, engine_ledger):
    await budget.hear(Receipt(1, host_memory=4096))
    await budget.hear(Receipt(1, refused=("a",), host_memory=None))
    assert engine_ledger.ledger().limit_bytes == 4096
