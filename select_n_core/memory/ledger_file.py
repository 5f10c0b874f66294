"""A domain's files: the ledger, its lock, and the file of places that the living have locked."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from select_n_core.errors import HostMemoryError
from select_n_core.memory.domain import Domain
from select_n_core.memory.ledger import Holder, Ledger
from select_n_core.memory.locks import is_taken, take_place
from select_n_core.memory.room import private_directory

_PREFIX = "host-1-"  # 1 is the version of the form
_log = logging.getLogger(__name__)


class LedgerFile:
    """The files of one domain, as one process opened them. All but `locked` is called under it.

    Args:
        directory: private to the user, made if need be.

    Raises:
        HostMemoryError: `directory` is somebody else's, or others can enter it.
    """

    def __init__(self, domain: Domain, directory: Path, patience_s: float) -> None:
        self._directory = private_directory(directory)
        self._path = directory / f"{_PREFIX}{domain.id}.json"
        self._places = self._path.with_suffix(".places")
        self._capacity_bytes = domain.capacity_bytes
        self._patience_s = patience_s
        self._lock = FileLock(self._path.with_suffix(".lock"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The lock under which the ledger is read and written; the kernel opens it at a death.

        Raises:
            HostMemoryError: another process has it for too long, or the files cannot be written.
        """
        private_directory(self._directory)  # cleaners of temporary files may have been here
        try:
            self._lock.acquire(timeout=self._patience_s, poll_interval=0.001)
        except Timeout:
            raise HostMemoryError(
                f"another process has kept {self._path} locked for {self._patience_s:.0f} s; end "
                "the process that is stuck, or start again later"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._lock.release()

    def read(self) -> Ledger:
        """The ledger as it was written, the dead among its holders."""
        new = Ledger(capacity_bytes=self._capacity_bytes)
        try:
            found = Ledger.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return new
        except ValidationError as error:
            _log.warning("%s is damaged; its holders write it anew: %s", self._path, error)
            return new
        return found.model_copy(update={"capacity_bytes": self._capacity_bytes})

    def write(self, ledger: Ledger) -> None:
        """Write it, whole or not at all."""
        draft = self._path.with_suffix(".draft")
        draft.write_text(ledger.model_dump_json(), encoding="utf-8")
        draft.replace(self._path)

    def exists(self) -> bool:
        """Whether there is a ledger."""
        return self._path.exists()

    def written(self) -> object:
        """Differs whenever somebody wrote; None while there is no ledger."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def open_places(self) -> int:
        """The file of places, opened: what is locked through it is held until it is closed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._places, flags, 0o600)

    def is_linked(self, fd: int) -> bool:
        """Whether the file of places is still the one that others will find."""
        try:
            return self._places.stat().st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            return False

    def take_place(self, fd: int) -> int:
        """Lock a place that was never anybody's, so that no dead holder's bytes stand there."""
        place = self.read().next_place
        while not take_place(fd, place):
            place += 1
        return place

    def living(self, ledger: Ledger, fd: int, own: int | None = None) -> Ledger:
        """The ledger without its dead; `own` is the place that `fd` itself has."""

        def is_gone(holder: Holder) -> bool:
            return holder.place != own and not is_taken(fd, holder.place)

        return ledger.without(is_gone)

    def _unwritable(self, error: OSError) -> HostMemoryError:
        return HostMemoryError(
            f"cannot write {self._path}: {error.strerror or error}; make room on {self._directory}"
        )


class LedgerReader:
    """Reads a domain's ledger again and again; cheap while nobody writes. Not for several threads.

    Args:
        directory: see `LedgerFile`.
        recheck_s: a holder that died is noticed so late where nobody wrote meanwhile.

    Raises:
        HostMemoryError: see `LedgerFile`.
    """

    def __init__(
        self,
        domain: Domain,
        directory: Path,
        *,
        patience_s: float = 10.0,
        recheck_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = LedgerFile(domain, directory, patience_s)
        self._recheck_s = recheck_s
        self._clock = clock
        self._read: tuple[object, float, Ledger] | None = None

    def read(self) -> Ledger:
        """The domain as it stands, its living holders only; nothing is written.

        Raises:
            HostMemoryError: see `LedgerFile.locked`.
        """
        now_s, written = self._clock(), self._files.written()
        if self._read is not None:
            before, read_s, ledger = self._read
            if written == before and now_s - read_s < self._recheck_s:
                return ledger
        with self._files.locked():
            written, fd = self._files.written(), self._files.open_places()
            try:
                ledger = self._files.living(self._files.read(), fd)
            finally:
                os.close(fd)
        self._read = (written, now_s, ledger)
        return ledger


def read_ledger(domain: Domain, directory: Path, patience_s: float = 10.0) -> Ledger:
    """The domain as it stands, its living holders only; nothing is written.

    Raises:
        HostMemoryError: see `LedgerFile`.
    """
    return LedgerReader(domain, directory, patience_s=patience_s).read()


def domains_at(directory: Path) -> tuple[Domain, ...]:
    """The domains of this boot that have a ledger in a folder, with the capacity written there.

    Raises:
        HostMemoryError: one is damaged.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = []
    for path in sorted(directory.glob(f"{_PREFIX}{boot}-*.json")):
        try:
            capacity_bytes = Ledger.model_validate_json(path.read_bytes()).capacity_bytes
        except ValidationError as error:
            raise HostMemoryError(
                f"{path} is damaged; whoever reserves next writes it anew, so try again later"
            ) from error
        found.append(Domain(path.stem.removeprefix(_PREFIX), capacity_bytes, capacity_bytes))
    return tuple(found)
