"""Sealed files: bytes in anonymous memory that are written once and never change again."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from select_n_core.errors import HostMemoryError
from select_n_core.quantities import format_bytes

Fill = Callable[[Tensor], None]

_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; the fcntl module has no name for it
_log = logging.getLogger(__name__)


def new_file(name: str, nbytes: int) -> int:
    """A new memfd of exactly `nbytes`, and of no other size ever. Returns its descriptor.

    Raises:
        HostMemoryError: there can be no such file.
    """
    try:
        # Refused here if no state of this machine could hold it; a memfd would just grow.
        mmap.mmap(-1, nbytes).close()
        fd = os.memfd_create(f"select-n:{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise HostMemoryError(
            f"cannot map {format_bytes(nbytes)} of host memory for {name}: {error.strerror}; "
            "lower `host_memory`, or raise `ulimit -n` if open files ran out"
        ) from error
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def write_once(name: str, fd: int, fill: Fill) -> None:
    """Let `fill` write the bytes of a new file, then freeze them.

    Raises:
        HostMemoryError: `fill` kept a view, through which the bytes could still change.
    """
    writable = mmap.mmap(fd, os.fstat(fd).st_size)
    view = torch.frombuffer(writable, dtype=torch.uint8)
    fill(view)
    mapped = weakref.ref(writable)
    # Not closed but dropped: close() would unmap the bytes under a view that somebody kept.
    del view, writable
    if mapped() is not None:
        raise HostMemoryError(
            f"what filled {name} kept a view of it and could still write; "
            "drop every view before the fill returns"
        )
    freeze(fd)


def freeze(fd: int) -> None:
    """Refuse every new way to write the file; maps that are writable already stay so."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A kernel before the seal. Peers open and map the file read-only all the same.
        _log.warning("this kernel cannot seal shared maps against writing")
