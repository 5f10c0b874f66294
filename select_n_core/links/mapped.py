"""Mapped words: a small file of aligned 8-byte words that this user's processes share by name.

Every process that opens it holds a place in it, by a lock that the kernel opens when the process
dies, however it dies. A word is written and read whole. The file means nothing after a restart of
the machine, so its name has the boot in it.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from select_n_core.errors import LinkError
from select_n_core.memory.locks import is_taken, take_place
from select_n_core.memory.room import runtime_directory

HEADER = 2  # words: what the file is, and how many words it has
WORD_BYTES = 8

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATIENCE_S = 10.0  # to open: others hold the lock for less than a millisecond

_log = logging.getLogger(__name__)


class MappedWords:
    """The words of one file, and this process's place in it.

    Args:
        name: of what is shared; letters, digits, dot, dash and underscore.
        kind: what the file is, in up to 8 letters; a file of another kind is not understood.
        words: that it has, header included.
        places: that can be held at the same time.
        begin: writes the first words, where nobody else holds a place: all others are zero then.
        directory: None is this user's runtime directory.

    Attributes:
        numbers: the words as floats. counters: the same words as unsigned integers.
        place: this process's own; alone: whether nobody else held one when it was opened.

    Raises:
        LinkError: the file or its folder is somebody else's, is held by processes that take it
            for something else, cannot be written, or has no place left.
    """

    numbers: memoryview[float]
    counters: memoryview[int]
    place: int
    alone: bool
    fd: int
    _map: mmap.mmap
    _bytes: memoryview[int]

    def __init__(
        self,
        name: str,
        kind: str,
        words: int,
        places: int,
        begin: Callable[[memoryview[float]], None],
        directory: Path | None = None,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise LinkError(
                f"a bus needs a name of up to 64 letters, digits, '.', '-' and '_', got {name!r}"
            )
        folder = _private(directory or runtime_directory())
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.path = folder / f"bus-{boot}-{name}.{kind}"
        self._magic = struct.unpack("Q", kind.encode().ljust(8, b"\0"))[0]
        self._words = words
        self._places = places
        self.place = -1
        self._lock = FileLock(self.path.with_suffix(f".{kind}.lock"))
        try:
            with self._lock.acquire(timeout=_PATIENCE_S):
                self._open(begin)
        except Timeout:
            raise LinkError(
                f"another process has kept {self.path} locked for {_PATIENCE_S:.0f} s; end the "
                "process that is stuck"
            ) from None
        except OSError as error:
            raise LinkError(f"cannot share {self.path}: {error.strerror or error}") from error

    @property
    def linked(self) -> bool:
        """Whether the file is still the one that others will find."""
        try:
            return self.path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def held(self, place: int) -> bool:
        """Whether a living process other than this one holds the place; its own counts as held."""
        if place == self.place:
            return True
        return is_taken(self.fd, place)

    def close(self) -> None:
        """Give the place up and unmap the words; the last one removes the file. Idempotent."""
        if self.fd < 0:
            return
        try:
            with self._lock.acquire(timeout=_PATIENCE_S):
                if self.linked and self._alone():
                    self.path.unlink()
                self._close()
        except (Timeout, OSError):  # the file stays, or its folder went: the next one begins anew
            _log.debug("%s stays behind", self.path)
        self._close()

    def _close(self) -> None:
        if self.fd < 0:
            return
        self.numbers.release()
        self.counters.release()
        self._bytes.release()
        self._map.close()
        os.close(self.fd)
        self.fd = -1

    def _open(self, begin: Callable[[memoryview[float]], None]) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._check()
            self._map = mmap.mmap(self.fd, self._words * WORD_BYTES)
        except BaseException:
            os.close(self.fd)
            self.fd = -1
            raise
        self._inode = os.fstat(self.fd).st_ino
        self._bytes = memoryview(self._map)
        self.numbers = self._bytes.cast("d")
        self.counters = self._bytes.cast("Q")
        try:
            self.place = self._take_place()
            self.alone = self._alone()
            if self.alone:
                self._bytes[:] = bytes(len(self._bytes))
                self.counters[1] = self._words
                begin(self.numbers)
                self.counters[0] = self._magic
        except BaseException:
            self._close()
            raise

    def _check(self) -> None:
        """Refuse what is somebody else's; make a file that is new, or torn and held by nobody."""
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise LinkError(f"{self.path} is not a file of this user; remove it or rename the bus")
        size = self._words * WORD_BYTES
        head = struct.pack("QQ", self._magic, self._words)
        if found.st_size == size and os.pread(self.fd, len(head), 0) == head:
            return
        if any(map(self.held, range(self._places))):
            raise LinkError(
                f"{self.path} is held by processes that take it for something else (another "
                "version of select-n?); end them, or give the bus another name"
            )
        if found.st_size:
            _log.warning("%s was not whole; nobody holds it, and it is made anew", self.path)
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, size)

    def _alone(self) -> bool:
        return not any(self.held(place) for place in range(self._places) if place != self.place)

    def _take_place(self) -> int:
        for place in range(self._places):
            if take_place(self.fd, place):
                return place
        raise LinkError(
            f"all {self._places} places of {self.path} are held; end replicas, or put some on a "
            "bus of another name"
        )


def _private(directory: Path) -> Path:
    """The folder, made if need be, that nobody else can enter."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.lstat()
    except OSError as error:
        raise LinkError(f"cannot make {directory}: {error.strerror or error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise LinkError(
            f"{directory} must be a folder of this user that nobody else can enter; run chmod 700 "
            "on it, remove it, or set XDG_RUNTIME_DIR to a folder of yours"
        )
    return directory
