"""Where a sequence's cache is: device blocks, on the way back, host blocks, or nowhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from select_n_core.decisions.facts import Way
from select_n_core.engine.prefixes import Prefixes
from select_n_core.engine.sequence import Sequence
from select_n_core.errors import LinkError
from select_n_core.kv.blocks import BlockTable

_log = logging.getLogger(__name__)


class SwapSpace(Protocol):
    """Where preempted caches wait; `HostBlocks` is one and says what its verbs promise."""

    @property
    def free_blocks(self) -> int:
        """Blocks nobody uses."""
        ...

    def keep(self, owner: str, blocks: list[Any]) -> None:
        """Copy device blocks to the host."""
        ...

    def bring_back(self, owner: str, blocks: list[Any], skip: int) -> None:
        """Issue the copies back, without those of the first `skip` blocks."""
        ...

    def settle(self, owner: str) -> None:
        """Make compute wait for them, and free the host blocks."""
        ...

    def drop(self, owner: str) -> None:
        """Forget what is kept, if anything."""
        ...


@dataclass(frozen=True, slots=True)
class Swapping:
    """How preempted caches are swapped.

    Attributes:
        space: where to. bytes_of: a device block's bytes, by its id.
        block_copy_s: one block over the link, one way.
    """

    space: SwapSpace
    bytes_of: Callable[[int], Any]
    block_copy_s: float


class Residence:
    """The caches of all live sequences.

    Args:
        swapping: None where there are no host KV blocks.
    """

    def __init__(self, blocks: BlockTable, swapping: Swapping | None, prefixes: Prefixes) -> None:
        self._blocks = blocks
        self._swapping = swapping
        self._prefixes = prefixes

    @property
    def host_blocks(self) -> int:
        """Free in host memory."""
        return 0 if self._swapping is None else self._swapping.space.free_blocks

    @property
    def block_copy_s(self) -> float:
        """Seconds of one block over the link, one way."""
        return 0.0 if self._swapping is None else self._swapping.block_copy_s

    def reserve(self, sequence: Sequence, tokens: int) -> None:
        """Room on the device for `tokens` tokens in all."""
        if tokens > sequence.room:
            self._blocks.reserve(sequence.request.id, tokens)
            sequence.owns(self._blocks.blocks_of(tokens), self._blocks.block_tokens)

    def bring_back(self, sequence: Sequence) -> bool:
        """Start the way back from host blocks, if it has any; False if the link failed.

        What the device still holds of its beginning stays there.
        """
        sequence.facts.in_host = False
        if sequence.computed <= sequence.room:  # the device holds all of it
            self._drop(sequence)
            return True
        owner, skip = sequence.request.id, sequence.named
        self.reserve(sequence, sequence.computed)
        swapping = self._require()
        try:
            blocks = self._bytes(owner, sequence.computed)[skip:]
            swapping.space.bring_back(owner, blocks, skip)
        except LinkError as error:
            self._start_over(sequence, error)
            return False
        sequence.coming_back = True
        return True

    def settle(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Everyone on the way back has arrived, but for those whose copies failed: they return."""
        if self._swapping is None:
            return []
        coming = [sequence for sequence in running if sequence.coming_back]
        return [sequence for sequence in coming if not self._arrive(sequence)]

    def leave(self, sequence: Sequence, way: Way) -> Way:
        """Give its device blocks back; the way that was taken: a failing link swaps nothing."""
        owner = sequence.request.id
        self._prefixes.name([sequence])
        if way is Way.SWAP and (not sequence.coming_back or self._arrive(sequence)):
            try:
                self._require().space.keep(owner, self._bytes(owner, sequence.computed))
            except LinkError as error:
                self._start_over(sequence, error)
        else:
            self._drop(sequence)
            sequence.computed = 0
        self._release(sequence)
        sequence.facts.in_host = sequence.computed > 0
        return Way.SWAP if sequence.computed else Way.RECOMPUTE

    def forget(self, sequence: Sequence, *, spoiled: bool) -> None:
        """The sequence has ended: take all its blocks back, with no copy under way into them.

        Args:
            spoiled: nobody is to go on from what they hold.
        """
        if spoiled:
            self._blocks.spoil(sequence.request.id)
        else:
            self._prefixes.name([sequence])
        self._drop(sequence)
        self._release(sequence)

    def _arrive(self, sequence: Sequence) -> bool:
        sequence.coming_back = False
        try:
            self._require().space.settle(sequence.request.id)
        except LinkError as error:
            self._start_over(sequence, error)
            return False
        return True

    def _start_over(self, sequence: Sequence, error: LinkError) -> None:
        owner = sequence.request.id
        _log.warning("the cache of request %s is computed again, the link failed: %s", owner, error)
        self._drop(sequence)
        sequence.computed = 0

    def _release(self, sequence: Sequence) -> None:
        if sequence.room:
            sequence.owns(0, self._blocks.block_tokens)
            self._blocks.release(sequence.request.id)
        self._prefixes.waits(sequence)

    def _drop(self, sequence: Sequence) -> None:
        sequence.coming_back = False
        if self._swapping is not None:
            self._swapping.space.drop(sequence.request.id)

    def _bytes(self, owner: str, tokens: int) -> list[Any]:
        blocks = self._blocks.table(owner)[: self._blocks.blocks_of(tokens)]
        return list(map(self._require().bytes_of, blocks))

    def _require(self) -> Swapping:
        assert self._swapping is not None, "nobody is swapped where there are no host blocks"
        return self._swapping
