"""Lending through the controller's state, on a virtual clock: reports in, what is lent out."""

from dataclasses import dataclass, field

import pytest
from clocks import Clock
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from reports import report

from deployments.control.lending import Lending
from deployments.control.memory import HolderReading, LedgerReading, Lent, ReplicaMemory
from deployments.control.messages import Changes, Known, Receipt, ReportBatch, Snapshot
from deployments.control.state import REPORT_TTL_S, ClusterState
from deployments.control.view import cluster_document
from select_n_core.decisions.loans import Rung
from select_n_core.decisions.orders import Fence, is_void
from select_n_core.live import parse_policy

MIRROR = 4096
CAPACITY = 16 * MIRROR
MACHINE_S = 5000.0  # the machine's clock is ahead of the controller's


class Machine:
    """A node's ledger: units by group and bytes beside them; it refuses what does not fit."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.replicas: dict[str, Replica] = {}
        self.strangers: list[HolderReading] = []
        self.most_used = 0

    @property
    def now_s(self) -> float:
        return MACHINE_S + self.clock.now_s

    def used(self) -> int:
        return sum(self.held().values())

    def held(self) -> dict[str, int]:
        held = {each.group: each.held_bytes for each in self.strangers}
        for group in {each.group for each in self.replicas.values()}:
            members = [each for each in self.replicas.values() if each.group == group]
            held[group] = MIRROR * max(each.mirrors for each in members)
        return held

    def fits(self) -> bool:
        self.most_used = max(self.most_used, self.used())
        return self.used() <= CAPACITY

    def read(self) -> LedgerReading:
        own = [
            HolderReading(each.name, each.group, MIRROR * each.floor, MIRROR * each.mirrors, 0)
            for each in self.replicas.values()
        ]
        return LedgerReading("d", self.now_s, CAPACITY, self.held(), (*own, *self.strangers))


@dataclass
class Replica:
    """A replica that follows what it is told at once, unless it is slow to give back."""

    machine: Machine
    name: str
    group: str
    gains: tuple[float, ...]
    floor: int = 1
    mirrors: int = 1
    priority: int = 0
    slow: bool = False
    fence: Fence = field(default_factory=Fence)
    answered: int = 0
    sequence: int = 0
    late: Lent | None = None
    took: list[int] = field(default_factory=list)

    def report(self):
        self.sequence += 1
        memory = ReplicaMemory(
            group=self.group,
            priority=self.priority,
            k_min=self.floor,
            floor_bytes=MIRROR * self.floor,
            host_kv_bytes=0,
            rungs=tuple(Rung(MIRROR, gain, spare=gain < 0.01) for gain in self.gains),
            reserved_bytes=MIRROR * self.mirrors,
            epoch=self.fence.epoch,
            answered=self.answered,
            ledger=self.machine.read(),
        )
        return report(
            self.name, self.sequence, model=self.group, mirrored=self.mirrors, memory=memory
        )

    def hear(self, receipt: Receipt) -> None:
        if receipt.epoch > self.fence.epoch:
            self.fence, self.answered = self.fence.seen(receipt.epoch), 0
        for lent in receipt.lent:
            if lent.order is None:
                if self.late is None and lent.mirrors > self.mirrors:
                    self.take_over(lent.mirrors)
                continue
            if not self.fence.admits(lent.order):
                continue
            self.fence = self.fence.after(lent.order)
            if lent.order.nbytes < 0 and self.slow:
                self.late = lent
                continue
            self.follow(lent)

    def take_over(self, mirrors: int) -> None:
        """What others have written: the ledger refuses what nobody has any more, and is full."""
        before, self.mirrors = self.mirrors, mirrors
        if self.machine.used() > CAPACITY:
            self.mirrors = before

    def follow(self, lent: Lent) -> None:
        if lent.order.nbytes < 0:
            self.mirrors = min(self.mirrors, lent.mirrors)
        elif lent.writes and not is_void(lent.order, self.machine.now_s):
            before, self.mirrors = self.mirrors, max(self.mirrors, lent.mirrors)
            self.took.append(self.mirrors - before)
            assert self.machine.fits(), "the ledger had to refuse what was lent"
        self.late, self.answered = None, lent.order.number

    def give_back(self) -> None:
        if self.late is not None:
            self.follow(self.late)


class World:
    """A controller, a machine and its replicas, which report ten times per second."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.machine = Machine(self.clock)
        self.state = ClusterState(1, self.clock)
        self.silent: set[str] = set()

    def add(self, name: str, *gains: float, group: str = "", **facts) -> Replica:
        replica = Replica(self.machine, name, group or name, gains, **facts)
        self.machine.replicas[name] = replica
        return replica

    def round(self, seconds: float = 0.1) -> None:
        self.clock.now_s += seconds
        for name, each in list(self.machine.replicas.items()):
            if name not in self.silent:
                batch = ReportBatch(each.fence.epoch, (each.report(),))
                each.hear(self.state.take(batch))
                assert self.machine.fits()
        self.state.expire()

    def rounds(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.1)):
            self.round()

    def mirrors(self) -> dict[str, int]:
        return {name: each.mirrors for name, each in self.machine.replicas.items()}

    def snapshot(self) -> Snapshot:
        return self.state.snapshot()


@pytest.fixture
def world() -> World:
    return World()


def test_memory_follows_the_load_from_one_model_to_the_other_within_three_seconds(world):
    one, other = world.add("one", *[9.0] * 14), world.add("other", *[0.0] * 14)
    world.rounds(5)
    assert world.mirrors() == {"one": 15, "other": 1}
    one.gains, other.gains = (0.0,) * 14, (9.0,) * 14
    world.rounds(3)
    assert world.mirrors() == {"one": 1, "other": 15}
    assert world.machine.most_used <= CAPACITY


def test_what_nobody_needs_is_lent_to_the_idle_and_taken_back_at_once(world):
    one, other = world.add("one", *[0.001] * 14), world.add("other", *[0.001] * 14)
    world.rounds(4)
    assert one.mirrors + other.mirrors == 16
    (domain,) = world.snapshot().memory
    assert {each.wanted_bytes for each in domain.holders} == {MIRROR}
    for loaded, wanted in ((one, 8), (one, 12), (one, 15)):
        loaded.gains = (1.0,) * (wanted - 1) + (0.001,) * (15 - wanted)
        world.rounds(0.4)
        assert loaded.mirrors >= wanted, "it waits for nothing to rest"
    assert other.mirrors == 1


def test_two_loaded_models_share_by_what_a_mirror_gains_each(world):
    world.add("one", 8.0, 4.0, 2.0, 1.0, *[0.5] * 10)
    world.add("other", 9.0, 7.0, 6.0, 5.0, 4.5, 4.2, 4.1, 4.05, 4.01, 3.9, 0.1)
    world.rounds(6)
    assert world.mirrors() == {"one": 5, "other": 11}


def test_the_policys_budget_is_the_capacity(world):
    world.add("one", *[9.0] * 14)
    world.state.set_policy(parse_policy({"budgets": {"host_memory": f"{6 * MIRROR}B"}}))
    world.rounds(4)
    assert world.mirrors() == {"one": 6}
    world.state.set_policy(parse_policy({"budgets": {"host_memory": f"{3 * MIRROR}B"}}))
    world.rounds(2)
    assert world.mirrors() == {"one": 3}
    world.state.set_policy(parse_policy({}))
    world.rounds(2)
    assert world.mirrors() == {"one": 15}


def test_replicas_that_share_their_mirrors_are_lent_to_as_one(world):
    first = world.add("first", *[1.0] * 6, group="shared")
    second = world.add("second", *[1.0] * 6, group="shared")
    world.add("alone", *[1.5] * 14)
    world.rounds(5)
    assert (first.mirrors, second.mirrors) == (7, 7), "together they gain 2 by a mirror"
    assert world.mirrors()["alone"] == 9
    assert second.took == [], "one writes, the others take over what it wrote"
    first.gains = second.gains = (0.1,) * 6
    world.rounds(3)
    assert world.mirrors() == {"first": 1, "second": 1, "alone": 15}


def test_a_group_has_answered_when_the_last_of_it_has(world):
    first = world.add("first", *[1.0] * 14, group="shared")
    second = world.add("second", *[1.0] * 14, group="shared")
    other = world.add("other", *[0.0] * 14)
    world.rounds(5)
    assert (first.mirrors, second.mirrors) == (15, 15)
    second.slow = True
    first.gains = second.gains = (0.0,) * 14
    other.gains = (1.0,) * 14
    world.rounds(4)
    assert (first.mirrors, second.mirrors, other.mirrors) == (1, 15, 1)
    (domain,) = world.snapshot().memory
    shared = next(each for each in domain.holders if each.name == "shared")
    assert shared.is_late
    assert shared.revoked_bytes == 14 * MIRROR
    second.slow = False
    second.give_back()
    world.rounds(1)
    assert (second.mirrors, other.mirrors) == (1, 15)


def test_a_second_replica_takes_over_what_the_first_has_written(world):
    world.add("first", *[1.0] * 6, group="shared")
    world.rounds(4)
    second = world.add("second", *[1.0] * 6, group="shared")
    world.rounds(0.3)
    assert second.mirrors == 7
    assert second.took == []
    del world.machine.replicas["first"]
    world.rounds(REPORT_TTL_S + 0.5)
    second.gains = (1.0,) * 9
    world.rounds(1)
    assert second.mirrors == 10, "it writes now"


def test_a_floor_that_somebody_waits_for_is_made_room_for(world):
    world.add("one", *[1.0] * 15)
    world.rounds(4)
    assert world.mirrors() == {"one": 16}
    world.machine.strangers = [HolderReading("starting", "s", 5 * MIRROR, 0, 5 * MIRROR)]
    world.rounds(0.5)
    assert world.mirrors() == {"one": 11}


def test_what_strangers_hold_is_not_lent(world):
    world.machine.strangers = [HolderReading("another's", "s", 0, 4 * MIRROR, 0)]
    world.add("one", *[1.0] * 15)
    world.rounds(4)
    assert world.mirrors() == {"one": 12}
    (domain,) = world.snapshot().memory
    assert {each.name: each.wanted_bytes for each in domain.holders} == {
        "one": 16 * MIRROR,
        "another's": None,
    }


def test_a_controller_that_is_away_changes_nothing_and_its_successor_goes_on(world):
    one, other = world.add("one", *[9.0] * 14), world.add("other", *[0.0] * 14)
    world.rounds(4)
    held = world.mirrors()
    one.gains, other.gains = other.gains, one.gains
    world.clock.now_s += 30.0
    assert world.mirrors() == held
    world.state = ClusterState(2, world.clock)
    world.round()
    assert world.mirrors() == held, "nobody knows yet what the former one granted"
    world.rounds(3)
    assert world.mirrors() == {"one": 1, "other": 15}


def test_a_former_controllers_word_is_not_followed(world):
    one = world.add("one", *[9.0] * 14)
    one.hear(Receipt(2))
    before = world.state.take(ReportBatch(2, (one.report(),)))
    assert before.refused == ("one",)
    assert before.lent == ()


def test_a_grant_that_was_not_taken_in_time_is_void(world):
    one = world.add("one", *[9.0] * 14)
    for _ in range(30):  # it reports, and what it is told is lost
        world.clock.now_s += 0.1
        receipt = world.state.take(ReportBatch(1, (one.report(),)))
        one.fence = one.fence.seen(1)
    (lent,) = receipt.lent
    world.clock.now_s += 2.5
    one.hear(receipt)
    assert one.mirrors == 1
    assert lent.order.valid_until_s < world.machine.now_s
    world.rounds(1)
    assert one.mirrors == 15


def test_who_left_gives_its_memory_to_the_others(world):
    one, other = world.add("one", *[9.0] * 14), world.add("other", *[5.0] * 14)
    world.rounds(4)
    assert (one.mirrors, other.mirrors) == (15, 1)
    del world.machine.replicas["one"]
    world.rounds(2)
    assert other.mirrors == 15


def test_a_domain_without_replicas_is_forgotten(world):
    world.add("one", *[9.0] * 14)
    world.rounds(1)
    assert len(world.snapshot().memory) == 1
    world.machine.replicas.clear()
    world.rounds(REPORT_TTL_S + 0.5)
    assert world.snapshot().memory == ()


def test_nothing_flaps_when_loads_waver(world):
    one, other = world.add("one", *[1.0] * 14), world.add("other", *[1.0] * 14)
    world.rounds(6)
    held = world.mirrors()
    for number in range(60):
        gain = 1.07 if number % 2 else 0.95
        one.gains, other.gains = (gain,) * 14, (2 - gain,) * 14
        world.round()
    assert world.mirrors() == held


def test_decisions_are_made_ten_times_a_second_at_most_however_often_somebody_reports():
    clock = Clock()
    machine = Machine(clock)
    one = Replica(machine, "one", "one", (1.0,) * 4)
    lending, decided = Lending(1, clock), set()
    for _ in range(100):
        clock.now_s += 0.01
        one.gains = tuple(gain * 1.01 for gain in one.gains)
        told = one.report()
        lending.heard(told.replica, told.model, told.node, told.mirrored, told.memory)
        decided.add(lending._decided_s)
    assert len(decided) <= 11


def test_replicas_without_memory_are_told_nothing(world):
    receipt = world.state.take(ReportBatch(0, (report("plain", 1),)))
    assert receipt.lent == ()
    assert world.snapshot().memory == ()


def test_watchers_and_the_document_see_every_domain(world):
    world.add("one", *[1.0] * 4)
    world.rounds(4)
    changes: Changes = world.state.changes(Known())
    told = cluster_document(Snapshot(0, 0).after(changes), age_s=0.0, now_s=10.0)
    (domain,) = told["domains"]
    assert domain["nodes"] == ("node-1",)
    assert (domain["capacity_bytes"], domain["held_bytes"]) == (CAPACITY, 5 * MIRROR)
    assert domain["free_bytes"] == 11 * MIRROR
    assert domain["late_revocations"] == 0
    (holder,) = domain["holders"]
    assert holder == {
        "name": "one",
        "replicas": ("one",),
        "priority": 0,
        "floor_bytes": MIRROR,
        "held_bytes": 5 * MIRROR,
        "granted_bytes": 0,
        "revoked_bytes": 0,
        "wanted_bytes": 5 * MIRROR,
        "is_late": False,
    }
    (replica,) = told["replicas"]
    assert replica["reserved_bytes"] == 5 * MIRROR


gains = st.lists(st.sampled_from([1.0, 3.0, 0.5, 0.0]), min_size=4, max_size=12).map(tuple)
names = st.sampled_from(["a1", "a2", "b1", "b2", "c1"])


class Histories(RuleBasedStateMachine):
    """Groups that grow and shrink, answers that are late or lost, controllers that are replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.add("a1", *[1.0] * 6, group="a")
        self.lost: list[tuple[Replica, Receipt]] = []

    @property
    def replicas(self) -> dict[str, Replica]:
        return self.world.machine.replicas

    @rule(times=st.integers(1, 12))
    def report_and_follow(self, times: int) -> None:
        for _ in range(times):
            self.world.round()

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.world.clock.now_s += seconds

    @rule(name=names)
    def report_and_hear_nothing(self, name: str) -> None:
        if name in self.replicas:
            self.world.clock.now_s += 0.1
            replica = self.replicas[name]
            batch = ReportBatch(replica.fence.epoch, (replica.report(),))
            self.lost.append((replica, self.world.state.take(batch)))

    @precondition(lambda self: self.lost)
    @rule(data=st.data())
    def hear_what_was_lost(self, data) -> None:
        replica, receipt = data.draw(st.sampled_from(self.lost))
        if self.replicas.get(replica.name) is replica:
            replica.hear(receipt)

    @rule(name=names, gains=gains, floor=st.integers(0, 3))
    def come(self, name: str, gains: tuple[float, ...], floor: int) -> None:
        if name in self.replicas:
            return
        self.world.add(name, *gains, group=name[0], floor=floor, mirrors=floor)
        if not self.world.machine.fits():  # it waits for its floor, outside of this history
            del self.replicas[name]

    @rule(name=names)
    def die(self, name: str) -> None:
        if len(self.replicas) > 1:
            self.replicas.pop(name, None)

    @rule(name=names, gains=gains, priority=st.integers(0, 1))
    def load_changes(self, name: str, gains: tuple[float, ...], priority: int) -> None:
        if name in self.replicas:
            self.replicas[name].gains, self.replicas[name].priority = gains, priority

    @rule(name=names, slow=st.booleans())
    def become_slow(self, name: str, slow: bool) -> None:
        if name in self.replicas:
            self.replicas[name].slow = slow
            if not slow:
                self.replicas[name].give_back()

    @rule(mirrors=st.integers(4, 16))
    def budget_changes(self, mirrors: int) -> None:
        budget = {"host_memory": f"{mirrors * MIRROR}B"}
        self.world.state.set_policy(parse_policy({"budgets": budget}))

    @rule()
    def controller_is_replaced(self) -> None:
        self.world.state = ClusterState(self.world.state.epoch + 1, self.world.clock)

    @invariant()
    def nothing_is_above_capacity_and_nobody_below_its_floor(self) -> None:
        assert self.world.machine.used() <= CAPACITY
        assert all(each.mirrors >= each.floor for each in self.replicas.values())

    def teardown(self) -> None:
        self.world.state.set_policy(parse_policy({}))
        for each in self.replicas.values():
            each.slow = False
            each.give_back()
        self.world.rounds(10)
        free = CAPACITY - self.world.machine.used()
        for group in {each.group for each in self.replicas.values()}:
            members = [each for each in self.replicas.values() if each.group == group]
            has = {each.mirrors for each in members}
            assert len(has) == 1 or max(has) == max(each.floor for each in members)
            wanted = max(each.floor + _wanted(each.gains) for each in members)
            assert max(has) >= wanted or free < MIRROR
        held = self.world.mirrors()
        self.world.rounds(3)
        assert self.world.mirrors() == held, "memory flaps"


def _wanted(gains: tuple[float, ...]) -> int:
    return max((at for at, gain in enumerate(gains, 1) if gain > 0), default=0)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
