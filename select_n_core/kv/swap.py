"""Host KV blocks: where the cache of a preempted request waits until it may go on.

A fixed number of blocks in one exact, registered host map. Copies run over the link like all
others, and every order between them and compute goes through the compute stream: a copy starts
after the compute issued so far, and compute waits for it before the bytes change owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from select_n_core.errors import DeviceMemoryError, LinkError
from select_n_core.links.base import Copy, Direction, Link
from select_n_core.memory.host import HostMap, ReservedMap
from select_n_core.memory.reservation import Reserves

KV = "kv"
PIECE_BYTES = 16 << 20  # between weight copies, so that none of those waits for long


@dataclass(slots=True)
class _Kept:
    """One owner's host blocks, and the copies back that were issued."""

    blocks: list[int]
    coming_back: list[Copy] = field(default_factory=list)


class HostBlocks:
    """`count` host blocks of `block_bytes` bytes each, registered with `link`; 0 keeps nothing.

    The verbs come in pairs: `keep` and `drop`, `bring_back` and `settle`. The link is the
    caller's and must outlive this.

    Args:
        reservation: where the bytes are written down first; None counts them nowhere.

    Raises:
        SelectNError: the host cannot give or register that much, or the reservation has no room.
    """

    def __init__(
        self, count: int, block_bytes: int, link: Link, reservation: Reserves | None = None
    ) -> None:
        self.count = count
        self.block_bytes = block_bytes
        self._link = link
        self._map: HostMap | None = None
        if count and reservation is not None:
            self._map = ReservedMap(count * block_bytes, "host KV", reservation)
        elif count:
            self._map = HostMap(count * block_bytes)
        self._free = list(range(count))
        self._kept: dict[str, _Kept] = {}
        if self._map is not None:
            link.register(self._map.bytes)

    @property
    def nbytes(self) -> int:
        """Host bytes, exactly."""
        return self.count * self.block_bytes

    @property
    def free_blocks(self) -> int:
        """Blocks nobody uses."""
        return len(self._free)

    def holds(self, owner: str) -> bool:
        """Whether `owner` has blocks here."""
        return owner in self._kept

    def keep(self, owner: str, blocks: Sequence[Tensor]) -> None:
        """Copy device blocks here; once this returns, compute issued later may overwrite them.

        Raises:
            DeviceMemoryError: too few free blocks. LinkError: a copy failed. Nothing was kept.
        """
        if owner in self._kept:
            raise DeviceMemoryError(f"request {owner} has host KV blocks already: drop it first")
        if len(blocks) > len(self._free):
            raise DeviceMemoryError(
                f"{len(blocks)} host KV blocks are needed, {len(self._free)} are free"
            )
        taken = [self._free.pop() for _ in blocks]
        copies: list[Copy] = []
        failure: LinkError | None = None
        try:
            for index, block in zip(taken, blocks, strict=True):
                self._issue(copies, self._bytes(index), block, Direction.TO_HOST)
        except LinkError as error:
            failure = error
        failure = self._wait(copies) or failure
        if failure is not None:
            self._free += taken
            raise failure
        self._kept[owner] = _Kept(taken)

    def bring_back(self, owner: str, blocks: Sequence[Tensor], skip: int = 0) -> None:
        """Issue the copies back; `settle` before anybody computes with these device blocks.

        Args:
            blocks: for all that is kept but its first `skip` blocks.

        Raises:
            LinkError: a copy could not be issued; `drop` the owner.
        """
        kept = self._kept[owner]
        for index, block in zip(kept.blocks[skip:], blocks, strict=True):
            self._issue(kept.coming_back, block, self._bytes(index), Direction.TO_DEVICE)

    def settle(self, owner: str) -> None:
        """Make compute wait for the copies back, and free the host blocks.

        Raises:
            LinkError: a copy failed; the device blocks hold nothing of use.
        """
        if (failure := self._leave(owner)) is not None:
            raise failure

    def drop(self, owner: str) -> None:
        """Forget what is kept of `owner`, if anything; copies under way are waited for."""
        if owner in self._kept:
            self._leave(owner)  # a copy that failed has nobody left who needs it

    def close(self) -> None:
        """Give the host bytes back. Idempotent."""
        if self._map is not None:
            self._link.drain()
            self._link.unregister(self._map.bytes)
            self._map.close()
            self._map = None
        self._kept.clear()
        self._free.clear()

    def _leave(self, owner: str) -> LinkError | None:
        kept = self._kept.pop(owner)
        self._free += kept.blocks
        return self._wait(kept.coming_back)

    def _bytes(self, index: int) -> Tensor:
        assert self._map is not None
        return self._map.bytes[index * self.block_bytes : (index + 1) * self.block_bytes]

    def _issue(
        self, copies: list[Copy], target: Tensor, source: Tensor, direction: Direction
    ) -> None:
        after = (self._link.compute_event(),)
        for begin in range(0, self.block_bytes, PIECE_BYTES):
            piece = slice(begin, begin + PIECE_BYTES)
            copies.append(
                self._link.copy(
                    target[piece], source[piece], kind=KV, after=after, direction=direction
                )
            )

    def _wait(self, copies: Sequence[Copy]) -> LinkError | None:
        """Wait for all, also where one failed: the others still write. The first failure."""
        failure: LinkError | None = None
        for copy in copies:
            try:
                self._link.wait(copy)
            except LinkError as error:
                failure = failure or error
        return failure
