"""Host memory that comes and goes while serving: offers, revocations and their deadlines.

An offer is taken when room for it is written down in the domain, or refused. A revocation goes in
a fixed order: k is turned down as far as the smaller lease demands, the units come home with the
iterations that follow, and only then are their mirrors unregistered and freed, and the revocation
acknowledged. A missed deadline is an error for whoever revoked; the bytes still come back as soon
as they can.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from select_n_core.engine.messages import LeaseAnswer
from select_n_core.errors import HostMemoryError, SelectNError
from select_n_core.memory.reservation import Reservation
from select_n_core.offload.executor import Executor

_LOOK_S = 1.0  # between two looks at the ledger

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A revocation that is under way."""

    id: str
    nbytes: int
    deadline_s: float
    due_s: float


class HostLease:
    """The lease on host memory of one replica.

    Args:
        turn: turns k, and preempts whom that takes; see `Engine.turn`.
        clock: seconds.
        reservation: where the domain's memory is written down; None where nobody counts it.
        whole_bytes: what the lease grows to by itself, where there was less room at the start;
            until somebody offers or revokes, who decides from then on.
    """

    def __init__(
        self,
        executor: Executor,
        turn: Callable[[int], None],
        clock: Callable[[], float],
        reservation: Reservation | None = None,
        whole_bytes: int = 0,
    ) -> None:
        self._executor = executor
        self._turn = turn
        self._clock = clock
        self._reservation = reservation
        self._whole_bytes = whole_bytes
        self._look_s = -math.inf
        self._pending: list[_Pending] = []
        self._answers: list[LeaseAnswer] = []

    @property
    def settled(self) -> bool:
        """Whether mirrors are what the lease and k say, and nobody waits for an answer."""
        executor = self._executor
        return executor.m == executor.cap and not self._pending and not self._answers

    def offer(self, offer_id: str, nbytes: int, valid_until_s: float = math.inf) -> None:
        """Let mirrors take `nbytes` more; they are written one after another.

        The answer comes with `tend`: room is kept for all of it, or the error that says who has
        it or that it came too late, and the lease is what it was.
        """
        self._whole_bytes = 0
        error: SelectNError | None = None
        try:
            if time.monotonic() >= valid_until_s:
                raise HostMemoryError(f"an offer of {nbytes} bytes came too late to be taken")
            self._executor.lease(self._executor.lease_bytes + nbytes)
        except SelectNError as refused:
            error = refused
        self._answers.append(LeaseAnswer(offer_id, error))

    def revoke(self, revocation_id: str, nbytes: int, deadline_s: float) -> None:
        """Give `nbytes` back within `deadline_s`; the answer comes with `tend`."""
        self._whole_bytes = 0
        executor = self._executor
        try:
            executor.lease(executor.lease_bytes - nbytes)
            if executor.k > executor.cap:
                self._turn(executor.cap)
        except SelectNError as error:
            self._answers.append(LeaseAnswer(revocation_id, error))
            return
        due_s = self._clock() + deadline_s
        self._pending.append(_Pending(revocation_id, nbytes, deadline_s, due_s))

    def tend(self, *, idle: bool) -> None:
        """Make a move; call it after every step, and now and then while there is none."""
        executor = self._executor
        if idle and executor.m > executor.cap:
            executor.settle()  # no iteration comes to bring the units home
        executor.tend()
        if executor.host_bytes <= executor.lease_bytes:
            self._answers += [LeaseAnswer(each.id) for each in self._pending]
            self._pending.clear()
        now_s = self._clock()
        for late in [each for each in self._pending if each.due_s < now_s]:
            self._pending.remove(late)
            missing = executor.host_bytes - executor.lease_bytes
            error = HostMemoryError(
                f"{late.nbytes} bytes of host memory were to be given back within "
                f"{late.deadline_s:g} s; {missing} are still in use and will follow"
            )
            self._answers.append(LeaseAnswer(late.id, error))
        if self._reservation is not None and now_s >= self._look_s:
            self._look_s = now_s + _LOOK_S
            self._look(self._reservation, now_s)

    def take_answers(self) -> tuple[LeaseAnswer, ...]:
        """Offers and revocations that were answered since the last call."""
        answers, self._answers = tuple(self._answers), []
        return answers

    def _look(self, reservation: Reservation, now_s: float) -> None:
        """Keep what is held written down, and see for room that the start had to do without."""
        executor = self._executor
        try:
            reservation.keep()
        except HostMemoryError as error:
            _log.warning("the ledger is looked after again later: %s", error)
        if executor.lease_bytes >= self._whole_bytes:
            return
        if executor.m < executor.cap:
            self._look_s = now_s  # again when the mirror before is written
            return
        memory = executor.memory
        count = memory.host_cap(executor.lease_bytes) + 1
        try:
            executor.lease(min(self._whole_bytes, memory.mirrored_bytes(count)))
        except HostMemoryError as error:
            _log.debug("no room for one mirror more yet: %s", error)
        else:
            self._look_s = now_s
