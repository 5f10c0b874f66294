"""Mirrors under a lease: which units have a copy in host memory, and how that number moves.

Mirrors always are pi's first m units. They are written once, at load from the checkpoint or
later from a unit's home over the link, a piece at a time between two iterations; they never
change. A smaller lease takes the last ones back: promoted first, then unregistered, then freed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from select_n_core.decisions.layout import ModelMemory
from select_n_core.decisions.order import offload_order
from select_n_core.errors import HostMemoryError, LinkError
from select_n_core.links.base import Copy, Direction, Link
from select_n_core.memory.host import HostBytes, HostMap

_log = logging.getLogger(__name__)

MIRROR = "mirror"  # the kind of link bytes that write a mirror from a home
_MOST_PATIENCE = 1024
PIECE_BYTES = 16 << 20  # between weight copies, a longer one would be a stall


class HostMaps(Protocol):
    """Where mirrors come from: private, or shared by the replicas of a model on a node."""

    def attach(self, unit: int, nbytes: int, fill: Callable[[Tensor], None]) -> HostBytes:
        """The unit's bytes, which `fill` writes unless somebody has done so already."""
        ...

    def find(self, unit: int, nbytes: int) -> HostBytes | None:
        """The unit's bytes if somebody has written them already."""
        ...

    def begin(self, unit: int, nbytes: int) -> HostBytes:
        """Empty bytes for the unit, for nobody else to see until they are published."""
        ...

    def publish(self, unit: int, host: HostBytes) -> None:
        """Let others find what `begin` gave, now that it is written."""
        ...

    def set_aside(self, sizes: Mapping[int, int]) -> None:
        """Keep room for these units (unit -> bytes) and no others, or raise HostMemoryError."""
        ...


class PrivateMaps:
    """Every mirror is this process's own."""

    def attach(self, unit: int, nbytes: int, fill: Callable[[Tensor], None]) -> HostMap:
        """See `HostMaps.attach`."""
        host = self.begin(unit, nbytes)
        fill(host.bytes)
        return host

    def find(self, unit: int, nbytes: int) -> None:
        """See `HostMaps.find`: there is nobody to find."""

    def begin(self, unit: int, nbytes: int) -> HostMap:
        """See `HostMaps.begin`."""
        return HostMap(nbytes)

    def publish(self, unit: int, host: HostBytes) -> None:
        """See `HostMaps.publish`: there is nobody to tell."""

    def set_aside(self, sizes: Mapping[int, int]) -> None:
        """See `HostMaps.set_aside`: nobody counts these bytes."""


class Mirrors:
    """The mirrors of pi's first m units, registered with the link.

    Args:
        lease_bytes: host bytes that they may take.
        most: units that may ever be streamed; room is kept for no more.
    """

    def __init__(
        self, memory: ModelMemory, link: Link, maps: HostMaps, lease_bytes: int, most: int
    ) -> None:
        self._most = most
        self._lease_bytes = lease_bytes
        self._memory = memory
        self._order = offload_order(memory.units)
        self._link = link
        self._maps = maps
        self._hosts: dict[int, HostBytes] = {}
        self._growing: tuple[int, HostBytes, list[Copy]] | None = None
        self._skip = 0  # calls of `grow` that do nothing, after a failure
        self._patience = 1

    @property
    def m(self) -> int:
        """Units mirrored, of which k may be streamed."""
        return len(self._hosts)

    @property
    def lease_bytes(self) -> int:
        """Host bytes that they may take."""
        return self._lease_bytes

    @property
    def cap(self) -> int:
        """Units that the lease allows to mirror."""
        return self._memory.host_cap(self.lease_bytes)

    @property
    def nbytes(self) -> int:
        """Host bytes held, exactly; a mirror that is being written counts."""
        growing = 0 if self._growing is None else self._growing[1].nbytes
        return growing + sum(host.nbytes for host in self._hosts.values())

    def bytes_of(self, unit: int) -> Tensor:
        """A mirror's bytes."""
        return self._hosts[unit].bytes

    def units(self) -> tuple[int, ...]:
        """The mirrored units, in the order pi."""
        return self._order[: self.m]

    def load(self, fills: Sequence[Callable[[Tensor], None]], count: int) -> None:
        """Mirror the first `count` units, each written by its own of `fills` (by unit)."""
        for unit in self._order[:count]:
            host = self._maps.attach(unit, self._memory.unit_bytes[unit], fills[unit])
            self._link.register(host.bytes, read_only=host.read_only)
            self._hosts[unit] = host
        self._set_aside()

    def lease(self, nbytes: int) -> None:
        """Take up to `nbytes` from now on; room for mirrors to come is kept with this call.

        Raises:
            HostMemoryError: more than before, and there is no room; nothing was changed.
        """
        before, self._lease_bytes = self._lease_bytes, nbytes
        try:
            self._set_aside()
        except HostMemoryError as error:
            if nbytes > before:
                self._lease_bytes = before
                raise
            # Who shared a mirror that is to be written has gone, and nobody kept room for it.
            _log.warning("a mirror has to wait for room: %s", error)

    def grow(self, home_of: Callable[[int], Tensor]) -> int | None:
        """Write one more mirror from its unit's home, a call at a time.

        Where a copy fails or there is no room, it is tried again, later and later.

        Returns:
            The unit whose mirror is complete with this call; None while there is nothing new.
        """
        if self._growing is None and self.m >= self.cap:
            return None
        if self._skip:
            self._skip -= 1
            return None
        try:
            if self._growing is None:
                self._begin(self._order[self.m], home_of)
            assert self._growing is not None
            unit, host, copies = self._growing
            if not all(copy.done() for copy in copies):
                return None
        except (LinkError, HostMemoryError) as error:
            self.stop_growing()
            self._skip = self._patience = min(2 * self._patience, _MOST_PATIENCE)
            _log.warning("a mirror could not be written and is tried again later: %s", error)
            return None
        self._growing, self._patience = None, 1
        self._maps.publish(unit, host)
        self._hosts[unit] = host
        return unit

    def _set_aside(self) -> None:
        """Keep room for the mirrors that the lease allows and nobody has begun to write."""
        begun = self.m + (self._growing is not None)
        units = self._order[begun : min(self.cap, self._most)]
        self._maps.set_aside({unit: self._memory.unit_bytes[unit] for unit in units})

    @property
    def to_drop(self) -> int | None:
        """The unit whose mirror the lease does not cover any more, if there is one."""
        return self._order[self.m - 1] if self.m > self.cap else None

    def drop(self, unit: int) -> None:
        """Free the last unit's mirror; no copy from it may be in flight."""
        host = self._hosts.pop(unit)
        self._link.unregister(host.bytes)
        host.close()

    def stop_growing(self) -> None:
        """Give up the mirror that is being written, if any; waits for its copies."""
        if self._growing is not None:
            self._link.drain()
            _, host, _ = self._growing
            self._growing = None
            self._link.unregister(host.bytes)
            host.close()

    def close(self) -> None:
        """Free every mirror. Every view that others made must be forgotten before."""
        self.stop_growing()
        for unit in list(self._hosts):
            self.drop(unit)

    def _begin(self, unit: int, home_of: Callable[[int], Tensor]) -> None:
        nbytes = self._memory.unit_bytes[unit]
        if (found := self._maps.find(unit, nbytes)) is not None:
            self._link.register(found.bytes, read_only=found.read_only)
            self._growing = (unit, found, [])
            return
        host = self._maps.begin(unit, nbytes)
        self._link.register(host.bytes)
        copies: list[Copy] = []
        self._growing = (unit, host, copies)
        home, written = home_of(unit), self._link.compute_event()
        for start in range(0, nbytes, PIECE_BYTES):
            end = min(start + PIECE_BYTES, nbytes)
            copies.append(
                self._link.copy(
                    host.bytes[start:end],
                    home[start:end],
                    kind=MIRROR,
                    after=(written,),
                    direction=Direction.TO_HOST,
                )
            )
