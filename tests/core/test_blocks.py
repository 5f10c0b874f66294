"""Who owns which KV block: conserved, never shared, and moved out of what is taken away."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from select_n_core.errors import DeviceMemoryError
from select_n_core.kv.blocks import BlockTable


def test_a_request_gets_whole_blocks_for_its_tokens():
    blocks = BlockTable(range(4), 16)
    blocks.reserve("a", 17)
    assert len(blocks.table("a")) == blocks.owned_blocks("a") == 2
    assert (blocks.free_blocks, blocks.free_tokens) == (2, 32)


def test_a_request_that_grows_keeps_what_it_has():
    blocks = BlockTable(range(4), 16)
    blocks.reserve("a", 10)
    before = list(blocks.table("a"))
    blocks.reserve("a", 16)
    assert blocks.table("a") == before
    blocks.reserve("a", 40)
    assert blocks.table("a")[:1] == before
    assert blocks.owned_blocks("a") == 3


def test_what_does_not_fit_takes_nothing():
    blocks = BlockTable(range(2), 16)
    with pytest.raises(DeviceMemoryError, match="request a needs 3 KV blocks, 2 are free"):
        blocks.reserve("a", 33)
    assert blocks.free_blocks == 2


def test_stable_blocks_are_handed_out_first_and_a_lent_ring_last():
    blocks = BlockTable(range(2, 8), 16, ring_id=6)
    blocks.reserve("a", 6 * 16)
    assert blocks.table("a") == [5, 4, 3, 2, 6, 7]


def test_blocks_in_use_move_out_of_what_is_taken_away():
    blocks = BlockTable(range(6), 16)
    for name in "abc":
        blocks.reserve(name, 32)
    blocks.release("b")
    assert blocks.resize(range(2, 6)) == {1: 3, 0: 2}
    assert blocks.table("c") == [3, 2]
    assert blocks.free_blocks == 0


def test_too_few_blocks_change_nothing_and_say_how_many_are_missing():
    blocks = BlockTable(range(6), 16)
    blocks.reserve("a", 5 * 16)
    assert blocks.shortfall(range(3, 6)) == 2
    with pytest.raises(DeviceMemoryError, match="2 must be freed first"):
        blocks.resize(range(3, 6))
    assert blocks.ids == range(6)
    assert blocks.table("a") == [5, 4, 3, 2, 1]


class Histories(RuleBasedStateMachine):
    """Requests come, grow and go while the range of ids moves; contents follow the moves."""

    @initialize(first=st.integers(0, 10), count=st.integers(0, 30), ring=st.integers(0, 40))
    def make(self, first: int, count: int, ring: int) -> None:
        self.table = BlockTable(range(first, first + count), 16, ring)
        self.contents: dict[int, tuple[str, int]] = {}
        self.tokens: dict[str, int] = {}

    @rule(name=st.sampled_from("abcdef"), tokens=st.integers(0, 120))
    def grow(self, name: str, tokens: int) -> None:
        tokens = max(tokens, self.tokens.get(name, 0))
        need = self.table.blocks_of(tokens) - self.table.owned_blocks(name)
        if need > self.table.free_blocks:
            with pytest.raises(DeviceMemoryError):
                self.table.reserve(name, tokens)
            return
        self.table.reserve(name, tokens)
        self.tokens[name] = tokens
        for place, block in enumerate(self.table.table(name)):
            self.contents.setdefault(block, (name, place))

    @rule(name=st.sampled_from("abcdef"))
    def leave(self, name: str) -> None:
        if name in self.tokens:
            for block in self.table.table(name):
                del self.contents[block]
            self.table.release(name)
            del self.tokens[name]

    @rule(first=st.integers(0, 20), count=st.integers(0, 40))
    def resize(self, first: int, count: int) -> None:
        ids = range(first, first + count)
        if self.table.shortfall(ids):
            with pytest.raises(DeviceMemoryError):
                self.table.resize(ids)
            return
        moves = self.table.resize(ids)
        assert not set(moves) & set(moves.values())
        assert not set(moves.values()) & self.contents.keys()
        self.contents = {moves.get(block, block): held for block, held in self.contents.items()}

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        if not hasattr(self, "table"):
            return
        for name, tokens in self.tokens.items():
            owned = self.table.table(name)
            assert len(owned) == self.table.blocks_of(tokens)
            assert [self.contents[block] for block in owned] == [
                (name, place) for place in range(len(owned))
            ]
        assert set(self.contents) <= set(self.table.ids)
        assert self.table.free_blocks == self.table.blocks - len(self.contents)


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestHistories = Histories.TestCase


@given(st.lists(st.integers(1, 60), max_size=8), st.integers(0, 12))
def test_a_table_that_was_emptied_hands_out_the_same_blocks_again(sizes, ring):
    blocks = BlockTable(range(40), 16, ring)
    tables = []
    for _ in range(2):
        names = []
        for name, tokens in enumerate(sizes):
            if blocks.blocks_of(tokens) <= blocks.free_blocks:
                blocks.reserve(str(name), tokens)
                names.append(str(name))
        tables.append([list(blocks.table(name)) for name in names])
        for name in names:
            blocks.release(name)
    assert tables[0] == tables[1]
