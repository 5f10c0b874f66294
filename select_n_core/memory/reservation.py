"""The reservation of host memory: before a byte is pinned, it is written down in its domain's file.

All processes of a domain write in one ledger, under one lock, and a reservation that does not fit
is refused: so they never pin more than the domain has, whoever told them to. Each holder has a
byte of a second file locked for life; the kernel unlocks it when the process ends, however it
ends, and whoever comes next strikes what it held.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from select_n_core.decisions.lease import paged
from select_n_core.errors import HostMemoryError
from select_n_core.memory.domain import Domain
from select_n_core.memory.ledger import Holder, Ledger, Pin, file_name
from select_n_core.memory.ledger_file import LedgerFile
from select_n_core.memory.room import runtime_directory

_PATIENCE_S = 10.0  # for the lock: others hold it for a millisecond
_PAUSE_S = 0.1  # between two looks whether there is room

_log = logging.getLogger(__name__)


class Reserves(Protocol):
    """Where bytes are written down before they are pinned; `Reservation` says what is promised."""

    def reserve(self, file: str, what: str, nbytes: int) -> None:
        """Write down `nbytes` of a kernel's file."""
        ...

    def release(self, file: str) -> None:
        """Strike them: they are pinned no more."""
        ...


def file_of(fd: int) -> str:
    """Names the kernel's file behind `fd`."""
    found = os.fstat(fd)
    return file_name(found.st_dev, found.st_ino)


class Reservation:
    """One holder's reservation in its domain. Threads may use it.

    Args:
        name: of the holder, for people.
        group: of those who may share its pins, for controllers; empty is nobody.
        directory: of the domain's files, private to the user; None is `runtime_directory()`.
        patience_s: for another process that has the ledger.

    Raises:
        HostMemoryError: `directory` is not the user's own, or the ledger cannot be written.
    """

    def __init__(
        self,
        domain: Domain,
        name: str,
        *,
        group: str = "",
        directory: Path | None = None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self.domain = domain
        self._files = LedgerFile(domain, directory or runtime_directory(), patience_s)
        self._own = Holder(place=0, name=name, pid=os.getpid(), group=group)
        self._fd = -1
        self._busy = threading.Lock()
        self._unpinned: deque[str] = deque()
        self._maps: Counter[str] = Counter()  # of each file, in this process
        with self._change():
            pass

    @property
    def held_bytes(self) -> int:
        """All that this holder pinned, shared or not, and what is kept for it."""
        return self._own.held_bytes

    @property
    def aside_bytes(self) -> int:
        """Kept for this holder, and not pinned yet."""
        return self._own.aside_bytes

    def pins(self) -> dict[str, Pin]:
        """What this holder reserved to pin, by file."""
        return dict(self._own.pins)

    def reserve(self, file: str, what: str, nbytes: int) -> None:
        """Write down `nbytes` of `file`, in whole pages, before they are pinned.

        What another living holder pinned of the same file is counted already. Otherwise bytes
        come from those kept aside first.

        Args:
            file: see `file_of`. One that is reserved already costs nothing, and must be
                released as often.
            what: they are, for people.

        Raises:
            HostMemoryError: they do not fit, with who holds what; nothing was changed.
        """
        with self._change() as change:
            own, nbytes, change.mapped = self._own, paged(nbytes), file
            if file in own.pins:
                return
            taken = 0 if change.others.has(file) else min(own.aside_bytes, nbytes)
            changed = own.model_copy(
                update={
                    "pins": {**own.pins, file: Pin(what=what, nbytes=nbytes)},
                    "aside_bytes": own.aside_bytes - taken,
                }
            )
            change.to(changed, what, nbytes)

    def release(self, file: str) -> None:
        """Strike the bytes of `file`, a map of which this process has unmapped; never raises.

        Safe wherever the last view of a map may be collected, also amid another call.
        """
        self._unpinned.append(file)
        self._settle()

    def set_aside(self, nbytes: int) -> None:
        """Keep exactly `nbytes` for pins to come, beside what is pinned.

        Raises:
            HostMemoryError: more than before, and they do not fit; nothing was changed.
        """
        with self._change() as change:
            more = nbytes - self._own.aside_bytes
            change.to(self._own.model_copy(update={"aside_bytes": nbytes}), "a lease", more)

    def wait_aside(
        self,
        need: Callable[[], int],
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """As `set_aside`, but wait for others to give back; the ledger shows what is waited for.

        Args:
            need: bytes to keep, asked before every try: others may pin what is to be shared.

        Raises:
            HostMemoryError: there was no room within `deadline_s`.
        """
        end_s = clock() + deadline_s
        while True:
            nbytes = need()
            try:
                self.set_aside(nbytes)
            except HostMemoryError:
                if clock() >= end_s:
                    self._waits_for(0)
                    raise
                self._waits_for(nbytes - self._own.aside_bytes)
                pause(_PAUSE_S)
                continue
            return self._waits_for(0)

    def set_floor(self, nbytes: int) -> None:
        """Say what this holder cannot serve without, for controllers; see `Holder.floor_bytes`."""
        with self._change() as change:
            change.to(self._own.model_copy(update={"floor_bytes": nbytes}))

    def set_budget(self, nbytes: int | None) -> None:
        """Let the domain's holders together pin no more than `nbytes`; None is all it has.

        It stands until it is set anew or the last holder ends. Bytes beyond a smaller budget
        stay; no more are pinned until they have gone.
        """
        with self._change() as change:
            change.ledger = change.ledger.model_copy(update={"budget_bytes": nbytes})

    def ledger(self) -> Ledger:
        """The domain as it stands, its living holders only."""
        with self._change() as change:
            return change.ledger

    def keep(self) -> None:
        """Write the files anew if they were removed under their holders; call it now and then.

        Until every holder has, a newcomer may take what they hold for free: cleaners of temporary
        files do that to files that are old.
        """
        if self._fd >= 0 and not (self._files.exists() and self._files.is_linked(self._fd)):
            self.ledger()

    def close(self) -> None:
        """Give everything back; what is still mapped must not be used any more. Idempotent."""
        with self._busy:
            if self._fd < 0:
                return
            try:
                with self._files.locked():
                    if self._files.is_linked(self._fd):
                        # Its own place is not taken by another, and so struck as a dead one's.
                        self._files.write(self._files.living(self._files.read(), self._fd))
            except HostMemoryError as error:
                _log.warning("what this process held is struck by whoever comes next: %s", error)
            finally:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _waits_for(self, nbytes: int) -> None:
        if nbytes != self._own.waiting_bytes:
            with self._change() as change:
                change.to(self._own.model_copy(update={"waiting_bytes": nbytes}))

    def _settle(self) -> None:
        """Strike what was released, unless somebody is at it: they look again when they end."""
        while self._unpinned and self._fd >= 0 and self._busy.acquire(blocking=False):
            try:
                with self._locked_change():
                    pass
            except HostMemoryError as error:  # on the safe side: the bytes stay written down
                _log.warning("released bytes are struck with the next change: %s", error)
                return
            finally:
                self._busy.release()

    @contextmanager
    def _change(self) -> Iterator[_Change]:
        # Not `with self._busy` around all: who releases meanwhile leaves it to the one inside.
        with self._busy, self._locked_change() as change:
            yield change
        self._settle()

    @contextmanager
    def _locked_change(self) -> Iterator[_Change]:
        with self._files.locked():
            self._enter()
            while self._unpinned:
                file = self._unpinned.popleft()
                self._maps[file] -= 1
                if self._maps[file] > 0:
                    continue
                del self._maps[file]
                left = {each: pin for each, pin in self._own.pins.items() if each != file}
                self._own = self._own.model_copy(update={"pins": left})
            written = self._files.read()
            living = self._files.living(written, self._fd, self._own.place)
            change = _Change(living.with_holder(self._own), self._own)
            try:
                yield change
                if change.mapped is not None:
                    self._maps[change.mapped] += 1
            finally:
                if change.ledger != written:
                    self._files.write(change.ledger)
                self._own = change.own

    def _enter(self) -> None:
        """Take a place, anew where the files were removed under their holders."""
        if self._fd >= 0 and self._files.is_linked(self._fd):
            return
        if self._fd < 0 and self._own.place:
            raise HostMemoryError(f"the reservation of {self._own.name} is closed; open another")
        fd = self._files.open_places()
        if self._fd >= 0:
            os.close(self._fd)
            _log.warning("the ledger of %s was removed; its holders meet anew", self.domain.id)
        place = self._files.take_place(fd)
        self._fd, self._own = fd, self._own.model_copy(update={"place": place})


class _Change:
    """A change of one holder, under the domain's lock."""

    def __init__(self, ledger: Ledger, own: Holder) -> None:
        self.ledger = ledger
        self.own = own
        self.mapped: str | None = None  # a file of which there is one map more

    @property
    def others(self) -> Ledger:
        """Everyone else."""
        return self.ledger.without(lambda each: each.place == self.own.place)

    def to(self, own: Holder, what: str = "", nbytes: int = 0) -> None:
        """Let the holder be `own` from now on; see `Ledger.admitting`."""
        self.ledger = self.ledger.admitting(own, what, nbytes)
        self.own = own
