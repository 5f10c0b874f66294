"""Entries: who holds which shared file, checked against the kernel, which has the last word."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from select_n_core.memory.ledger import file_name

_log = logging.getLogger(__name__)


class UnreachableError(Exception):
    """Holders live, and this process may not open what they hold."""


class Holder(BaseModel):
    """A process that has the file open as `fd`; `started` is in clock ticks since boot."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: int
    fd: int

    @staticmethod
    def here(fd: int) -> Holder:
        """This process."""
        started = _start_of(os.getpid())
        assert started is not None
        return Holder(pid=os.getpid(), started=started, fd=fd)

    @property
    def path(self) -> Path:
        """Where the file can be opened while the process lives."""
        return Path(f"/proc/{self.pid}/fd/{self.fd}")


class Entry(BaseModel):
    """What is written of a key: the file of its bytes, and its holders."""

    model_config = ConfigDict(frozen=True)

    key: str
    nbytes: int
    device: int
    inode: int
    holders: tuple[Holder, ...]

    @staticmethod
    def of(key: str, fd: int) -> Entry:
        """The entry of a new file, with no holder yet."""
        found = os.fstat(fd)
        return Entry(
            key=key, nbytes=found.st_size, device=found.st_dev, inode=found.st_ino, holders=()
        )

    @staticmethod
    def read(path: Path) -> Entry | None:
        """The entry at `path`; None if there is none, or none that can be read."""
        try:
            return Entry.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            _log.warning("%s is damaged and will be written anew: %s", path, error)
            return None

    def write(self, path: Path) -> None:
        """Write it whole or not at all, under the key's lock; nobody's entry is removed."""
        if not self.holders:
            path.unlink(missing_ok=True)
            return
        draft = path.with_suffix(".draft")
        draft.write_text(self.model_dump_json(), encoding="utf-8")
        draft.replace(path)

    @property
    def file(self) -> str:
        """Names the kernel's file of the bytes."""
        return file_name(self.device, self.inode)

    def alive(self) -> Entry:
        """This entry with the holders that still hold."""
        live = tuple(holder for holder in self.holders if self._is_held_by(holder))
        return self.model_copy(update={"holders": live})

    def held_by(self, holder: Holder) -> Entry:
        """This entry with one more holder."""
        return self.model_copy(update={"holders": (*self.holders, holder)})

    def pids(self) -> tuple[int, ...]:
        """The processes that hold, each once."""
        return tuple(sorted({holder.pid for holder in self.holders}))

    def open(self) -> int | None:
        """The file, opened read-only through a holder; None if they all have gone meanwhile.

        Raises:
            UnreachableError: none could be opened, and some only for want of permission.
        """
        denied: PermissionError | None = None
        for holder in self.holders:
            if not self._is_held_by(holder):
                continue
            try:
                # Non-blocking: what a holder has just closed may by now be a pipe.
                fd = os.open(holder.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except PermissionError as error:
                denied = error
                continue
            except (FileNotFoundError, ProcessLookupError):
                continue
            if self._is_file(os.fstat(fd)):
                return fd
            os.close(fd)
        if denied is not None:
            raise UnreachableError(f"{denied.filename}: {denied.strerror}")
        return None

    def _is_held_by(self, holder: Holder) -> bool:
        if _start_of(holder.pid) != holder.started:
            return False
        try:
            return self._is_file(holder.path.stat())
        except PermissionError:
            return True  # it lives and may not be looked into: what it wrote is all there is
        except (FileNotFoundError, ProcessLookupError):
            return False

    def _is_file(self, found: os.stat_result) -> bool:
        return (found.st_dev, found.st_ino, found.st_size) == (
            self.device,
            self.inode,
            self.nbytes,
        )


def _start_of(pid: int) -> int | None:
    """When a process started; None if there is none."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(line.rpartition(")")[2].split()[19])  # its name may hold anything, brackets too
