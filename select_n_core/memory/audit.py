"""The audit: what the ledger says of a process against the bytes that the kernel has mapped for it.

Every byte that is reserved lies in a file of ours without a name in any folder, which the kernel
lists in /proc/PID/smaps under a name that begins alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from select_n_core.memory.ledger import Ledger

_PREFIX = "/memfd:select-n:"
_HEAD = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+) +(\S.*)")
_FIELD = re.compile(r"(Size|Rss): +(\d+) kB")


@dataclass(frozen=True, slots=True)
class Mapped:
    """One of our files in a process: bytes that it maps of it, and those that are in memory."""

    what: str
    nbytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A file of which the ledger says another size than the kernel; 0 is not at all."""

    what: str
    reserved_bytes: int
    mapped_bytes: int


def mapped_files(pid: int) -> dict[str, Mapped]:
    """What a process maps of our files, by file; a file mapped twice is counted once.

    Raises:
        FileNotFoundError, PermissionError: there is no such process, or it is not this user's.
    """
    found: dict[str, Mapped] = {}
    for file, mapped in _regions(Path(f"/proc/{pid}/smaps").read_text()):
        before = found.get(file, mapped)
        found[file] = Mapped(
            mapped.what,
            max(mapped.nbytes, before.nbytes),
            max(mapped.resident_bytes, before.resident_bytes),
        )
    return found


def audit(ledger: Ledger, pid: int) -> tuple[Difference, ...]:
    """Where the ledger and the kernel differ about a process; empty where they agree.

    Raises:
        FileNotFoundError, PermissionError: see `mapped_files`.
    """
    reserved = {
        file: pin for each in ledger.holders if each.pid == pid for file, pin in each.pins.items()
    }
    mapped = mapped_files(pid)
    differences = []
    for file in sorted(reserved.keys() | mapped.keys()):
        says = reserved[file].nbytes if file in reserved else 0
        is_ = mapped[file].nbytes if file in mapped else 0
        if says != is_:
            what = reserved[file].what if file in reserved else mapped[file].what
            differences.append(Difference(what, says, is_))
    return tuple(differences)


def _regions(smaps: str) -> Iterator[tuple[str, Mapped]]:
    """Every region of one of our files, in the text of an smaps."""
    file, what, sizes = "", "", {"Size": 0}
    for line in smaps.splitlines():
        if (head := _HEAD.match(line)) is not None or re.match("[0-9a-f]+-", line):
            file = ""
            if head is not None and head[4].startswith(_PREFIX):
                file = f"{head[1]}:{head[2]}:{head[3]}"
                what = head[4].removeprefix(_PREFIX).removesuffix(" (deleted)")
        elif file and (field := _FIELD.match(line)) is not None:
            sizes[field[1]] = int(field[2]) << 10
            if field[1] == "Rss":
                yield file, Mapped(what, sizes["Size"], sizes["Rss"])
