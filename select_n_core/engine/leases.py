"""Host memory that comes and goes while serving: offers, revocations and their deadlines.

A revocation goes in a fixed order: k is turned down as far as the smaller lease demands, the
units come home with the iterations that follow, and only then are their mirrors unregistered and
freed, and the revocation acknowledged. A missed deadline is an error for whoever revoked; the
bytes still come back as soon as they can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from select_n_core.engine.messages import LeaseAnswer
from select_n_core.errors import HostMemoryError, SelectNError
from select_n_core.offload.executor import Executor


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
    """

    def __init__(
        self, executor: Executor, turn: Callable[[int], None], clock: Callable[[], float]
    ) -> None:
        self._executor = executor
        self._turn = turn
        self._clock = clock
        self._pending: list[_Pending] = []
        self._answers: list[LeaseAnswer] = []

    @property
    def settled(self) -> bool:
        """Whether mirrors are what the lease and k say, and nobody waits for an answer."""
        executor = self._executor
        return executor.m == executor.cap and not self._pending and not self._answers

    def offer(self, nbytes: int) -> None:
        """Let mirrors take `nbytes` more; they are written one after another."""
        self._executor.lease(self._executor.lease_bytes + nbytes)

    def revoke(self, revocation_id: str, nbytes: int, deadline_s: float) -> None:
        """Give `nbytes` back within `deadline_s`; the answer comes with `tend`."""
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

    def take_answers(self) -> tuple[LeaseAnswer, ...]:
        """Revocations that ended since the last call."""
        answers, self._answers = tuple(self._answers), []
        return answers
