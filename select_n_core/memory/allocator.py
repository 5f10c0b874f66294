"""The C allocator's habit of giving memory back: on a CPU every step would pay to get it again."""

from __future__ import annotations

import ctypes
import functools
import logging

_LOG = logging.getLogger(__name__)

_M_TRIM_THRESHOLD = -1  # of glibc's malloc.h
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 64 << 20
_MAPPED_FROM_BYTES = 32 << 20  # the most that glibc takes


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep up to 64 MiB that it freed, and map only what is 32 MiB or more.

    A step allocates the same temporaries again and again. By default glibc returns those of a long
    chunk's attention to the system at once, and faults their pages in anew for every layer: such
    a step takes up to 1.7 times as long. Whether it does so hangs on the largest block that the
    process has freed before, so that two processes differ in speed: one that measured a record
    and one that serves by it.

    Returns:
        Whether the allocator took it; one that is not glibc's has habits of its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    done = mallopt is not None and all(
        mallopt(option, nbytes) == 1
        for option, nbytes in (
            (_M_TRIM_THRESHOLD, _KEPT_BYTES),
            (_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES),
        )
    )
    if not done:
        _LOG.info("the C allocator cannot be told to keep freed memory: long prompts may be slower")
    return done
