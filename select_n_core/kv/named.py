"""Full blocks by what they hold, also those that nobody owns any more.

Names form chains. A block has its name only as long as the block before it has, and whoever owns
it owns that one too: so the blocks of a prefix that are here are its first ones, those of them that
somebody owns come first, and the end of a chain goes to rest before its beginning.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterable, KeysView, Mapping, Sequence
from typing import NamedTuple

FIRST = b""  # stands before the first block of a chain


class Found(NamedTuple):
    """How many blocks of a prefix are here, and how many of those somebody owns."""

    known: int
    owned: int


NOTHING = Found(0, 0)


class NamedBlocks:
    """Names of blocks; those at rest are owned by nobody, the least recently used first."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._before: dict[bytes, bytes] = {}  # in an order in which chains grow
        self._resting: OrderedDict[int, None] = OrderedDict()

    @property
    def resting(self) -> int:
        """How many are at rest."""
        return len(self._resting)

    @property
    def names(self) -> KeysView[bytes]:
        """All names, as they stand at any time."""
        return self._block_of.keys()

    def block_of(self, name: bytes) -> int | None:
        """The block of that name."""
        return self._block_of.get(name)

    def name_of(self, block: int) -> bytes | None:
        """The block's name."""
        return self._name_of.get(block)

    def add(self, block: int, name: bytes, before: bytes) -> None:
        """Name a block that somebody owns, and that stands behind the one of name `before`."""
        self._block_of[name] = block
        self._name_of[block] = name
        self._before[name] = before

    def rest(self, block: int) -> bool:
        """Nobody owns the block any more; False if it has no name, and so nothing to keep."""
        if block not in self._name_of:
            return False
        self._resting[block] = None
        return True

    def wake(self, block: int) -> bool:
        """Somebody owns the block now; False if somebody did before."""
        if block not in self._resting:
            return False
        del self._resting[block]
        return True

    def give_up(self) -> int:
        """Take the least recently used block away from its name."""
        block, _ = self._resting.popitem(last=False)
        name = self._name_of.pop(block)
        del self._block_of[name], self._before[name]
        return block

    def keep(self, ids: Collection[int]) -> list[int]:
        """Give up those at rest that are not in `ids`, and what stands behind them.

        Returns:
            The blocks that were at rest and have no name now.
        """
        gone: set[bytes] = set()
        for block in reversed(self._resting):  # the beginning of a chain comes before its end
            name = self._name_of[block]
            if block not in ids or self._before[name] in gone:
                gone.add(name)
        return self._forget(gone)

    def spoil(self, blocks: Iterable[int]) -> list[int]:
        """Take their names from `blocks` and from all that stand behind them; returns as `keep`."""
        gone = {self._name_of[block] for block in blocks if block in self._name_of}
        for name, before in self._before.items():
            if before in gone:
                gone.add(name)
        return self._forget(gone)

    def move(self, moves: Mapping[int, int]) -> None:
        """Blocks lie elsewhere now: old id -> new id."""
        for old, new in moves.items():
            if (name := self._name_of.pop(old, None)) is not None:
                self._name_of[new] = name
                self._block_of[name] = new

    def find(self, names: Sequence[bytes], end: int, guess: Found) -> Found:
        """What is here of the first `end` names.

        Args:
            guess: returned as it is where it holds; else what holds is searched for.
        """
        block_of, resting = self._block_of, self._resting
        known, owned = guess
        if (
            known > end
            or (known and names[known - 1] not in block_of)
            or (known < end and names[known] in block_of)
        ):
            known = bisect_left(names, True, 0, end, key=lambda name: name not in block_of)
        if (
            owned > known
            or (owned and block_of[names[owned - 1]] in resting)
            or (owned < known and block_of[names[owned]] not in resting)
        ):
            owned = bisect_left(names, True, 0, known, key=lambda name: block_of[name] in resting)
        return guess if guess == (known, owned) else Found(known, owned)

    def _forget(self, names: Iterable[bytes]) -> list[int]:
        rested = []
        for name in names:
            block = self._block_of.pop(name)
            del self._name_of[block], self._before[name]
            if self.wake(block):
                rested.append(block)
        return rested
