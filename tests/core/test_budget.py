"""Lending over an unreliable network: nothing above capacity at any instant, and no byte idle."""

from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from select_n_core.decisions.budget import Book, Rules
from select_n_core.decisions.loans import Holder, Rung
from select_n_core.decisions.orders import Fence, Order, Pool, Report, is_void

CAPACITY = 100
RUNG = 10
RULES = Rules(ttl_s=2.0, deadline_s=1.0, dwell_s=1.0)
MACHINE_S = 5000.0  # the machine's clock is ahead of the controller's


class Clock:
    now_s = 0.0


@dataclass
class Machine:
    """One domain's file: it refuses what does not fit."""

    clock: Clock
    held: dict[str, int] = field(default_factory=dict)

    @property
    def now_s(self) -> float:
        return MACHINE_S + self.clock.now_s

    def pin(self, name: str, nbytes: int) -> bool:
        if sum(self.held.values()) - self.held.get(name, 0) + nbytes > CAPACITY:
            return False
        self.held[name] = nbytes
        return True

    def read(self, capacity: int = CAPACITY) -> Pool:
        return Pool("d", capacity, self.now_s, dict(self.held))


class Replica:
    """A holder that follows orders, and takes its time to give back."""

    def __init__(self, machine: Machine, name: str, floor: int, gains: tuple[float, ...]) -> None:
        self.machine, self.name = machine, name
        self.floor, self.gains, self.priority = floor, gains, 0
        self.fence, self.answered = Fence(), 0
        self.giving_back: Order | None = None
        self.refused = 0
        machine.held[name] = 0
        self.start()

    def start(self) -> None:
        if self.held < self.floor:
            self.machine.pin(self.name, self.floor)

    @property
    def held(self) -> int:
        return self.machine.held[self.name]

    @property
    def holder(self) -> Holder:
        rungs = tuple(Rung(RUNG, gain) for gain in self.gains)
        return Holder(self.name, self.priority, self.floor, self.held, rungs)

    def report(self) -> Report:
        return Report(self.holder, "d", self.fence.epoch, self.answered, self.machine.now_s)

    def sees(self, epoch: int) -> None:
        if epoch > self.fence.epoch:
            self.fence, self.answered = self.fence.seen(epoch), 0

    def could_take(self, order: Order) -> int:
        void = is_void(order, self.machine.now_s)
        return order.nbytes if order.nbytes > 0 and self.fence.admits(order) and not void else 0

    def obey(self, order: Order) -> None:
        self.sees(order.epoch)
        if not self.fence.admits(order):
            return
        self.fence = self.fence.after(order)
        if order.nbytes < 0:
            self.giving_back = order
            return
        self.answered = order.number
        if not is_void(order, self.machine.now_s):
            self.refused += not self.machine.pin(self.name, self.held + order.nbytes)

    def give_back(self) -> None:
        order = self.giving_back
        if order is not None:
            self.giving_back = None
            self.machine.held[self.name] = self.holder.bytes_of(order.rungs)
            if order.epoch == self.fence.epoch:
                self.answered = order.number


class World:
    """A controller and replicas that hear each other at once."""

    def __init__(self, *replicas: tuple[str, int, tuple[float, ...]]) -> None:
        self.clock = Clock()
        self.machine = Machine(self.clock)
        self.replicas = {each[0]: Replica(self.machine, *each) for each in replicas}
        self.book = Book(1, 0.0, RULES)
        self.capacity = CAPACITY

    def round(self, seconds: float = 0.1) -> tuple[Order, ...]:
        """Report, decide, obey; the orders that were new."""
        now_s = self.clock.now_s = self.clock.now_s + seconds
        for each in self.replicas.values():
            each.start()
            each.sees(self.book.epoch)
            self.book = self.book.heard(each.report(), now_s)
        before = set(self.book.orders)
        self.book = self.book.read(self.machine.read(self.capacity)).decided(now_s)
        for order in self.book.orders:
            if order.holder in self.replicas:
                self.replicas[order.holder].obey(order)
                self.replicas[order.holder].give_back()
        return tuple(order for order in self.book.orders if order not in before)

    def settle(self, rounds: int = 60) -> None:
        for _ in range(rounds):
            self.round()

    def held(self) -> dict[str, int]:
        return dict(self.machine.held)


class TestMoves:
    def test_all_that_is_wanted_is_lent_and_then_nothing_moves(self):
        world = World(("a", 20, (1.0,) * 4), ("b", 10, (1.0,) * 9))
        world.settle()
        held = world.held()
        assert sum(held.values()) == CAPACITY
        assert not any(world.round() for _ in range(50))
        assert world.held() == held

    def test_memory_follows_the_load_within_three_seconds(self):
        world = World(("a", 10, (9.0,) * 8), ("b", 10, (1.0,) * 8))
        world.settle()
        assert world.held() == {"a": 90, "b": 10}
        world.replicas["a"].gains, world.replicas["b"].gains = (1.0,) * 8, (9.0,) * 8
        world.settle(30)
        assert world.held() == {"a": 10, "b": 90}

    def test_gains_that_waver_move_nothing(self):
        world = World(("a", 10, (1.0,) * 8), ("b", 10, (1.0,) * 8))
        world.settle()
        held = world.held()
        for number in range(100):
            gain = 1.08 if number % 2 else 0.95
            world.replicas["a"].gains, world.replicas["b"].gains = (gain,) * 8, (2 - gain,) * 8
            assert world.round() == ()
        assert world.held() == held

    def test_a_loan_that_nobody_else_wants_stays_where_it_is(self):
        world = World(("a", 10, (1.0,) * 8), ("b", 10, ()))
        world.settle()
        world.replicas["a"].gains = (0.0,) * 8
        assert not any(world.round() for _ in range(50))
        assert world.held() == {"a": 90, "b": 10}

    def test_a_newcomers_floor_takes_loans_back_at_once(self):
        world = World(("a", 10, (1.0,) * 9))
        world.settle()
        assert world.held() == {"a": 100}
        world.round()
        world.replicas["b"] = Replica(world.machine, "b", 30, ())
        assert world.held() == {"a": 100, "b": 0}
        world.round()
        world.round()
        assert world.held() == {"a": 70, "b": 30}

    def test_what_gains_its_holder_nothing_does_not_rest(self):
        world = World(("a", 10, (1.0,) * 9), ("b", 0, ()))
        world.settle(3)
        world.replicas["a"].gains = (1.0,) * 4 + (0.0,) * 5
        world.replicas["b"].gains = (5.0,) * 9
        world.settle(3)
        assert world.held() == {"a": 50, "b": 50}
        world.settle()
        assert world.held() == {"a": 10, "b": 90}

    def test_a_higher_class_does_not_wait_until_a_loan_has_rested(self):
        world = World(("a", 10, (1.0,) * 9), ("b", 0, ()))
        world.settle(3)
        world.replicas["b"].gains, world.replicas["b"].priority = (0.1,) * 3, 1
        world.settle(3)
        assert world.held() == {"a": 70, "b": 30}

    def test_a_smaller_budget_takes_back_what_is_above_it(self):
        world = World(("a", 10, (1.0,) * 4), ("b", 10, (2.0,) * 4))
        world.settle()
        world.capacity = 60
        world.settle()
        assert world.held() == {"a": 10, "b": 50}

    def test_what_others_in_the_domain_hold_is_not_lent(self):
        world = World(("a", 10, (1.0,) * 9))
        world.machine.pin("somebody else's", 40)
        world.settle()
        assert world.held() == {"a": 60, "somebody else's": 40}


class TestOrders:
    def begun(self) -> World:
        """One grant is decided on, and has reached nobody yet."""
        world = World(("a", 10, (1.0,) * 9))
        replica = world.replicas["a"]
        replica.sees(1)
        world.book = world.book.heard(replica.report(), 0.0).read(world.machine.read())
        world.book = world.book.decided(0.0)
        return world

    def test_one_order_at_a_time_is_sent_until_it_is_answered(self):
        world = self.begun()
        (order,) = world.book.orders
        assert (order.nbytes, order.rungs) == (90, 9)
        assert world.book.decided(0.5).orders == (order,)
        assert world.book.committed_bytes(world.machine.read()) == CAPACITY
        world.replicas["a"].obey(order)
        world.clock.now_s = 0.6
        book = world.book.heard(world.replicas["a"].report(), 0.6)
        assert book.orders == ()
        assert book.committed_bytes(world.machine.read()) == CAPACITY

    def test_an_order_that_comes_twice_is_followed_once(self):
        world = self.begun()
        (order,) = world.book.orders
        replica = world.replicas["a"]
        replica.obey(replace(order, nbytes=30))
        replica.obey(replace(order, nbytes=30))
        assert replica.held == 40

    def test_a_grant_that_was_taken_and_not_answered_yet_counts_once(self):
        world = self.begun()
        replica = world.replicas["a"]
        world.machine.pin("a", 100)
        world.clock.now_s = 0.1
        book = world.book.heard(replica.report(), 0.1)
        assert len(book.orders) == 1
        assert book.committed_bytes(world.machine.read()) == CAPACITY

    def test_a_grant_that_was_not_taken_counts_until_its_holder_can_take_it_no_more(self):
        world = self.begun()
        (order,) = world.book.orders
        replica = world.replicas["a"]
        world.clock.now_s = 1.9
        book = world.book.heard(replica.report(), 1.9)
        assert book.orders == (order,)
        world.clock.now_s = 2.0
        replica.obey(order)
        assert replica.held == 10, "it came too late"
        book = book.heard(replica.report(), 2.0)
        assert book.orders == ()
        assert book.committed_bytes(world.machine.read()) == 10

    def test_a_silent_holders_grant_ends_with_a_reading_of_the_file(self):
        world = self.begun()
        (order,) = world.book.orders
        world.replicas["a"].obey(order)
        world.clock.now_s = 3.0
        book = world.book.decided(3.0)
        assert book.orders == (order,), "nobody knows whether it was taken"
        book = book.read(world.machine.read())
        assert book.orders == ()
        assert book.committed_bytes(world.machine.read()) == CAPACITY

    def test_who_has_left_the_file_is_gone(self):
        world = self.begun()
        del world.machine.held["a"]
        world.clock.now_s = 0.5
        book = world.book.read(world.machine.read())
        assert book.accounts == {}
        assert book.orders == ()

    def test_a_reading_that_is_older_than_a_report_says_nothing_of_its_holder(self):
        world = self.begun()
        nobody = Pool("d", CAPACITY, world.machine.now_s - 0.1)
        assert world.book.read(nobody) == world.book, "it was overtaken by a reading"
        new = replace(world.book, pools={}).read(nobody)
        assert new.accounts == world.book.accounts

    def test_a_machine_that_is_lost_takes_all_with_it(self):
        book = self.begun().book.lost("d")
        assert (book.accounts, book.pools) == ({}, {})

    def test_revoked_bytes_count_until_they_are_given_back_however_late(self):
        world = World(("a", 10, (1.0,) * 9))
        world.settle(3)
        replica = world.replicas["a"]
        world.capacity = 50
        world.clock.now_s = 10.0
        book = world.book.heard(replica.report(), 10.0).read(world.machine.read(50)).decided(10.0)
        (order,) = book.orders
        assert (order.nbytes, order.rungs) == (-50, 4)
        assert book.late(11.0) == ()
        assert book.late(11.1) == (order,)
        replica.obey(order)
        world.clock.now_s = 12.0
        book = book.heard(replica.report(), 12.0).decided(12.0)
        assert book.orders == (order,)
        replica.give_back()
        world.clock.now_s = 13.0
        book = book.heard(replica.report(), 13.0)
        assert book.orders == book.late(13.0) == ()
        assert book.committed_bytes(world.machine.read(50)) == 50

    def test_a_report_that_was_overtaken_changes_nothing(self):
        world = World(("a", 10, (1.0,) * 9))
        old = world.replicas["a"].report()
        world.settle(3)
        assert world.book.heard(old, 9.0) == world.book


class TestControllers:
    def test_nothing_is_granted_in_a_domain_whose_file_was_not_read(self):
        world = World(("a", 10, (1.0,) * 9))
        book = world.book.heard(world.replicas["a"].report(), 0.0)
        assert book.decided(60.0).orders == ()

    def test_a_new_controller_grants_when_everybody_has_heard_of_it(self):
        world = World(("a", 10, (1.0,) * 9))
        replica = world.replicas["a"]
        new = Book(2, 0.0, RULES).read(world.machine.read())
        assert new.heard(replica.report(), 0.1).decided(0.1).orders == ()
        replica.sees(2)
        world.clock.now_s = 0.2
        assert new.heard(replica.report(), 0.2).decided(0.2).orders[0].nbytes == 90

    def test_or_when_no_grant_of_another_can_still_be_taken(self):
        world = World(("a", 10, (1.0,) * 5))
        world.machine.pin("somebody else's", 40)
        new = Book(2, 0.0, RULES)
        for now_s in (1.9, 2.0):
            world.clock.now_s = now_s
            new = new.read(world.machine.read()).heard(world.replicas["a"].report(), now_s)
            new = new.decided(now_s)
            assert len(new.orders) == (now_s == 2.0)

    def test_a_former_controller_is_not_listened_to(self):
        world = TestOrders().begun()
        (order,) = world.book.orders
        replica = world.replicas["a"]
        replica.sees(2)
        replica.obey(order)
        assert replica.held == 10

    def test_orders_to_a_holder_that_was_forgotten_have_numbers_it_has_not_seen(self):
        world = World(("a", 10, (1.0,) * 9))
        world.settle(3)
        world.book = replace(world.book, accounts={})
        world.replicas["a"].gains = (1.0,) * 9
        world.capacity = 50
        world.settle(3)
        assert world.held() == {"a": 50}


gains = st.lists(st.sampled_from([1.0, 3.0, 0.5, 0.0]), min_size=4, max_size=8).map(tuple)
names = st.sampled_from("abcdef")


class Histories(RuleBasedStateMachine):
    """Messages that are late, lost, doubled and out of order; controllers that are replaced."""

    @initialize(floors=st.tuples(*[st.integers(0, 30)] * 3), gains=st.tuples(*[gains] * 3))
    def begin(self, floors, gains) -> None:
        self.world = World(*zip("abc", floors, gains, strict=True))
        self.reports: list[Report] = []
        self.readings: list[Pool] = []
        self.orders: list[Order] = []

    @property
    def now_s(self) -> float:
        return self.world.clock.now_s

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.world.clock.now_s += seconds

    @rule(data=st.data())
    def decide_on_an_old_report(self, data) -> None:
        if self.reports:
            report = data.draw(st.sampled_from(self.reports[-8:]))
            self.world.book = self.world.book.heard(report, self.now_s)
            self.decide()

    @rule(data=st.data())
    def decide_on_an_old_reading(self, data) -> None:
        if self.readings:
            reading = data.draw(st.sampled_from(self.readings[-4:]))
            self.world.book = self.world.book.read(reading)
            self.decide()

    def decide(self) -> None:
        self.world.book = self.world.book.decided(self.now_s)
        self.orders += [each for each in self.world.book.orders if each not in self.orders]

    @rule(
        silent=st.sampled_from(["", "a", "b"]),
        told=st.booleans(),
        obeyed=st.booleans(),
        budget=st.sampled_from([CAPACITY, CAPACITY, 60]),
    )
    def decide_on_fresh_reports(self, silent: str, told: bool, obeyed: bool, budget: int) -> None:
        """Reports are kept as well, to come again when they are old."""
        self.world.clock.now_s += 0.1
        for name, each in self.world.replicas.items():
            if told:
                each.sees(self.world.book.epoch)
            if name != silent:
                self.reports.append(each.report())
                self.world.book = self.world.book.heard(self.reports[-1], self.now_s)
        self.readings.append(self.world.machine.read(budget))
        self.world.book = self.world.book.read(self.readings[-1])
        self.decide()
        if obeyed:
            self.all_obey_what_stands()

    def all_obey_what_stands(self) -> None:
        for order in self.world.book.orders:
            if order.holder in self.world.replicas:
                self.world.replicas[order.holder].obey(order)

    @rule(data=st.data())
    def obey(self, data) -> None:
        if self.orders:
            order = data.draw(st.sampled_from(self.orders))
            if order.holder in self.world.replicas:
                self.world.replicas[order.holder].obey(order)

    @rule(name=names)
    def give_back(self, name: str) -> None:
        if name in self.world.replicas:
            self.world.replicas[name].give_back()

    @rule(name=names, gains=gains, priority=st.integers(0, 1))
    def load_changes(self, name: str, gains, priority: int) -> None:
        if name in self.world.replicas:
            self.world.replicas[name].gains = gains
            self.world.replicas[name].priority = priority

    @rule()
    def controller_is_replaced(self) -> None:
        self.world.book = Book(self.world.book.epoch + 1, self.now_s, RULES)

    @rule(name=names)
    def hear_of_the_controller(self, name: str) -> None:
        if name in self.world.replicas:
            self.world.replicas[name].sees(self.world.book.epoch)

    @rule(name=names)
    def die(self, name: str) -> None:
        if name in self.world.replicas and len(self.world.replicas) > 1:
            del self.world.replicas[name], self.world.machine.held[name]

    @invariant()
    def all_that_is_held_and_all_that_may_still_be_taken_fits(self) -> None:
        takeable = 0
        for name, replica in self.world.replicas.items():
            mine = [order for order in self.orders if order.holder == name]
            takeable += max((replica.could_take(order) for order in mine), default=0)
            assert replica.refused == 0, "the file had to refuse what was granted"
            assert replica.held >= replica.floor
        assert sum(self.world.held().values()) + takeable <= CAPACITY

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.settle(100)
        idle = CAPACITY - sum(self.world.held().values())
        for replica in self.world.replicas.values():
            assert replica.holder.lent >= replica.holder.wanted or idle < RUNG
        assert not any(self.world.round() for _ in range(30)), "memory flaps"


class Upgrades(Histories):
    """Replicas come, and a former controller decides on: then the file has the last word."""

    @initialize()
    def nobody_before(self) -> None:
        self.former: list[Book] = []

    @rule(name=st.sampled_from("def"), floor=st.integers(0, 30), gains=gains)
    def come(self, name: str, floor: int, gains) -> None:
        replicas = self.world.replicas
        floors = sum(each.floor for each in replicas.values())
        if name not in replicas and floors + floor <= CAPACITY:
            replicas[name] = Replica(self.world.machine, name, floor, gains)

    @rule()
    def controller_is_replaced(self) -> None:
        self.former.append(self.world.book)
        super().controller_is_replaced()

    @rule(data=st.data())
    def former_decides(self, data) -> None:
        if self.former:
            at = data.draw(st.integers(0, len(self.former) - 1))
            book = self.former[at].read(self.world.machine.read())
            for each in self.world.replicas.values():
                book = book.heard(each.report(), self.now_s)
            self.former[at] = book = book.decided(self.now_s)
            self.orders += [each for each in book.orders if each not in self.orders]

    @invariant()
    def all_that_is_held_and_all_that_may_still_be_taken_fits(self) -> None:
        assert sum(self.world.held().values()) <= CAPACITY

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "world"):
            for replica in self.world.replicas.values():
                assert replica.held >= replica.floor, "a floor starves"


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestUpgrades = Upgrades.TestCase
TestUpgrades.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
