"""The CUDA link: copy streams, events and registered (pinned) host memory.

Every CUDA call goes through `CudaRuntime`, so that the same link runs under the contract tests
with a runtime that keeps streams and events on a virtual clock.
"""

from __future__ import annotations

from dataclasses import dataclass
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

    def pin(self, address: int, nbytes: int) -> None:
        """Page-lock a host range."""
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

    def pin(self, address: int, nbytes: int) -> None:
        """See `Runtime`."""
        self._check(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0), "cudaHostRegister")

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
    """

    kind = "cuda"

    def __init__(self, device: torch.device, runtime: Runtime | None = None) -> None:
        self._runtime = runtime if runtime is not None else CudaRuntime(device)
        self.counters = LinkCounters()
        self._registry = Registry()
        self._pinned: list[Tensor] = []
        self._streams = {direction: self._runtime.new_stream() for direction in Direction}
        self._closed = False

    def register(self, host: Tensor) -> None:
        """See `Link.register`."""
        self._registry.add(host)
        try:
            self._runtime.pin(host.data_ptr(), host.numel())
        except LinkError:
            self._registry.remove(host)
            raise
        self._pinned.append(host)

    def unregister(self, host: Tensor) -> None:
        """See `Link.unregister`."""
        self._registry.remove(host)
        self._runtime.unpin(host.data_ptr())
        self._pinned = [other for other in self._pinned if other.data_ptr() != host.data_ptr()]

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
        self._registry.check(source if direction is Direction.TO_DEVICE else target)
        stream = self._streams[direction]
        for event in after:
            if not isinstance(event, CudaEvent):
                raise LinkError("this event was made by another link")
            self._runtime.stream_wait(stream, event.event)
        start = self._runtime.record(stream)  # after the waits: a stall is not a slow link
        try:
            self._runtime.copy_async(target, source, stream)
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
        for host in self._pinned:
            self._runtime.unpin(host.data_ptr())
        self._pinned.clear()
