"""The CUDA link: copy streams, events and registered (pinned) host memory.

Every CUDA call goes through `CudaRuntime`, so that the same link runs under the contract tests
with a runtime that keeps streams and events on a virtual clock.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
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

PIECE_BYTES = 32 << 20  # registering more at once stalls the GPU and its neighbours
_REGISTER_READ_ONLY = 0x08  # cudaHostRegisterReadOnly


class Runtime(Protocol):
    """The few CUDA calls a link makes. Streams and events are opaque to it."""

    def new_stream(self) -> Any:
        """A stream of its own."""
        ...

    def compute_stream(self) -> Any:
        """The stream that compute runs on now."""
        ...

    def record(self, stream: Any) -> Any:
        """An event at the stream's present end."""
        ...

    def stream_wait(self, stream: Any, event: Any) -> None:
        """Make the stream's later work wait for the event; the host goes on."""
        ...

    def copy_async(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Enqueue a copy on the stream; the host goes on."""
        ...

    def event_done(self, event: Any) -> bool:
        """Whether the event has happened."""
        ...

    def synchronize(self, stream: Any) -> None:
        """Block the host until the stream is empty."""
        ...

    def elapsed_s(self, start: Any, end: Any) -> float:
        """Seconds between two events that have happened."""
        ...

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Page-lock a host range; `read_only` where this process may not write to it."""
        ...

    def unpin(self, address: int) -> None:
        """Undo `pin`."""
        ...


class CudaRuntime:
    """The real runtime, on torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise LinkError(
                "link 'cuda' needs a CUDA device and torch sees none here; "
                "use `link: {kind: emulated, bandwidth: ...}` to run on this machine's CPU"
            )
        self._device = device

    def new_stream(self) -> torch.cuda.Stream:
        """See `Runtime`."""
        return torch.cuda.Stream(self._device)

    def compute_stream(self) -> torch.cuda.Stream:
        """See `Runtime`."""
        return torch.cuda.current_stream(self._device)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """See `Runtime`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def stream_wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """See `Runtime`."""
        stream.wait_event(event)

    def copy_async(self, target: Tensor, source: Tensor, stream: torch.cuda.Stream) -> None:
        """See `Runtime`."""
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def event_done(self, event: torch.cuda.Event) -> bool:
        """See `Runtime`."""
        return bool(event.query())

    def synchronize(self, stream: torch.cuda.Stream) -> None:
        """See `Runtime`."""
        stream.synchronize()

    def elapsed_s(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See `Runtime`."""
        return float(start.elapsed_time(end)) / 1e3

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """See `Runtime`."""
        flags = _REGISTER_READ_ONLY if read_only else 0
        status = torch.cuda.cudart().cudaHostRegister(address, nbytes, flags)
        self._check(status, "cudaHostRegister")

    def unpin(self, address: int) -> None:
        """See `Runtime`."""
        self._check(torch.cuda.cudart().cudaHostUnregister(address), "cudaHostUnregister")

    @staticmethod
    def _check(status: Any, call: str) -> None:
        if int(status) != 0:
            raise LinkError(f"{call} failed with CUDA error {int(status)}")


@dataclass(frozen=True, slots=True)
class CudaEvent:
    """An event on a stream."""

    runtime: Runtime
    event: Any

    def done(self) -> bool:
        """See `Event.done`."""
        return self.runtime.event_done(self.event)


@dataclass(frozen=True, slots=True)
class CudaCopy:
    """A copy on a copy stream."""

    runtime: Runtime
    start: Any
    end: Any

    def done(self) -> bool:
        """See `Copy.done`."""
        try:
            return self.runtime.event_done(self.end)
        except RuntimeError as error:
            raise LinkError(f"a copy over the CUDA link failed: {error}") from error

    def duration_s(self) -> float:
        """See `Copy.duration_s`."""
        return self.runtime.elapsed_s(self.start, self.end)


class CudaLink:
    """A GPU's path to host memory: one copy stream per direction.

    Args:
        device: the CUDA device of this replica.
        runtime: None is the real one.
        piece_bytes: host memory is registered in pieces of at most this size, a whole number of
            pages. A copy is enqueued piece by piece, back to back: the driver does not promise
            that one copy may cross from one registration to the next.
    """

    kind = "cuda"

    def __init__(
        self,
        device: torch.device,
        runtime: Runtime | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        if piece_bytes < 1 or piece_bytes % mmap.PAGESIZE:
            raise LinkError(f"piece_bytes must be whole pages, got {piece_bytes}")
        self._runtime = runtime if runtime is not None else CudaRuntime(device)
        self.counters = LinkCounters()
        self._registry = Registry()
        self._pinned: dict[int, Tensor] = {}  # by address
        self._piece_bytes = piece_bytes
        self._streams = {direction: self._runtime.new_stream() for direction in Direction}
        self._closed = False

    def register(self, host: Tensor, *, read_only: bool = False) -> None:
        """See `Link.register`."""
        self._registry.add(host, read_only=read_only)
        done: list[int] = []
        try:
            for start, end in self._pieces(host.data_ptr(), 0, host.numel()):
                self._runtime.pin(host.data_ptr() + start, end - start, read_only=read_only)
                done.append(host.data_ptr() + start)
        except LinkError:
            for address in done:
                self._runtime.unpin(address)
            self._registry.remove(host)
            raise
        self._pinned[host.data_ptr()] = host

    def unregister(self, host: Tensor) -> None:
        """See `Link.unregister`."""
        self._registry.remove(host)
        self._unpin(self._pinned.pop(host.data_ptr()))

    def copy(
        self,
        target: Tensor,
        source: Tensor,
        *,
        kind: str,
        after: tuple[Event, ...] = (),
        direction: Direction = Direction.TO_DEVICE,
    ) -> CudaCopy:
        """See `Link.copy`."""
        if self._closed:
            raise LinkError("the link is closed")
        check_shapes(target, source)
        host = source if direction is Direction.TO_DEVICE else target
        base = self._registry.check(host, direction)
        stream = self._streams[direction]
        for event in after:
            if not isinstance(event, CudaEvent):
                raise LinkError("this event was made by another link")
            self._runtime.stream_wait(stream, event.event)
        start = self._runtime.record(stream)  # after the waits: a stall is not a slow link
        try:
            for begin, stop in self._pieces(base, host.data_ptr() - base, host.numel()):
                self._runtime.copy_async(target[begin:stop], source[begin:stop], stream)
        except RuntimeError as error:
            raise LinkError(f"a copy over the CUDA link failed: {error}") from error
        end = self._runtime.record(stream)
        self.counters.bytes[direction, kind] += source.numel()
        self.counters.copies[direction, kind] += 1
        return CudaCopy(self._runtime, start, end)

    def move(self, target: Tensor, source: Tensor) -> None:
        """See `Link.move`."""
        check_shapes(target, source)
        self._runtime.copy_async(target, source, self._runtime.compute_stream())

    def compute_event(self) -> CudaEvent:
        """See `Link.compute_event`."""
        return CudaEvent(self._runtime, self._runtime.record(self._runtime.compute_stream()))

    def wait(self, copy: Copy) -> None:
        """See `Link.wait`: the compute stream waits, the host goes on."""
        if not isinstance(copy, CudaCopy):
            raise LinkError("this copy was issued by another link")
        self._runtime.stream_wait(self._runtime.compute_stream(), copy.end)

    def drain(self) -> None:
        """See `Link.drain`."""
        for stream in self._streams.values():
            self._runtime.synchronize(stream)

    def close(self) -> None:
        """See `Link.close`."""
        if self._closed:
            return
        self._closed = True
        self.drain()
        for host in self._pinned.values():
            self._unpin(host)
        self._pinned.clear()

    def _unpin(self, host: Tensor) -> None:
        for start, _ in self._pieces(host.data_ptr(), 0, host.numel()):
            self._runtime.unpin(host.data_ptr() + start)

    def _pieces(self, base: int, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """[start, end) offsets into [base + offset, + nbytes), cut at the registration's pieces.

        Cuts lie on page boundaries: two registrations may not share a page.
        """
        first = -base % mmap.PAGESIZE + self._piece_bytes  # the first piece takes the odd start
        cuts = [
            cut - offset for cut in range(first, offset + nbytes, self._piece_bytes) if cut > offset
        ]
        return list(pairwise([0, *cuts, nbytes]))
