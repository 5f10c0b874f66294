"""What of a sequence's tokens the cache holds already, because others began with the same ones.

Full blocks are named as soon as they are computed, and stay cached when nobody owns them. Whoever
is let in owns those that hold the beginning of its tokens, and computes the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

from select_n_core.engine.sequence import Sequence
from select_n_core.kv.blocks import BlockTable
from select_n_core.kv.named import NOTHING
from select_n_core.kv.names import Salts, extend


class Prefixes:
    """The prefixes of all live sequences.

    Args:
        salts: None names nothing, so that nothing is ever found.

    Attributes:
        queried_tokens: of all prompts that were let in so far. hit_tokens: those of them that the
            cache held then.
    """

    def __init__(self, blocks: BlockTable, salts: Salts | None) -> None:
        self.queried_tokens = self.hit_tokens = 0
        self._blocks = blocks
        self._salts = salts

    def look(self, waiting: Iterable[Sequence]) -> None:
        """What those that wait would find, brought up to date; true until blocks are given away."""
        if self._salts is None:
            return
        known, find, size = self._blocks.names, self._blocks.find, self._blocks.block_tokens
        for each in waiting:
            names, most = each.names, each.findable
            if each.found is NOTHING and (not most or names[0] not in known):
                continue
            end = min(len(names), most)
            found = find(names, end, each.found)
            while found.known == end < most:  # no more names are made than there is need of
                self._extend(each, min(most, 2 * end + 1))
                end = min(len(names), most)
                found = find(names, end, found)
            if found is not each.found:
                each.found, each.cached = found, found.known * size
                each.facts.shared = found.owned

    def begin(self, sequence: Sequence) -> None:
        """The sequence is let in and owns what was found; nobody was given blocks since `look`."""
        found = sequence.found.known
        if found:
            self._blocks.begin_with(sequence.request.id, sequence.names[:found])
            self._is_named(sequence, found)
            sequence.owns(found, self._blocks.block_tokens)
            if not sequence.computed:
                sequence.computed = sequence.cached
                # Nobody pays for what is not computed.
                sequence.charged = max(sequence.charged, sequence.computed)
        if self._salts is not None and not sequence.preempted:
            self.queried_tokens += sequence.prompt_tokens
            self.hit_tokens += sequence.computed

    def name(self, sequences: Iterable[Sequence]) -> None:
        """Name the blocks that were filled; of those that own none there is nothing to name."""
        size = self._blocks.block_tokens
        for each in sequences:
            if each.room >= each.name_at <= each.computed and not each.coming_back:
                count = each.computed // size
                self._extend(each, count)
                self._blocks.name(each.request.id, each.names, each.named, count)
                self._is_named(each, count)

    def waits(self, sequence: Sequence) -> None:
        """The sequence owns no blocks, yet or any more: it is looked for from now on."""
        if self._salts is None:
            return
        self._is_named(sequence, 0)
        sequence.found, sequence.cached, sequence.facts.shared = NOTHING, 0, 0
        # At least one token is computed: the next one follows from it.
        known = sequence.computed or len(sequence.tokens) - 1
        sequence.findable = known // self._blocks.block_tokens
        if sequence.findable:
            self._extend(sequence, 1)

    def _is_named(self, sequence: Sequence, blocks: int) -> None:
        sequence.named = blocks
        sequence.name_at = (blocks + 1) * self._blocks.block_tokens

    def _extend(self, sequence: Sequence, blocks: int) -> None:
        assert self._salts is not None
        if sequence.salt is None:
            sequence.salt = self._salts.of(sequence.request.tenant)
        extend(sequence.names, sequence.tokens, self._blocks.block_tokens, blocks, sequence.salt)
