"""Shared maps: immutable host bytes under a name, held once by all processes of a user on a node.

The bytes of a key are a sealed memfd. The first comer fills it; every later one opens it through
`/proc/<pid>/fd` of a holder and so holds it too: the bytes live until the last holder ends,
however it ends. An entry file per key says who holds, and is written when the bytes are whole. Two
locks per key: one is held through a fill, the other for the moment an entry changes.
"""

from __future__ import annotations

import logging
import mmap
import os
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from select_n_core.decisions.lease import paged
from select_n_core.errors import HostMemoryError
from select_n_core.memory.entries import Entry, UnreachableError
from select_n_core.memory.reservation import Reservation, file_of
from select_n_core.memory.room import Room, runtime_directory
from select_n_core.memory.sealed import Fill, freeze, new_file, write_once

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Charge:
    """Bytes held under a key, counted once, and the processes that hold them."""

    nbytes: int
    pids: tuple[int, ...]


class SharedMap:
    """A key's bytes in this process, as one flat uint8 tensor. Made by `SharedMaps`.

    Attributes:
        key: under which they are charged.
        read_only: the pages cannot be written; a write through `bytes` ends the process. Only
            what `begin` gave is writable, in this process alone.
        filled: whether the bytes were written through this map.
    """

    def __init__(
        self, maps: SharedMaps, key: str, fd: int, *, filled: bool, read_only: bool = True
    ) -> None:
        self._maps = maps
        self.key = key
        self.nbytes = os.fstat(fd).st_size
        self.filled = filled
        self.read_only = read_only
        self.fd = fd
        access = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        pages = mmap.mmap(fd, self.nbytes, flags=mmap.MAP_SHARED, prot=access)
        # The open file is what makes a holder: it goes when the last view of the pages has gone.
        weakref.finalize(pages, _let_go, fd, maps.reservation).atexit = False
        self._map: mmap.mmap | None = pages
        with warnings.catch_warnings():
            # It warns of what is meant, and said above: such a tensor is not to be written.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self.bytes: Tensor = torch.frombuffer(pages, dtype=torch.uint8)

    def holders(self) -> tuple[int, ...]:
        """The processes that hold these bytes now."""
        return self._maps.holders(self.key)

    def close(self) -> None:
        """Hold the bytes no more once the last tensor over them is gone. Idempotent."""
        if self._map is None:
            return
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._map = None  # unmapped, and its file closed, when the last view is collected
        self._maps.strike(self.key)


class SharedMaps:
    """The maps that the processes of one user on one node share.

    Processes of different PID namespaces cannot see each other and share among themselves only.
    Where living holders cannot be opened, a process gets bytes of its own, charged beside theirs
    under a key that names it, and says so once.

    Args:
        directory: of the entries, private to the user; None is `runtime_directory()`.
        patience_s: how long to wait for another process, above all while it fills the same key.
        reservation: where bytes are written down before they are; None counts them nowhere.

    Raises:
        HostMemoryError: `directory` is somebody else's, or others can enter it.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        patience_s: float = 600.0,
        reservation: Reservation | None = None,
    ) -> None:
        self._room = Room(directory or runtime_directory(), patience_s)
        self.reservation = reservation
        self._told = False

    def attach(self, key: str, nbytes: int, fill: Fill) -> SharedMap:
        """The bytes of `key`, filled by `fill` unless a living process holds them already.

        Args:
            key: names the content and its layout completely: equal keys, equal bytes.
            fill: writes the uint8 tensor [nbytes] it is given and keeps no view of it.

        Raises:
            HostMemoryError: they do not fit or are refused by the reservation, are held in
                another size, or take another process longer than `patience_s` to fill.
        """
        if (found := self.find(key, nbytes)) is not None:
            return found
        with self._room.locked_fill(key):
            if (found := self.find(key, nbytes)) is not None:
                return found
            fd = self._new_file(key, nbytes)
            try:
                write_once(key, fd, fill)
            except BaseException:
                _let_go(fd, self.reservation)
                raise
            filled = self._mapped(_own_key(key, fd), fd, filled=True)
            self._publish(key, filled)
            return filled

    def find(self, key: str, nbytes: int) -> SharedMap | None:
        """The bytes of `key` if a living process holds them whole; does not wait for a fill.

        Raises:
            HostMemoryError: they are held in another size, or cannot be mapped or reserved.
        """
        _check_size(key, nbytes)
        with self._room.locked_entry(key):
            entry = self._room.living(key)
            if entry is None:
                return None
            if entry.nbytes != nbytes:
                raise HostMemoryError(
                    f"shared map {key} has {entry.nbytes} bytes in processes "
                    f"{', '.join(map(str, entry.pids()))} and {nbytes} were asked for; put all "
                    "that sets the layout (model hash, dtype, unit) into the key, or end them"
                )
            if (fd := self._open(entry)) is None:
                return None
            found = self._mapped(key, fd)
            self._room.enter(entry, found.fd)
            return found

    def begin(self, key: str, nbytes: int) -> SharedMap:
        """Empty, writable bytes for `key`, which nobody finds before they are published.

        Raises:
            HostMemoryError: they do not fit, or are refused by the reservation.
        """
        _check_size(key, nbytes)
        fd = self._new_file(key, nbytes)
        begun = self._mapped(_own_key(key, fd), fd, filled=True, read_only=False)
        self._room.enter(Entry.of(begun.key, fd), begun.fd)
        return begun

    def publish(self, key: str, begun: SharedMap) -> None:
        """Let others find, under `key`, what `begin` gave and is written now.

        Where somebody was quicker, the bytes stay this process's own, charged beside theirs. What
        `find` or `attach` gave is public already.
        """
        if begun.key == key:
            return
        freeze(begun.fd)
        self._publish(key, begun)

    def holders(self, key: str) -> tuple[int, ...]:
        """The processes that hold the bytes of `key` now."""
        entry = self._room.living(key)
        return entry.pids() if entry is not None else ()

    def charged_bytes(self, key: str) -> int:
        """Bytes held under `key` on this node, however many processes hold them; 0 if none does."""
        entry = self._room.living(key)
        return entry.nbytes if entry is not None else 0

    def ledger(self) -> dict[str, Charge]:
        """Every key that somebody holds, with its bytes counted once."""
        return {entry.key: Charge(entry.nbytes, entry.pids()) for entry in self._room.all_living()}

    def strike(self, key: str) -> None:
        """Strike the holders of `key` that hold no more; the last one's entry goes with it."""
        self._room.strike(key)

    def _publish(self, key: str, own: SharedMap) -> None:
        with self._room.locked_entry(key):
            charged = own.key if self._room.living(key) is not None else key
            self._room.enter(Entry.of(charged, own.fd), own.fd)
        own.key, before = charged, own.key
        if before != charged:
            self._room.remove(before)

    def set_aside(self, sizes: Mapping[str, int]) -> None:
        """Keep room for these keys (key -> bytes) and no others: to `begin` them will not fail.

        Raises:
            HostMemoryError: the reservation has no room; nothing was changed.
        """
        if self.reservation is not None:
            self.reservation.set_aside(self.missing_bytes(sizes))

    def missing_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of those keys that nobody on this node holds yet, in whole pages."""
        return sum(paged(size) for key, size in sizes.items() if not self.charged_bytes(key))

    def _new_file(self, key: str, nbytes: int) -> int:
        fd = new_file(key, nbytes)  # which takes no memory until it is written
        if self.reservation is not None:
            try:
                self.reservation.reserve(file_of(fd), key, nbytes)
            except BaseException:
                os.close(fd)
                raise
        return fd

    def _open(self, entry: Entry) -> int | None:
        """The bytes' file, through a holder that has it; None if none can be opened."""
        fd: int | None = None
        # Before it is opened: if its last holder dies meanwhile, the bytes are still counted.
        if self.reservation is not None:
            self.reservation.reserve(entry.file, entry.key, entry.nbytes)
        try:
            fd = entry.open()
        except UnreachableError as error:
            self._tell(entry.key, error)
        except OSError as error:
            raise HostMemoryError(
                f"cannot open shared map {entry.key}: {error}; raise `ulimit -n` if open files ran "
                "out"
            ) from error
        finally:
            if fd is None and self.reservation is not None:
                self.reservation.release(entry.file)
        return fd

    def _mapped(
        self, key: str, fd: int, *, filled: bool = False, read_only: bool = True
    ) -> SharedMap:
        """Map the file; takes `fd`."""
        try:
            return SharedMap(self, key, fd, filled=filled, read_only=read_only)
        except OSError as error:
            _let_go(fd, self.reservation)
            raise HostMemoryError(
                f"cannot map {key}: {error}; raise `ulimit -n` if open files ran out"
            ) from error

    def _tell(self, key: str, error: UnreachableError) -> None:
        if not self._told:
            self._told = True
            _log.warning(
                "process %d cannot open shared maps of other processes (%s): it keeps bytes of its "
                "own, those of %s first; run the replicas of a node as one user",
                os.getpid(),
                error,
                key,
            )


def _let_go(fd: int, reservation: Reservation | None) -> None:
    """Close the file, then release its bytes."""
    file = file_of(fd)
    os.close(fd)
    if reservation is not None:
        reservation.release(file)


def _own_key(key: str, fd: int) -> str:
    """Under which bytes are charged that only this process can have."""
    return f"{key} (process {os.getpid()} alone, file {fd})"


def _check_size(key: str, nbytes: int) -> None:
    if nbytes < 1:
        raise HostMemoryError(f"shared map {key} needs at least one byte, got {nbytes}")
