"""The room: the folder of entries that the processes of one user on one node read and write."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from select_n_core.errors import HostMemoryError
from select_n_core.memory.entries import Entry, Holder

_RUNTIME_VARIABLE = "XDG_RUNTIME_DIR"


def runtime_directory() -> Path:
    """This user's folder for entries: in XDG_RUNTIME_DIR, else where temporary files lie."""
    runtime = os.environ.get(_RUNTIME_VARIABLE, "")
    root = runtime if runtime and os.access(runtime, os.W_OK) else tempfile.gettempdir()
    return Path(root).absolute() / f"select-n-{os.geteuid()}"


def private_directory(directory: Path) -> Path:
    """The folder, made if need be, that nobody else can enter.

    Raises:
        HostMemoryError: it is somebody else's, or others can enter it.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise HostMemoryError(
            f"{directory} must be a folder of this user that nobody else can enter; run chmod 700 "
            f"on it, remove it, or set {_RUNTIME_VARIABLE} to a folder of yours"
        )
    return directory


class Room:
    """Entries by key, with two locks each: `fill` for as long as one, `entry` for a change.

    Entries mean something in one boot and one PID namespace, so each has a folder of its own.

    Raises:
        HostMemoryError: `directory` is somebody else's, or others can enter it.
    """

    def __init__(self, directory: Path, patience_s: float) -> None:
        self.directory = directory
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # 1 is the version of an entry's form.
        self._room = directory / f"1-{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
        self._patience_s = patience_s
        self._make()
        for path in self._room.glob("*.json"):
            self._strike(path)  # those of processes that died

    def living(self, key: str) -> Entry | None:
        """The entry of `key` with those of its holders that hold; None if none does."""
        entry = Entry.read(self._path(key))
        return entry if entry is not None and (entry := entry.alive()).holders else None

    def all_living(self) -> Iterator[Entry]:
        """Every entry that somebody holds."""
        for path in sorted(self._room.glob("*.json")):
            if (entry := Entry.read(path)) is not None and (entry := entry.alive()).holders:
                yield entry

    def enter(self, entry: Entry, fd: int) -> None:
        """Write `entry` with this process, by its `fd`, as one more holder.

        Raises:
            HostMemoryError: it cannot be written.
        """
        try:
            entry.held_by(Holder.here(fd)).write(self._path(entry.key))
        except OSError as error:
            raise HostMemoryError(
                f"cannot enter {entry.key}: {error}; make room on {self.directory}"
            ) from error

    def strike(self, key: str) -> None:
        """Strike the holders of `key` that hold no more; the last one's entry goes with it."""
        self._strike(self._path(key))

    def remove(self, key: str) -> None:
        """Remove the entry of a key that is this process's own, if there is one."""
        self._path(key).unlink(missing_ok=True)

    def locked_fill(self, key: str) -> AbstractContextManager[None]:
        """The lock under which bytes are filled; the kernel opens it when its process dies."""
        return self._locked(self._path(key), "fill", 0.02)

    def locked_entry(self, key: str) -> AbstractContextManager[None]:
        """The lock under which an entry is read and written."""
        return self._locked(self._path(key), "entry", 0.001)

    def _strike(self, path: Path) -> None:
        if path.exists():
            with self._locked(path, "entry", 0.001):
                if (entry := Entry.read(path)) is not None:
                    entry.alive().write(path)

    def _make(self) -> None:
        private_directory(self.directory)
        self._room.mkdir(exist_ok=True, mode=0o700)

    def _path(self, key: str) -> Path:
        return self._room / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    @contextmanager
    def _locked(self, path: Path, what: str, poll_s: float) -> Iterator[None]:
        self._make()  # cleaners of temporary files may have been here
        lock = FileLock(path.with_suffix(f".{what}.lock"))
        try:
            lock.acquire(timeout=self._patience_s, poll_interval=poll_s)
        except Timeout:
            raise HostMemoryError(
                f"another process has kept the {what} of {path} locked for "
                f"{self._patience_s:.0f} s; end the process that is stuck, or start again later"
            ) from None
        try:
            yield
        finally:
            lock.release()
