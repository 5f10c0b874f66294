"""Who owns which KV block: a table per request, blocks conserved while their number changes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from select_n_core.errors import DeviceMemoryError


class BlockTable:
    """Blocks of every request, over a range of ids that grows and shrinks.

    Ids are handed out from the top, densely: the low ones lie in lent homes and are elastic,
    handed out last and emptied first. So are those from `ring_id` on, which lie in a lent ring.

    Args:
        ids: the blocks that exist.
        block_tokens: tokens in a block.
        ring_id: None where no ring is ever lent.
    """

    def __init__(self, ids: range, block_tokens: int, ring_id: int | None = None) -> None:
        self.ids = ids
        self.block_tokens = block_tokens
        self._ring_id = ids.stop if ring_id is None else ring_id
        self._owned: dict[str, list[int]] = {}
        self._free = self._heap(ids)

    @property
    def blocks(self) -> int:
        """Blocks that exist."""
        return len(self.ids)

    @property
    def free_blocks(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    @property
    def free_tokens(self) -> int:
        """Tokens that fit into them."""
        return self.free_blocks * self.block_tokens

    def blocks_of(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one request take."""
        return -(-tokens // self.block_tokens)

    def reserve(self, request_id: str, tokens: int) -> None:
        """Give a request room for `tokens` tokens in all; what it owns already counts.

        Raises:
            DeviceMemoryError: not enough free blocks; nothing was taken.
        """
        owned = self._owned.get(request_id, [])
        need = self.blocks_of(tokens) - len(owned)
        if need > len(self._free):
            raise DeviceMemoryError(
                f"request {request_id} needs {need} KV blocks, {len(self._free)} are free"
            )
        taken = [_id(heapq.heappop(self._free)) for _ in range(need)]
        self._owned[request_id] = owned + taken

    def table(self, request_id: str) -> list[int]:
        """The request's blocks in token order."""
        return self._owned[request_id]

    def owned_blocks(self, request_id: str) -> int:
        """How many blocks the request owns; 0 for one that is not known."""
        return len(self._owned.get(request_id, ()))

    def release(self, request_id: str) -> None:
        """Take a request's blocks back."""
        for block in self._owned.pop(request_id):
            heapq.heappush(self._free, self._key(block))

    def shortfall(self, ids: range) -> int:
        """Blocks that must be released before `resize(ids)` can succeed."""
        return max(0, self.blocks - self.free_blocks - len(ids))

    def resize(self, ids: range) -> dict[int, int]:
        """Let exactly `ids` exist; owned blocks outside are moved inside.

        Returns:
            old id -> new id, of every moved block. Their bytes are the caller's to copy, before
            anybody writes to the new ones.

        Raises:
            DeviceMemoryError: more blocks are owned than `ids` has; nothing was changed.
        """
        if short := self.shortfall(ids):
            raise DeviceMemoryError(
                f"{self.blocks - self.free_blocks} KV blocks are in use, {len(ids)} are to be "
                f"left; {short} must be freed first"
            )
        if ids == self.ids:
            return {}
        before = self.ids
        free = [key for key in self._free if _id(key) in ids]
        free += [self._key(block) for block in ids if block not in before]
        heapq.heapify(free)
        moves: dict[int, int] = {}
        for table in self._owned.values():
            for place, block in enumerate(table):
                if block not in ids:
                    moves[block] = table[place] = _id(heapq.heappop(free))
        self.ids, self._free = ids, free
        return moves

    def _key(self, block: int) -> int:
        """Its place in the order of handing out: from the top, and a lent ring last."""
        return block if block >= self._ring_id else -block

    def _heap(self, blocks: Iterable[int]) -> list[int]:
        heap = [self._key(block) for block in blocks]
        heapq.heapify(heap)
        return heap


def _id(key: int) -> int:
    return abs(key)
