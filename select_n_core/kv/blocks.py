"""Who owns which KV block: a table per request, blocks conserved while their number changes.

Full blocks that are computed have a name and may be owned by several requests. Nobody writes into
one: a request goes on in blocks that are its own alone.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, KeysView, Sequence

from select_n_core.errors import DeviceMemoryError
from select_n_core.kv.named import FIRST, NOTHING, Found, NamedBlocks


class BlockTable:
    """Blocks of every request, over a range of ids that grows and shrinks.

    Ids are handed out from the top, densely: the low ones lie in lent homes and are elastic,
    handed out last and emptied first. So are those from `ring_id` on, which lie in a lent ring.
    Where none is left, named blocks that nobody owns are given up, least recently used first.

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
        self._others: dict[int, int] = {}  # owners of a block beside the first
        self._named = NamedBlocks()
        self._free = self._heap(ids)

    @property
    def blocks(self) -> int:
        """Blocks that exist."""
        return len(self.ids)

    @property
    def free_blocks(self) -> int:
        """Blocks nobody owns, cached ones included."""
        return len(self._free) + self._named.resting

    @property
    def free_tokens(self) -> int:
        """Tokens that fit into them."""
        return self.free_blocks * self.block_tokens

    @property
    def cached_blocks(self) -> int:
        """Blocks nobody owns that hold what somebody may ask for again."""
        return self._named.resting

    @property
    def names(self) -> KeysView[bytes]:
        """The names of all blocks that hold something known, as they stand at any time."""
        return self._named.names

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
        if need > self.free_blocks:
            raise DeviceMemoryError(
                f"request {request_id} needs {need} KV blocks, {self.free_blocks} are free"
            )
        self._owned[request_id] = owned + [self._take() for _ in range(need)]

    def table(self, request_id: str) -> list[int]:
        """The request's blocks in token order."""
        return self._owned[request_id]

    def owned_blocks(self, request_id: str) -> int:
        """How many blocks the request owns; 0 for one that is not known."""
        return len(self._owned.get(request_id, ()))

    def release(self, request_id: str) -> None:
        """Take a request's blocks back; named ones that nobody else owns stay cached."""
        for block in reversed(self._owned.pop(request_id)):
            self._let_go(block)

    def name(self, request_id: str, names: Sequence[bytes], begin: int, end: int) -> None:
        """Name a request's blocks from the `begin`-th up to the `end`-th, all full and computed.

        A block that holds the same as a named one gives way to it.

        Args:
            names: of its first blocks; see `names.extend`.
        """
        table, named = self._owned[request_id], self._named
        for place in range(begin, end):
            before = names[place - 1] if place else FIRST
            if place and named.name_of(table[place - 1]) != before:
                return  # it was spoiled, and so is whatever follows
            block, same = table[place], named.block_of(names[place])
            if same is None:
                named.add(block, names[place], before)
            elif same != block:
                self._own(same)
                table[place] = same
                self._let_go(block)

    def find(self, names: Sequence[bytes], end: int, guess: Found = NOTHING) -> Found:
        """How many of the first `end` names are of blocks that are here, and owned: the first ones.

        Args:
            guess: tried before it is searched for, and returned as it is where it holds.
        """
        return self._named.find(names, end, guess)

    def begin_with(self, request_id: str, names: Sequence[bytes]) -> None:
        """A request that owns nothing yet owns the blocks of these names, all known, from now on.

        They are its first ones; it shares them with whoever owns them.
        """
        table = []
        for name in names:
            block = self._named.block_of(name)
            assert block is not None, "only known blocks can be shared"
            self._own(block)
            table.append(block)
        self._owned[request_id] = table

    def shared(self, request_id: str) -> int:
        """How many of the request's blocks others own too: always the first ones."""
        if not self._others:
            return 0
        table = self._owned.get(request_id, ())
        return bisect_left(table, True, key=lambda block: block not in self._others)

    def spoil(self, request_id: str) -> None:
        """Nobody else is to go on from what the request's blocks hold."""
        for block in self._named.spoil(self._owned.get(request_id, ())):
            heapq.heappush(self._free, self._key(block))

    def shortfall(self, ids: range) -> int:
        """Blocks that must be released before `resize(ids)` can succeed."""
        return max(0, self.blocks - self.free_blocks - len(ids))

    def resize(self, ids: range) -> dict[int, int]:
        """Let exactly `ids` exist; owned blocks outside are moved inside, cached ones are not.

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
        free += [self._key(block) for block in self._named.keep(ids) if block in ids]
        free += [self._key(block) for block in ids if block not in before]
        heapq.heapify(free)
        self.ids, self._free = ids, free
        moves: dict[int, int] = {}
        for table in self._owned.values():
            for place, block in enumerate(table):
                if block not in ids:
                    if block not in moves:
                        moves[block] = self._take()
                    table[place] = moves[block]
        self._named.move(moves)
        for old in moves.keys() & self._others.keys():
            self._others[moves[old]] = self._others.pop(old)
        return moves

    def _take(self) -> int:
        return _id(heapq.heappop(self._free)) if self._free else self._named.give_up()

    def _own(self, block: int) -> None:
        """One owner more of a named block."""
        if not self._named.wake(block):
            self._others[block] = self._others.get(block, 0) + 1

    def _let_go(self, block: int) -> None:
        """One owner less."""
        others = self._others.get(block, 0)
        if others > 1:
            self._others[block] = others - 1
        elif others:
            del self._others[block]
        elif not self._named.rest(block):
            heapq.heappush(self._free, self._key(block))

    def _key(self, block: int) -> int:
        """Its place in the order of handing out: from the top, and a lent ring last."""
        return block if block >= self._ring_id else -block

    def _heap(self, blocks: Iterable[int]) -> list[int]:
        heap = [self._key(block) for block in blocks]
        heapq.heapify(heap)
        return heap


def _id(key: int) -> int:
    return abs(key)
