"""The emulated link beside paced compute: time as it would be, the host never a cause of delay.

Paced compute takes no time of a core: it only says when it will have ended. The timeline holds
that moment. The host runs ahead of it, as it runs ahead of a GPU: it issues copies that start when
the compute before them ends, and blocks only where compute waits for a copy. What the host is
late by, because it was woken late, is therefore in no copy and no unit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from select_n_core.errors import LinkError
from select_n_core.links.base import Copy, Direction, Event
from select_n_core.links.emulated import EmulatedCopy, EmulatedEvent, EmulatedLink
from select_n_core.links.pacer import Pacer

SAMPLE_BYTES = 4096  # of each copy that are copied for real; what tells units apart lies in them
_BACK_TO_BACK_S = 0.02  # a step that begins later after the last one owes it nothing


class Timeline:
    """When the compute issued so far ends, on the clock's scale.

    Args:
        clock: seconds. sleep: for so many seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.clock = clock
        self._sleep = sleep
        self._running = False
        self._end_s = clock()
        self._woke_s = self._end_s
        self._waited_s: float | None = None

    @property
    def running(self) -> bool:
        """Whether a step is under way; outside of steps, time is the clock's."""
        return self._running

    def now_s(self) -> float:
        """The moment at which compute would do what the host does now."""
        return self._end_s if self._running else self.clock()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of compute; leaving it blocks the host until the step has ended.

        What the host woke up late by at the end of a step is taken off the next one, if that
        follows at once.
        """
        begun_s = self.clock()
        late_s = self._woke_s - self._end_s
        owed = begun_s - self._woke_s <= _BACK_TO_BACK_S and late_s <= _BACK_TO_BACK_S
        self._end_s = begun_s - (late_s if owed else 0.0)
        self._waited_s = None
        self._running = True
        try:
            yield
        except BaseException:
            self._woke_s = self._end_s = self.clock()
            raise
        else:
            self.sleep_until(self._end_s)
            self._woke_s = self.clock()
        finally:
            self._running = False

    def compute(self, seconds: float) -> None:
        """Compute `seconds` more."""
        self._end_s += seconds

    def reach(self, at_s: float) -> float:
        """Let compute wait for what happens at `at_s`; returns the seconds that it waits."""
        waits_s = max(0.0, at_s - self._end_s)
        self._end_s += waits_s
        self._waited_s = waits_s + (self._waited_s or 0.0)
        return waits_s

    def take_wait(self) -> float | None:
        """Seconds waited since it was asked last; None if there was nothing to wait for."""
        waited_s, self._waited_s = self._waited_s, None
        return waited_s

    def sleep_until(self, at_s: float) -> None:
        """Block the host until `at_s`."""
        while (left_s := at_s - self.clock()) > 0:
            self._sleep(left_s)


class DueEvent(EmulatedEvent):
    """A point in paced compute, whose time is known before it comes.

    Args:
        blocks: whether copies must not begin before: those that share a bus.
    """

    __slots__ = ("_blocks", "_timeline")

    def __init__(self, timeline: Timeline, *, blocks: bool) -> None:
        self._timeline = timeline  # and no flag: nobody sets it
        self._blocks = blocks
        self.at_s = timeline.now_s()

    def done(self) -> bool:
        """See `EmulatedEvent.done`."""
        return self._timeline.clock() >= self.at_s

    def wait(self) -> None:
        """See `EmulatedEvent.wait`: who has the link to itself only needs to know `at_s`."""
        if self._blocks:
            self._timeline.sleep_until(self.at_s)


class PacedLink(EmulatedLink):
    """An emulated link whose compute is paced: copies are samples, events follow the timeline.

    Args:
        timeline: of the compute beside it.
        bytes_per_s, latency_s, pacer: see `EmulatedLink`.
    """

    def __init__(
        self,
        timeline: Timeline,
        bytes_per_s: float,
        latency_s: float = 0.0,
        pacer: Pacer | None = None,
    ) -> None:
        super().__init__(bytes_per_s, latency_s, pacer=pacer, sample_bytes=SAMPLE_BYTES)
        self.timeline = timeline

    def now_s(self) -> float:
        """See `EmulatedLink.now_s`: while a step runs, a moment to come."""
        return self.timeline.now_s()

    def copy(
        self,
        target: Tensor,
        source: Tensor,
        *,
        kind: str,
        after: tuple[Event, ...] = (),
        direction: Direction = Direction.TO_DEVICE,
    ) -> EmulatedCopy:
        """See `Link.copy`: it starts once compute has come to where it was issued."""
        if self.pacer is not None:  # which takes a copy as it comes
            after = (*after, self.compute_event())
        return super().copy(target, source, kind=kind, after=after, direction=direction)

    def move(self, target: Tensor, source: Tensor) -> None:
        """See `Link.move`."""
        super().move(target[:SAMPLE_BYTES], source[:SAMPLE_BYTES])

    def compute_event(self) -> EmulatedEvent:
        """See `Link.compute_event`."""
        return DueEvent(self.timeline, blocks=self.pacer is not None)

    def wait(self, copy: Copy) -> None:
        """See `Link.wait`; within a step, the stall is what compute waits, not the host."""
        if not self.timeline.running:
            super().wait(copy)
            return
        if not isinstance(copy, EmulatedCopy):
            raise LinkError("this copy was issued by another link")
        copy.ended.wait()
        copy.done()
        self.counters.stall_s += self.timeline.reach(copy.ended.at_s)
