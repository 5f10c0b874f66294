"""The staging ring's book: monotonic tickets, each owned by one unit, the slot from the ticket.

Slots are never found by layer index: `slot = index % d` overwrites live weights as soon as the
number of streamed units is no multiple of d. A look-up names ticket *and* unit, and fails loudly.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from select_n_core.errors import StreamingError


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right of `unit` to use `slot`, from the copy's issue until the unit's release."""

    number: int
    unit: int
    slot: int


class Ring:
    """Tickets in flight over `slots` slots, first issued first acquired."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise StreamingError(f"a ring needs at least one slot, got {slots}")
        self.slots = slots
        self._next = 0
        self._issued: deque[Ticket] = deque()
        self._acquired: Ticket | None = None

    @property
    def in_flight(self) -> int:
        """Tickets issued and not yet released."""
        return len(self._issued) + (self._acquired is not None)

    def issue(self, unit: int) -> Ticket:
        """The next ticket, for `unit`; its slot is free or just released."""
        if self.in_flight >= self.slots:
            raise StreamingError(
                f"no free slot for unit {unit}: {self.in_flight} of {self.slots} in flight"
            )
        ticket = Ticket(self._next, unit, self._next % self.slots)
        self._next += 1
        self._issued.append(ticket)
        return ticket

    def acquire(self, unit: int) -> Ticket:
        """The oldest ticket, which must be `unit`'s."""
        if self._acquired is not None:
            raise StreamingError(
                f"unit {unit} acquired before unit {self._acquired.unit} was released"
            )
        if not self._issued or self._issued[0].unit != unit:
            held = f"unit {self._issued[0].unit}" if self._issued else "nothing"
            raise StreamingError(f"unit {unit} is computed now, but the ring holds {held} next")
        self._acquired = self._issued.popleft()
        return self._acquired

    def release(self, unit: int) -> Ticket:
        """Give the ticket back; its slot may be refilled after the compute that read it."""
        ticket = self._acquired
        if ticket is None or ticket.unit != unit:
            raise StreamingError(f"unit {unit} released without a ticket of its own")
        self._acquired = None
        return ticket

    def abandon(self) -> None:
        """Forget every ticket in flight (their copies must have ended); numbers go on."""
        self._issued.clear()
        self._acquired = None
        self._next += -self._next % self.slots
