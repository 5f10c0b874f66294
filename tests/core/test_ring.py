"""The staging ring's book: tickets are monotonic and owned, the slot comes from the ticket."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from select_n_core.errors import StreamingError
from select_n_core.offload.ring import Ring, Ticket

UNITS = st.integers(0, 11)


class RingMachine(RuleBasedStateMachine):
    """Random use of a ring beside a plain model of it: a queue of issued tickets and one held."""

    @initialize(slots=st.integers(1, 4))
    def make(self, slots: int) -> None:
        self.ring = Ring(slots)
        self.slots = slots
        self.issued: deque[Ticket] = deque()
        self.held: Ticket | None = None
        self.last = -1
        self.last_slot = slots - 1

    def room(self) -> bool:
        return len(self.issued) + (self.held is not None) < self.slots

    @precondition(lambda self: self.room())
    @rule(unit=UNITS)
    def issue(self, unit: int) -> None:
        ticket = self.ring.issue(unit)
        assert ticket.unit == unit
        assert ticket.number > self.last
        assert ticket.slot == ticket.number % self.slots == (self.last_slot + 1) % self.slots
        in_use = {other.slot for other in self.issued} | {self.held.slot if self.held else None}
        assert ticket.slot not in in_use
        self.issued.append(ticket)
        self.last, self.last_slot = ticket.number, ticket.slot

    @precondition(lambda self: not self.room())
    @rule(unit=UNITS)
    def issue_too_many(self, unit: int) -> None:
        with pytest.raises(StreamingError, match="no free slot"):
            self.ring.issue(unit)

    @precondition(lambda self: self.issued and self.held is None)
    @rule()
    def acquire(self) -> None:
        self.held = self.issued.popleft()
        assert self.ring.acquire(self.held.unit) == self.held

    @rule(unit=UNITS)
    def acquire_out_of_turn(self, unit: int) -> None:
        if self.held is None and self.issued and self.issued[0].unit == unit:
            return
        with pytest.raises(StreamingError, match=r"acquired before|ring holds"):
            self.ring.acquire(unit)

    @precondition(lambda self: self.held is not None)
    @rule()
    def release(self) -> None:
        assert self.ring.release(self.held.unit) == self.held
        self.held = None

    @rule(unit=UNITS)
    def release_out_of_turn(self, unit: int) -> None:
        if self.held is not None and self.held.unit == unit:
            return
        with pytest.raises(StreamingError, match="without a ticket"):
            self.ring.release(unit)

    @rule()
    def abandon(self) -> None:
        self.ring.abandon()
        self.issued.clear()
        self.held = None
        self.last_slot = self.slots - 1

    @invariant()
    def counts_what_is_in_flight(self) -> None:
        if hasattr(self, "ring"):
            assert self.ring.in_flight == len(self.issued) + (self.held is not None)


RingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRing = RingMachine.TestCase


@given(slots=st.integers(1, 5), units=st.lists(UNITS, min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_a_steady_stream_walks_around_the_slots_whatever_the_units_are(slots, units):
    ring = Ring(slots)
    for number, unit in enumerate(units):
        assert ring.issue(unit) == Ticket(number, unit, number % slots)
        ring.acquire(unit)
        ring.release(unit)


def test_a_ring_without_slots_is_refused():
    with pytest.raises(StreamingError, match="at least one slot"):
        Ring(0)
