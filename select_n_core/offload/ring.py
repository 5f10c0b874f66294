"""The ring's book: which bytes each unit computes from, decided turn by turn.

Units compute in call order, iteration after iteration; one unit's computing is a *turn*. A cursor
runs ahead of the computing and decides each turn once, by the units that are wanted in host
memory at that moment: from a slot, from home, or from home after one last copy. What was decided
stands, so two plans may be alive at a time. A look-up names the unit and fails loudly: slots are
never found by layer index, which would overwrite live weights as soon as the number of streamed
units is no multiple of the number of slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from select_n_core.errors import StreamingError


@dataclass(frozen=True, slots=True)
class Ticket:
    """One copy of `unit`, for one turn.

    Attributes:
        turn: counted over all iterations; the copy must have ended when it begins.
        slot: the copy's target, owned until the turn's end; None is the unit's home, for good.
    """

    number: int
    turn: int
    unit: int
    slot: int | None


class Ring:
    """Tickets over `slots` slots for `units` units, of which `streamed` have no bytes at home."""

    def __init__(self, units: int, slots: int, streamed: Iterable[int] = ()) -> None:
        self.units = units
        self.slots = slots
        self._wanted = frozenset(streamed)
        self._home = set(range(units)) - self._wanted
        self._now = 0  # the turn that computes next
        self._cursor = 0  # the first turn that is not decided yet
        self._computing = False
        self._tickets: deque[Ticket] = deque()
        self._numbers = 0
        self._slot_tickets = 0  # ever issued
        self._slots_held = 0

    @property
    def wanted(self) -> frozenset[int]:
        """The units that are to be streamed."""
        return self._wanted

    @property
    def at_home(self) -> frozenset[int]:
        """Units whose next undecided turn needs no copy."""
        return frozenset(self._home)

    @property
    def in_flight(self) -> int:
        """Tickets issued and not yet released."""
        return len(self._tickets)

    @property
    def phase(self) -> int | None:
        """The slot of the next iteration's first ticket, between iterations that are all alike.

        None while a unit is on its way between home and slot.
        """
        strays = any(ticket.slot is None for ticket in self._tickets)
        if strays or self._home & self._wanted or len(self._home | self._wanted) < self.units:
            return None
        if self._tickets:
            return self._tickets[0].slot
        return self._slot_tickets % max(1, self.slots)

    def want(self, streamed: Iterable[int]) -> None:
        """Stream these units from the first turn of each that is not decided yet.

        Raises:
            StreamingError: between `acquire` and `release`.
        """
        self._between_turns("the streamed units change")
        self._wanted = frozenset(streamed)

    def leave_home(self) -> list[int]:
        """Units to be streamed whose bytes at home no decided turn needs any more.

        Their homes may be used for something else. After an iteration that began after `want`,
        every wanted unit has left.
        """
        leaving = [
            unit
            for unit in sorted(self._wanted & self._home)
            if self._now + (unit - self._now) % self.units >= self._cursor
        ]
        self._home.difference_update(leaving)
        return leaving

    def issue(self) -> Ticket | None:
        """Decide turns up to the next one that needs a copy; None if no slot is free for it.

        A unit's turn is decided once its last one is over, or has begun in a slot: one iteration
        ahead at most.
        """
        while self._cursor <= self._now + self.units:
            unit = self._cursor % self.units
            if self._cursor == self._now + self.units and (
                not self._computing or unit not in self._wanted or unit in self._home
            ):
                return None
            if unit in self._wanted:
                if self._slots_held == self.slots:
                    return None
                self._home.discard(unit)
                slot = self._slot_tickets % self.slots
                self._slot_tickets += 1
                self._slots_held += 1
                return self._ticket(unit, slot)
            if unit not in self._home:
                self._home.add(unit)
                return self._ticket(unit, None)
            self._cursor += 1
        return None

    def acquire(self, unit: int) -> Ticket | None:
        """Begin the unit's turn; its ticket, or None if its bytes are at home.

        A unit in a slot that is not to be streamed any more counts as at home from here on: its
        bytes are on the device, and the caller moves them home when the turn ends.
        """
        self._between_turns(f"unit {unit} is acquired")
        if self._now % self.units != unit:
            raise StreamingError(
                f"unit {unit} is computed out of turn: unit {self._now % self.units} is next"
            )
        if self._cursor <= self._now:
            raise StreamingError(f"unit {unit} is computed now, but no slot was free for its copy")
        self._computing = True
        if not self._tickets or self._tickets[0].turn != self._now:
            return None
        if unit not in self._wanted:
            self._home.add(unit)
        return self._tickets[0]

    def release(self, unit: int) -> Ticket | None:
        """End the unit's turn; its slot may be refilled after the compute that read it."""
        if not self._computing or self._now % self.units != unit:
            raise StreamingError(f"unit {unit} is released, but it is not its turn")
        ticket = None
        if self._tickets and self._tickets[0].turn == self._now:
            ticket = self._tickets.popleft()
            self._slots_held -= ticket.slot is not None
        self._computing = False
        self._now += 1
        return ticket

    def bring_home(self, unit: int) -> None:
        """Count the unit as at home; after `abandon`, and once its bytes are there."""
        if self._tickets or unit in self._wanted:
            raise StreamingError(f"unit {unit} cannot be brought home while it is streamed")
        self._home.add(unit)

    def abandon(self) -> None:
        """Forget every ticket in flight (their copies must have ended) and start an iteration.

        A home whose copy was not used yet does not count as filled: the copy may have failed.
        """
        self._home -= {ticket.unit for ticket in self._tickets}
        self._tickets.clear()
        self._slots_held = 0
        self._slot_tickets += -self._slot_tickets % max(1, self.slots)
        self._computing = False
        self._now += -self._now % self.units
        self._cursor = self._now

    def _ticket(self, unit: int, slot: int | None) -> Ticket:
        ticket = Ticket(self._numbers, self._cursor, unit, slot)
        self._numbers += 1
        self._cursor += 1
        self._tickets.append(ticket)
        return ticket

    def _between_turns(self, what: str) -> None:
        if self._computing:
            raise StreamingError(f"{what} before unit {self._now % self.units} was released")
