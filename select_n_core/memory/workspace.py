"""What a forward allocates and frees on a CPU: kept by the process, not given back every time."""

from __future__ import annotations

import ctypes
from functools import cache

# mallopt's parameters, from malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_KEPT_BYTES = 64 << 20
_MAPPED_BYTES = 32 << 20  # the most that glibc takes


@cache
def keep_workspace() -> None:
    """Let the C library keep freed memory for the next forward, in the whole process.

    Activations of a prompt chunk are larger than what it keeps by default: each would be mapped,
    faulted in page by page and unmapped again, which costs more than a quarter of a chunk's time.
    Whether it keeps them otherwise hangs on the largest block that the process has freed before, so
    that one that measured a record and one that serves by it would differ in speed. What is kept is
    at most 64 MiB that a forward has used already. C libraries other than glibc have no such
    setting, and none is made.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _MAPPED_BYTES)
        set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
