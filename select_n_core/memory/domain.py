"""The budget domain: the tightest limit on memory that this process stands under, and its name.

Processes that stand under the same limit share one budget, whichever application they belong to.
The limit is a control group's (version 2 or 1, the tightest along the process's path) or the
node's memory. The name is the same from every mount of the control groups: it is made of the
group's inode, not of a path, which differs between containers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from select_n_core.errors import HostMemoryError

_HEADROOM = 0.10  # of the limit: for all that is not pinned; Ray ends workers at 95% of it


@dataclass(frozen=True, slots=True)
class Domain:
    """A limit on memory that several processes share.

    Attributes:
        id: the same for all of them, and no other domain's on this machine in this boot.
        limit_bytes: at which the kernel ends somebody.
        capacity_bytes: of it, what may be pinned.
        group: the control group's folder; None where the node is the limit.
    """

    id: str
    limit_bytes: int
    capacity_bytes: int
    group: Path | None = None


def find_domain(root: Path = Path("/")) -> Domain:
    """The domain of this process.

    Args:
        root: of the file system with `proc` and the control groups.

    Raises:
        HostMemoryError: the kernel does not say how much memory the node has.
    """
    node_bytes = _node_bytes(root)
    limits = [(limit, group) for group, limit in _limits(root) if limit < node_bytes]
    # Of equal limits the outermost, where more processes meet.
    limit_bytes, group = min(
        limits, key=lambda found: (found[0], len(found[1].parts)), default=(node_bytes, None)
    )
    name = "node"
    if group is not None:
        found = group.stat()
        name = f"group-{found.st_dev}-{found.st_ino}"
    boot = (root / "proc/sys/kernel/random/boot_id").read_text().strip()
    return Domain(f"{boot}-{name}", limit_bytes, int(limit_bytes * (1 - _HEADROOM)), group)


def _node_bytes(root: Path) -> int:
    text = (root / "proc/meminfo").read_text()
    if (found := re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)) is None:
        raise HostMemoryError(f"{root / 'proc/meminfo'} has no MemTotal; is /proc mounted here?")
    return int(found[1]) << 10


def _limits(root: Path) -> Iterator[tuple[Path, int]]:
    """Every limit on the way from this process's control groups to their roots."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        number, kinds, path = line.split(":", 2)
        if number == "0":
            mount, name = _mount(root, "cgroup2", ""), "memory.max"
        elif "memory" in kinds.split(","):
            mount, name = _mount(root, "cgroup", "memory"), "memory.limit_in_bytes"
        else:
            continue
        if mount is None:
            continue
        top, begins_at = mount
        inside = PurePosixPath(path)
        # A path outside of what is mounted (another namespace's) leaves the mount's own root.
        below = inside.relative_to(begins_at) if inside.is_relative_to(begins_at) else ""
        group = top / below if ".." not in inside.parts else top
        for folder in (group, *group.parents):
            file = folder / name
            if file.exists() and (limit := file.read_text().strip()) != "max":
                yield folder, int(limit)
            if folder == top:
                break


def _mount(root: Path, kind: str, option: str) -> tuple[Path, PurePosixPath] | None:
    """Where control groups are mounted, and the group that the mount begins at."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields, (fstype, _, options) = before.split(), after.split()[:3]
        if fstype == kind and (not option or option in options.split(",")):
            point = root / _unescaped(fields[4]).lstrip("/")
            return point, PurePosixPath(_unescaped(fields[3]))
    return None


def _unescaped(path: str) -> str:
    """The kernel writes blanks and backslashes in paths as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
