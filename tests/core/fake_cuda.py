"""A CUDA runtime without CUDA: streams, events and copies on a virtual clock, and no patience.

Work is queued on streams as on a GPU: the host goes on at once, and bytes move only when virtual
time reaches the end of their copy. Time moves only where the host waits: `synchronize`, or the
test's own `pass_time`. What a GPU would silently get wrong is a `HazardError` here: overwriting
bytes that queued compute has still to read, reading bytes before their copy has ended, copying
from memory that is not pinned.
"""

import heapq
import itertools
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from select_n_core.errors import LinkError

Range = tuple[int, int]


class HazardError(AssertionError):
    """A GPU would have computed with the wrong bytes."""


@dataclass(eq=False)
class Stream:
    """Work in order; `tail_s` is when what was queued so far has ended."""

    tail_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Event:
    """A moment on a stream."""

    at_s: float


@dataclass
class Reading:
    """A queued compute that reads some bytes; `seen` are the bytes, once it has run."""

    start_s: float
    end_s: float
    seen: Tensor | None = None


@dataclass(frozen=True)
class _Access:
    start_s: float
    end_s: float
    range: Range


@dataclass
class FakeCuda:
    """See the module; implements `select_n_core.links.cuda.Runtime`.

    Attributes:
        bytes_per_s: of a copy on any stream.
        failures: raised by the next copies, one each, as a driver would.
        pinned: address -> bytes of each registration; a copy may not cross from one to the next.
        strict_pages: two registrations may not share a page (torch's small tensors would).
    """

    bytes_per_s: float = 1e9
    latency_s: float = 0.0
    now_s: float = 0.0
    failures: list[Exception] = field(default_factory=list)
    pinned: dict[int, int] = field(default_factory=dict)
    pins_read_only: dict[int, bool] = field(default_factory=dict)
    strict_pages: bool = False
    _compute: Stream = field(default_factory=Stream)
    _device: list[Tensor] = field(default_factory=list)
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: itertools.count = field(default_factory=itertools.count)
    _reads: list[_Access] = field(default_factory=list)
    _writes: list[_Access] = field(default_factory=list)

    # What a test does.

    def device_memory(self, nbytes: int) -> Tensor:
        """Bytes that stand for device memory."""
        self._device.append(torch.zeros(nbytes, dtype=torch.uint8))
        return self._device[-1]

    def compute(self, seconds: float, read: Tensor) -> Reading:
        """Queue compute that reads a tensor for `seconds`; the host goes on."""
        start_s = max(self._compute.tail_s, self.now_s)
        reading = Reading(start_s, start_s + seconds)
        self._compute.tail_s = reading.end_s
        self._read(_Access(reading.start_s, reading.end_s, _range(read)))
        data = read.detach()

        def run() -> None:
            reading.seen = data.clone()

        self._at(reading.end_s, run)
        return reading

    def pass_time(self, seconds: float) -> None:
        """Let the host be busy elsewhere."""
        self._advance(self.now_s + seconds)

    # What the link does.

    def new_stream(self) -> Stream:
        return Stream()

    def compute_stream(self) -> Stream:
        return self._compute

    def record(self, stream: Stream) -> Event:
        return Event(max(stream.tail_s, self.now_s))

    def stream_wait(self, stream: Stream, event: Event) -> None:
        stream.tail_s = max(stream.tail_s, event.at_s)

    def copy_async(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self._check_known(target)
        self._check_known(source)
        start_s = max(stream.tail_s, self.now_s)
        end_s = start_s + self.latency_s + source.numel() / self.bytes_per_s
        self._read(_Access(start_s, end_s, _range(source)))
        self._write(_Access(start_s, end_s, _range(target)))
        stream.tail_s = end_s
        self._at(end_s, lambda: target.copy_(source))

    def event_done(self, event: Event) -> bool:
        return event.at_s <= self.now_s

    def synchronize(self, stream: Stream) -> None:
        self._advance(stream.tail_s)

    def elapsed_s(self, start: Event, end: Event) -> float:
        if not (self.event_done(start) and self.event_done(end)):
            raise RuntimeError("elapsed time of an event that has not happened")
        return end.at_s - start.at_s

    def pin(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        pages = range(address // mmap.PAGESIZE, -(-(address + nbytes) // mmap.PAGESIZE))
        if address in self.pinned:
            raise LinkError("pinned twice")
        if self.strict_pages and any(
            start // mmap.PAGESIZE < pages.stop and pages.start * mmap.PAGESIZE < start + size
            for start, size in self.pinned.items()
        ):
            raise LinkError("a page of it is pinned already")
        self.pinned[address] = nbytes
        self.pins_read_only[address] = read_only

    def unpin(self, address: int) -> None:
        if self.pinned.pop(address, None) is None:
            raise LinkError("unpinned without a pin")

    def _read(self, read: _Access) -> None:
        for write in self._writes:
            if _overlap(write.range, read.range) and write.end_s > read.start_s:
                raise HazardError(
                    f"read from {read.start_s} s on, but delivered only at {write.end_s} s"
                )
        self._reads.append(read)

    def _write(self, write: _Access) -> None:
        for earlier in [*self._reads, *self._writes]:
            if _overlap(earlier.range, write.range) and earlier.end_s > write.start_s:
                raise HazardError(
                    f"overwritten from {write.start_s} s on, but in use until {earlier.end_s} s"
                )
        self._writes.append(write)

    def _check_known(self, tensor: Tensor) -> None:
        low, high = _range(tensor)
        known = [_range(device) for device in self._device]
        known += [(address, address + nbytes) for address, nbytes in self.pinned.items()]
        if not any(start <= low and high <= end for start, end in known):
            raise HazardError("a copy touches memory that is neither the device's nor pinned")

    def _at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time_s, next(self._count), action))

    def _advance(self, to_s: float) -> None:
        self.now_s = max(self.now_s, to_s)
        while self._due and self._due[0][0] <= self.now_s:
            heapq.heappop(self._due)[2]()
        self._reads = [read for read in self._reads if read.end_s > self.now_s]
        self._writes = [write for write in self._writes if write.end_s > self.now_s]


def _range(tensor: Tensor) -> Range:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _overlap(one: Range, other: Range) -> bool:
    return one[0] < other[1] and other[0] < one[1]
