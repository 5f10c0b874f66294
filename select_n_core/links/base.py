"""The contract of a link: ordered copies, events between copy and compute, honest counters.

A copy is *issued* by the compute thread, starts once the events it comes `after` have happened
and the copies issued before it in its direction have ended, and is *done* when its bytes are
readable by compute. Nothing here blocks the host inside a forward: on a GPU `wait` makes the
compute stream wait; on the emulated link the host thread *is* the compute stream.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from select_n_core.errors import LinkError


class Direction(StrEnum):
    """Which way the bytes go; each direction has one ordered queue."""

    TO_DEVICE = "h2d"
    TO_HOST = "d2h"


class Event(Protocol):
    """A point in a queue of work."""

    def done(self) -> bool:
        """Whether the work before it has ended; never blocks."""
        ...


class Copy(Protocol):
    """A copy that was issued."""

    def done(self) -> bool:
        """Whether its bytes have arrived; never blocks. Raises LinkError if it failed."""
        ...

    def duration_s(self) -> float:
        """Seconds from the end of its waits to its end; only once it is done."""
        ...


@dataclass(slots=True)
class LinkCounters:
    """What went over a link since it was opened.

    Attributes:
        bytes: by (direction, kind); kind is the caller's word: `weights`, `kv`.
        copies: by (direction, kind).
        stall_s: compute time spent waiting for copies, where the host can see it (emulated).
    """

    bytes: Counter[tuple[Direction, str]] = field(default_factory=Counter)
    copies: Counter[tuple[Direction, str]] = field(default_factory=Counter)
    stall_s: float = 0.0


class Link(Protocol):
    """A host-device path."""

    kind: str
    counters: LinkCounters

    def register(self, host: Tensor, *, read_only: bool = False) -> None:
        """Make host memory a legal copy partner (pin it); `host` must outlive the registration.

        `read_only` memory is mapped without the right to write: copies may only come from it.
        """
        ...

    def unregister(self, host: Tensor) -> None:
        """Undo `register`."""
        ...

    def copy(
        self,
        target: Tensor,
        source: Tensor,
        *,
        kind: str,
        after: tuple[Event, ...] = (),
        direction: Direction = Direction.TO_DEVICE,
    ) -> Copy:
        """Issue a copy of equal-sized flat uint8 tensors; the host side must be registered."""
        ...

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy device to device as a part of compute: after what was issued before, at once."""
        ...

    def compute_event(self) -> Event:
        """An event that happens when the compute issued so far has ended."""
        ...

    def wait(self, copy: Copy) -> None:
        """Make compute wait for `copy`; raises LinkError if it already failed."""
        ...

    def drain(self) -> None:
        """Block the host until every issued copy has ended; never inside a forward."""
        ...

    def close(self) -> None:
        """Drain and give every resource back. Idempotent."""
        ...


class Registry:
    """The registered host ranges of a link, so that no copy starts from unpinned memory."""

    def __init__(self) -> None:
        self._ranges: dict[int, int] = {}
        self._read_only: set[int] = set()

    def add(self, host: Tensor, *, read_only: bool = False) -> None:
        """Remember a range."""
        if host.device.type != "cpu":
            raise LinkError(f"only host memory can be registered, got a tensor on {host.device}")
        if host.data_ptr() in self._ranges:
            raise LinkError(f"host memory at {host.data_ptr():#x} is already registered")
        self._ranges[host.data_ptr()] = host.numel() * host.element_size()
        if read_only:
            self._read_only.add(host.data_ptr())

    def remove(self, host: Tensor) -> None:
        """Forget a range."""
        if self._ranges.pop(host.data_ptr(), None) is None:
            raise LinkError(f"host memory at {host.data_ptr():#x} is not registered")
        self._read_only.discard(host.data_ptr())

    def check(self, host: Tensor, direction: Direction) -> int:
        """The start of the registered range that `host` lies in; raises unless there is one."""
        start, end = host.data_ptr(), host.data_ptr() + host.numel() * host.element_size()
        for base, nbytes in self._ranges.items():
            if base <= start and end <= base + nbytes:
                if direction is Direction.TO_HOST and base in self._read_only:
                    raise LinkError(f"host memory at {start:#x} was registered as read-only")
                return base
        raise LinkError(
            f"host memory at {start:#x} is not registered with this link; register it first"
        )


def check_shapes(target: Tensor, source: Tensor) -> None:
    """Raise unless both are flat uint8 tensors of one size."""
    for tensor in (target, source):
        if tensor.dim() != 1 or tensor.element_size() != 1 or not tensor.is_contiguous():
            raise LinkError("copies move flat, contiguous uint8 tensors")
    if target.numel() != source.numel():
        raise LinkError(f"copy of {source.numel()} bytes into {target.numel()}")
