"""The ring's book: every turn computes from its own bytes, whatever k did before."""

from collections.abc import Iterable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from select_n_core.decisions.order import streamed_units
from select_n_core.errors import StreamingError
from select_n_core.offload.ring import Ring, Ticket


class Memory:
    """Homes and slots as a streamer would fill them, and everything that must never happen.

    A copy's bytes may land at any time between its issue and its turn. Here they land at once,
    which is the worst case for whoever still reads the target.
    """

    def __init__(self, units: int, slots: int, k: int = 0) -> None:
        self.units = units
        self.ring = Ring(units, slots, streamed_units(units, k))
        self.slots: dict[int, Ticket] = {}
        self.homes = {unit: unit in self.ring.at_home for unit in range(units)}
        self.turns: list[Ticket] = []
        self.tickets = 0

    def iterate(self, streamed: Iterable[int]) -> int:
        """One iteration; returns how many units computed from a copy of their own."""
        self.ring.want(streamed)
        self._lend()
        copied = 0
        self._issue()
        for unit in range(self.units):
            copied += self._turn(unit)
        self._lend()
        assert not self.ring.at_home & self.ring.wanted, "a home that was to be lent is not free"
        return copied

    def _turn(self, unit: int) -> bool:
        ticket = self.ring.acquire(unit)
        if ticket is None or ticket.slot is None:
            assert self.homes[unit], f"unit {unit} computes from a home that is not its own"
        else:
            assert self.slots[ticket.slot] == ticket, f"unit {unit} computes from another's bytes"
        self._issue()
        assert self.ring.release(unit) == ticket
        if ticket is not None and ticket.slot is not None:
            del self.slots[ticket.slot]
            if unit not in self.ring.wanted:
                self.homes[unit] = True  # moved there from the slot
        self._issue()
        return ticket is not None

    def _issue(self) -> None:
        while (ticket := self.ring.issue()) is not None:
            assert ticket.number == self.tickets
            self.tickets += 1
            if ticket.slot is None:
                assert ticket.unit not in self.ring.wanted
                self.homes[ticket.unit] = True
            else:
                assert ticket.slot not in self.slots, "a slot is overwritten before its use"
                self.slots[ticket.slot] = ticket

    def _lend(self) -> None:
        for unit in self.ring.leave_home():
            self.homes[unit] = False


def check_step(units: int, slots: int, before: int, after: int) -> None:
    memory = Memory(units, slots, before)
    ks = [before, after, after, before]
    for last, k in zip([before, *ks], ks, strict=False):
        assert memory.iterate(streamed_units(units, k)) <= max(k, last), "bytes for nothing"
    assert memory.tickets <= sum(map(max, ks, [before, *ks[:-1]])) + slots


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_every_single_step_of_k(slots):
    for units in [*range(1, 13), 40]:
        for before, after in product(range(0, units + 1, 1 + units // 13), repeat=2):
            check_step(units, slots, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_every_single_step_of_k_up_to_forty_units(slots):
    for units in range(13, 41):
        for before, after in product(range(units + 1), repeat=2):
            check_step(units, slots, before, after)


@given(data=st.data(), units=st.integers(1, 12), slots=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_any_history_of_any_sets(data, units, slots):
    memory = Memory(units, slots)
    sets = st.frozensets(st.integers(0, units - 1))
    last: frozenset[int] = frozenset()
    for streamed in data.draw(st.lists(sets, max_size=12)):
        assert memory.iterate(streamed) <= len(streamed | last)
        last = streamed


@given(data=st.data(), units=st.integers(1, 8), slots=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_an_abandoned_iteration_starts_again_from_what_is_known_to_be_there(data, units, slots):
    memory, ring = Memory(units, slots), None
    sets = st.frozensets(st.integers(0, units - 1))
    for _ in range(3):
        memory.iterate(data.draw(sets))
        ring = memory.ring
        ring.want(data.draw(sets))
        memory._lend()
        memory._issue()
        for unit in range(data.draw(st.integers(0, units - 1))):
            memory._turn(unit)
        ring.abandon()
        memory.slots.clear()
        assert ring.in_flight == 0
        memory.homes = {unit: unit in ring.at_home for unit in range(units)}


def test_a_steady_stream_walks_around_the_slots_whatever_the_units_are():
    memory = Memory(7, 2, 3)
    slots = []
    memory.ring.issue()
    for _ in range(4):
        for unit in range(7):
            if (ticket := memory.ring.acquire(unit)) is not None:
                slots.append(ticket.slot)
            memory.ring.release(unit)
            memory.ring.issue()
    assert slots == [0, 1] * 6


def test_a_promoted_unit_gets_one_last_copy_and_a_demoted_one_leaves_at_once():
    ring = Ring(4, 1, {1})
    ring.want({3})
    assert ring.leave_home() == [3]
    assert ring.issue() == Ticket(0, 1, 1, None)
    assert ring.issue() == Ticket(1, 3, 3, 0)
    assert ring.at_home == {0, 1, 2}


def test_what_was_decided_stands_until_its_turn_is_over():
    ring = Ring(3, 1, {1})
    ring.issue()
    ring.want({0})  # unit 0 was passed over already: it computes from home once more
    assert ring.leave_home() == []
    assert ring.acquire(0) is None
    ring.release(0)
    assert ring.leave_home() == [0]


def test_a_turn_whose_copy_had_no_slot_is_refused():
    ring = Ring(2, 1, {0, 1})
    ring.issue()
    ring.acquire(0)
    ring.release(0)
    with pytest.raises(StreamingError, match="unit 1 is computed now, but no slot was free"):
        ring.acquire(1)


def test_units_compute_in_turn():
    ring = Ring(2, 1)
    ring.issue()
    with pytest.raises(StreamingError, match="unit 1 is computed out of turn: unit 0 is next"):
        ring.acquire(1)
    ring.acquire(0)
    with pytest.raises(StreamingError, match="acquired before unit 0 was released"):
        ring.acquire(1)
    with pytest.raises(StreamingError, match="unit 1 is released, but it is not its turn"):
        ring.release(1)
    with pytest.raises(StreamingError, match="change before unit 0 was released"):
        ring.want({1})
