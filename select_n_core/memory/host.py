"""Exact host maps: a mirror takes the bytes it needs and no power of two above."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from typing import Protocol

import torch
from torch import Tensor

from select_n_core.errors import SelectNError
from select_n_core.memory.reservation import Reserves, file_of
from select_n_core.memory.sealed import new_file

_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone


class HostBytes(Protocol):
    """Host memory that somebody owns until `close`.

    Attributes:
        bytes: one flat uint8 tensor. nbytes: its length.
        read_only: a write through `bytes` ends the process; CUDA must be told when it registers.
    """

    bytes: Tensor
    nbytes: int
    read_only: bool

    def close(self) -> None:
        """Give the bytes back once the last tensor over them is gone. Idempotent."""
        ...


class HostMap:
    """An anonymous map of `nbytes` (rounded up to a page), as one flat uint8 tensor.

    Args:
        huge_pages: take them where the system has them, for bytes that are read from all over.
    """

    read_only: bool = False

    def __init__(self, nbytes: int, *, huge_pages: bool = False) -> None:
        if nbytes < 1:
            raise SelectNError(f"a host map needs at least one byte, got {nbytes}")
        self.nbytes = nbytes
        # Shared memory has no huge pages by default; private memory has them for the asking.
        shared = mmap.MAP_PRIVATE if huge_pages else mmap.MAP_SHARED
        self._map: mmap.mmap | None = mmap.mmap(-1, nbytes, flags=shared | mmap.MAP_ANONYMOUS)
        if huge_pages and _HUGE is not None:
            with contextlib.suppress(OSError):  # of a kernel built without them; they are a wish
                self._map.madvise(_HUGE)
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def close(self) -> None:
        """Give the bytes back once the last tensor over them is gone. Idempotent."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._map = None  # unmapped when the last view is collected


class ReservedMap(HostMap):
    """A map of a file of this process's own, written down in a reservation before it is mapped.

    Args:
        what: the bytes are, for people who look at the reservation or the process's maps.

    Raises:
        HostMemoryError: the reservation has no room.
    """

    def __init__(self, nbytes: int, what: str, reservation: Reserves) -> None:
        fd = new_file(what, nbytes)
        try:
            file = file_of(fd)
            reservation.reserve(file, what, nbytes)
            try:
                pages = mmap.mmap(fd, nbytes)
            except BaseException:
                reservation.release(file)
                raise
        finally:
            os.close(fd)
        weakref.finalize(pages, reservation.release, file).atexit = False
        self.nbytes = nbytes
        self._map = pages
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8)
