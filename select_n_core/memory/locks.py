"""Places in a file: a byte that one open file has locked, until its process ends, however it ends.

The lock belongs to the open file (an OFD lock): two openings in one process exclude each other as
two processes do. A child that is forked without exec inherits the open file and the lock with it.
"""

from __future__ import annotations

import fcntl
import os
import struct

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


def take_place(fd: int, place: int) -> bool:
    """Lock byte `place` for as long as `fd` is open; False if another opening has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _asked(place))
    except (BlockingIOError, PermissionError):  # the kernel may say either
        return False
    return True


def is_taken(fd: int, place: int) -> bool:
    """Whether an opening other than `fd` has byte `place`; the file need not be so long."""
    told = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _asked(place)))
    return bool(told[0] != fcntl.F_UNLCK)


def _asked(place: int) -> bytes:
    return struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
