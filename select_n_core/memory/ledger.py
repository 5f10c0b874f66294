"""The ledger of a domain: who holds how many pinned bytes, and whether more fit.

What is written in a domain's file, and the arithmetic over it. Bytes that several processes map
are one file of the kernel's and are counted once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from select_n_core.errors import HostMemoryError
from select_n_core.quantities import format_bytes


def file_name(device: int, inode: int) -> str:
    """Names a file of the kernel's as /proc/PID/maps does."""
    return f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"


class _Written(BaseModel):
    model_config = ConfigDict(frozen=True)


class Pin(_Written):
    """Bytes of one file of the kernel's, whole pages; `what` says what they are, for people."""

    what: str
    nbytes: NonNegativeInt


class Holder(_Written):
    """One holder: an engine, by its lock.

    Attributes:
        place: the byte that it has locked. pid: as its own namespace numbers it.
        group: of those who may share its pins; empty is nobody.
        floor_bytes: that it cannot serve without.
        aside_bytes: kept for it, and not pinned yet.
        waiting_bytes: that it waits for; nothing is kept for it yet.
        pins: by file.
    """

    place: int
    name: str
    pid: int
    group: str = ""
    floor_bytes: NonNegativeInt = 0
    aside_bytes: NonNegativeInt = 0
    waiting_bytes: NonNegativeInt = 0
    pins: Mapping[str, Pin] = {}

    @property
    def held_bytes(self) -> int:
        """All that it pinned, shared or not, and what is kept for it."""
        return self.aside_bytes + sum(pin.nbytes for pin in self.pins.values())

    @property
    def group_id(self) -> str:
        """Of its group, or of its own."""
        return self.group or f"place {self.place}"


class Ledger(_Written):
    """A domain's holders at one instant.

    Attributes:
        capacity_bytes: that may be pinned in the domain.
        budget_bytes: what a controller allows of it; None is all.
        next_place: that was never anybody's.
    """

    capacity_bytes: NonNegativeInt
    budget_bytes: NonNegativeInt | None = None
    next_place: int = 1
    holders: tuple[Holder, ...] = ()

    @property
    def limit_bytes(self) -> int:
        """What may be used: the capacity, or less where the budget is less."""
        if self.budget_bytes is None:
            return self.capacity_bytes
        return min(self.budget_bytes, self.capacity_bytes)

    @property
    def used_bytes(self) -> int:
        """Pinned or kept for somebody; what is shared counts once."""
        files = {file: pin.nbytes for each in self.holders for file, pin in each.pins.items()}
        return sum(files.values()) + sum(each.aside_bytes for each in self.holders)

    @property
    def free_bytes(self) -> int:
        """What could be pinned now."""
        return max(0, self.limit_bytes - self.used_bytes)

    def held_bytes_by_group(self) -> dict[str, int]:
        """What every group holds, each file once; whoever has no group is one of their own.

        As files are shared within groups alone, they add up to `used_bytes`.
        """
        groups: dict[str, list[Holder]] = {}
        for each in self.holders:
            groups.setdefault(each.group_id, []).append(each)
        return {
            group: self.model_copy(update={"holders": tuple(members)}).used_bytes
            for group, members in groups.items()
        }

    def has(self, file: str) -> bool:
        """Whether somebody pinned that file."""
        return any(file in each.pins for each in self.holders)

    def with_holder(self, holder: Holder) -> Ledger:
        """This ledger with `holder` as it is now, in the place of what stood there of it."""
        known = any(each.place == holder.place for each in self.holders)
        kept = tuple(holder if each.place == holder.place else each for each in self.holders)
        return self.model_copy(
            update={
                "holders": kept if known else (*kept, holder),
                "next_place": max(self.next_place, holder.place + 1),
            }
        )

    def without(self, is_gone: Callable[[Holder], bool]) -> Ledger:
        """This ledger less those who are gone; the budget goes with the last one."""
        left = tuple(each for each in self.holders if not is_gone(each))
        budget = self.budget_bytes if left else None
        return self.model_copy(update={"holders": left, "budget_bytes": budget})

    def admitting(self, holder: Holder, what: str, nbytes: int) -> Ledger:
        """This ledger with `holder` as it is now.

        Args:
            what, nbytes: it asks for, for people.

        Raises:
            HostMemoryError: more would be used than is, and more than there may be.
        """
        after = self.with_holder(holder)
        if after.used_bytes > max(after.limit_bytes, self.used_bytes):
            others = self.without(lambda each: each.place == holder.place)
            raise HostMemoryError(
                f"{what} of {holder.name} takes {format_bytes(nbytes, up=True)} of host memory, "
                f"{format_bytes(self.free_bytes)} of {format_bytes(self.limit_bytes)} are free "
                f"({others.told()}); lower `host_memory`, end one of them, or give this node more"
            )
        return after

    def told(self) -> str:
        """Who holds what, for people; the largest first."""
        held = sorted(self.holders, key=lambda each: -each.held_bytes)
        lines = [
            f"{each.name} (process {each.pid}) {format_bytes(each.held_bytes)}, "
            f"{format_bytes(each.floor_bytes)} of it its floor"
            for each in held
            if each.held_bytes
        ]
        return "; ".join(lines) or "nobody holds any"
