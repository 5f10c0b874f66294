"""The emulated link: real copies by a worker thread, paced to a bandwidth and a latency.

The device is an arena in host memory. A worker per direction copies for real, then holds the
copy back until the time it would have taken at the configured rate, or on a bus that it shares
with other links. Pacing keeps an absolute timeline, so a late wake-up of the worker does not add
up.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from select_n_core.errors import LinkError
from select_n_core.links.base import (
    Copy,
    Direction,
    Event,
    LinkCounters,
    Registry,
    check_shapes,
)
from select_n_core.links.pacer import Pacer


class EmulatedEvent:
    """A point in time that compute or a worker has reached."""

    __slots__ = ("_flag", "at_s")

    def __init__(self) -> None:
        self._flag = threading.Event()
        self.at_s = 0.0

    def set(self, at_s: float) -> None:
        """Reach it at `at_s`, on the perf_counter clock."""
        self.at_s = at_s
        self._flag.set()

    def done(self) -> bool:
        """Whether it was reached."""
        return self._flag.is_set()

    def wait(self) -> None:
        """Block until it is reached."""
        self._flag.wait()


@dataclass(eq=False, slots=True)
class EmulatedCopy:
    """A copy in a worker's queue."""

    target: Tensor
    source: Tensor
    after: tuple[EmulatedEvent, ...]
    issued_s: float
    ended: EmulatedEvent = field(default_factory=EmulatedEvent)
    started_s: float = 0.0
    error: Exception | None = None

    def done(self) -> bool:
        """See `Copy.done`."""
        if self.ended.done() and self.error is not None:
            raise LinkError(f"a copy over the emulated link failed: {self.error}") from self.error
        return self.ended.done()

    def duration_s(self) -> float:
        """See `Copy.duration_s`."""
        return self.ended.at_s - self.started_s


class EmulatedLink:
    """A link whose copies take `latency_s + bytes / bytes_per_s`, or longer on a bus in use.

    Args:
        bytes_per_s: of each direction.
        latency_s: of each copy.
        pacer: the bus that this link shares; it is closed with the link.
        sample_bytes: only the first so many bytes of a copy are copied, all are paced and counted.
            For *paced* runs, whose weights nobody computes with. None copies everything.
    """

    kind = "emulated"

    def __init__(
        self,
        bytes_per_s: float,
        latency_s: float = 0.0,
        pacer: Pacer | None = None,
        sample_bytes: int | None = None,
    ) -> None:
        if not bytes_per_s > 0 or latency_s < 0:
            raise LinkError(
                f"an emulated link needs a bandwidth above 0 and a latency of 0 or more, "
                f"got {bytes_per_s} bytes/s and {latency_s} s"
            )
        if sample_bytes is not None and sample_bytes < 0:
            raise LinkError(f"sample_bytes must be 0 or more, got {sample_bytes}")
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.pacer = pacer
        self.sample_bytes = sample_bytes
        self.counters = LinkCounters()
        self._registry = Registry()
        self._workers: dict[Direction, _Worker] = {}
        self._closed = False

    def register(self, host: Tensor, *, read_only: bool = False) -> None:
        """See `Link.register`."""
        self._registry.add(host, read_only=read_only)

    def unregister(self, host: Tensor) -> None:
        """See `Link.unregister`."""
        self._registry.remove(host)

    def copy(
        self,
        target: Tensor,
        source: Tensor,
        *,
        kind: str,
        after: tuple[Event, ...] = (),
        direction: Direction = Direction.TO_DEVICE,
    ) -> EmulatedCopy:
        """See `Link.copy`."""
        if self._closed:
            raise LinkError("the link is closed")
        check_shapes(target, source)
        host = source if direction is Direction.TO_DEVICE else target
        self._registry.check(host, direction)
        events: list[EmulatedEvent] = []
        for event in after:
            if not isinstance(event, EmulatedEvent):
                raise LinkError("this event was made by another link")
            events.append(event)
        copy = EmulatedCopy(target, source, tuple(events), self.now_s())
        if direction not in self._workers:
            self._workers[direction] = _Worker(self, direction)
        self._workers[direction].queue.put(copy)
        self.counters.bytes[direction, kind] += source.numel()
        self.counters.copies[direction, kind] += 1
        return copy

    def now_s(self) -> float:
        """When compute does what the host does now, on the perf_counter clock."""
        return time.perf_counter()

    def move(self, target: Tensor, source: Tensor) -> None:
        """See `Link.move`."""
        check_shapes(target, source)
        target.copy_(source)

    def compute_event(self) -> EmulatedEvent:
        """See `Link.compute_event`: the host is the compute stream, so it happens now."""
        event = EmulatedEvent()
        event.set(self.now_s())
        return event

    def wait(self, copy: Copy) -> None:
        """See `Link.wait`: the host is the compute stream, so it blocks; the time is a stall."""
        if not isinstance(copy, EmulatedCopy):
            raise LinkError("this copy was issued by another link")
        if not copy.done():
            before_s = time.perf_counter()
            copy.ended.wait()
            self.counters.stall_s += time.perf_counter() - before_s
            copy.done()

    def drain(self) -> None:
        """See `Link.drain`."""
        for worker in self._workers.values():
            worker.queue.join()

    def close(self) -> None:
        """See `Link.close`."""
        self._closed = True
        for worker in self._workers.values():
            worker.queue.put(None)
        for worker in self._workers.values():
            worker.thread.join()
        self._workers.clear()
        if self.pacer is not None:
            self.pacer.close()


class _Worker:
    """The copy engine of one direction."""

    def __init__(self, link: EmulatedLink, direction: Direction) -> None:
        self.queue: queue.Queue[EmulatedCopy | None] = queue.Queue()
        self._link = link
        self._direction = direction
        self._free_s = 0.0  # when the link is idle again, on its own timeline
        self.thread = threading.Thread(
            target=self._run, name=f"select-n-link-{direction}", daemon=True
        )
        self.thread.start()

    def _run(self) -> None:
        while (copy := self.queue.get()) is not None:
            try:
                self._carry(copy)
            except Exception as error:
                copy.error = error
                copy.ended.set(time.perf_counter())
            finally:
                del copy  # an idle worker must not keep memory that its owner gave back
                self.queue.task_done()
        self.queue.task_done()

    def _carry(self, copy: EmulatedCopy) -> None:
        ready_s = copy.issued_s
        for event in copy.after:
            event.wait()
            ready_s = max(ready_s, event.at_s)
        copy.started_s = max(ready_s, self._free_s)
        end_s = self._carried_s(copy)
        while (left_s := end_s - time.perf_counter()) > 0:
            time.sleep(left_s)
        self._free_s = end_s
        copy.ended.set(end_s)

    def _carried_s(self, copy: EmulatedCopy) -> float:
        """Copy for real; when the copy ends, which on a bus is known only once it has."""
        link, nbytes = self._link, copy.source.numel()
        if link.pacer is not None:
            link.pacer.start(self._direction, nbytes, copy.started_s, link.bytes_per_s)
        # numpy and not torch: a plain memcpy, off torch's thread pool and without the GIL
        most = link.sample_bytes
        np.copyto(copy.target.numpy()[:most], copy.source.numpy()[:most])
        copied_s = time.perf_counter()
        if link.pacer is not None:
            paced_s = link.pacer.wait(self._direction)
        else:
            paced_s = copy.started_s + nbytes / link.bytes_per_s
        if most is not None:  # a sample is there at once, whenever the worker woke up
            return paced_s + link.latency_s
        return max(paced_s + link.latency_s, copied_s)
