"""Full blocks that several requests own: counted, found by name, and never written to again."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from select_n_core.errors import DeviceMemoryError
from select_n_core.kv.blocks import BlockTable
from select_n_core.kv.named import NOTHING, Found

SIZE = 2  # tokens


def names_of(text: str) -> list[bytes]:
    """A letter is what a block holds, and a name all letters up to it."""
    return [text[: end + 1].encode() for end in range(len(text))]


def computed(blocks: BlockTable, name: str, text: str, known: int = 0) -> None:
    """A request that begins with `known` blocks and has computed all of its text."""
    blocks.begin_with(name, names_of(text)[:known])
    blocks.reserve(name, len(text) * SIZE)
    blocks.name(name, names_of(text), known, len(text))


def known(blocks: BlockTable, text: str) -> int:
    return blocks.find(names_of(text), len(text)).known


class TestSharing:
    def test_a_block_comes_free_with_its_last_owner_and_stays_cached(self):
        blocks = BlockTable(range(8), SIZE)
        computed(blocks, "a", "xyz")
        computed(blocks, "b", "xyw", known=2)
        assert blocks.table("a")[:2] == blocks.table("b")[:2]
        assert (blocks.free_blocks, blocks.shared("a"), blocks.shared("b")) == (4, 2, 2)
        blocks.release("a")
        assert (blocks.free_blocks, blocks.cached_blocks, blocks.shared("b")) == (5, 1, 0)
        blocks.release("b")
        assert (blocks.free_blocks, blocks.cached_blocks, blocks.shared("b")) == (8, 4, 0)

    def test_what_has_no_name_is_not_kept(self):
        blocks = BlockTable(range(8), SIZE)
        blocks.reserve("a", 4 * SIZE)
        blocks.name("a", names_of("xyzw"), 0, 2)
        blocks.release("a")
        assert (blocks.free_blocks, blocks.cached_blocks) == (8, 2)

    def test_known_and_owned_blocks_are_the_first_ones_whatever_one_guesses(self):
        blocks = BlockTable(range(8), SIZE)
        computed(blocks, "a", "xyz")
        computed(blocks, "b", "x", known=1)
        blocks.release("a")
        for guess in (Found(known, owned) for known in range(6) for owned in range(6)):
            assert blocks.find(names_of("xyzw"), 4, guess) == (3, 1)
            assert blocks.find(names_of("xyzw"), 2, guess) == (2, 1)
            assert blocks.find(names_of("ab"), 2, guess) == NOTHING

    def test_the_second_who_computes_the_same_gives_its_block_back(self):
        blocks = BlockTable(range(8), SIZE)
        computed(blocks, "a", "xy")
        computed(blocks, "b", "xy")
        assert blocks.table("a") == blocks.table("b")
        assert blocks.free_blocks == 6


class TestTakingBack:
    def test_the_longest_unused_goes_first_and_its_end_before_its_beginning(self):
        blocks = BlockTable(range(6), SIZE)
        computed(blocks, "old", "xyz")
        blocks.release("old")
        computed(blocks, "new", "uvw")
        blocks.release("new")
        blocks.reserve("a", 2 * SIZE)
        assert known(blocks, "xyz") == 1
        assert known(blocks, "uvw") == 3
        blocks.begin_with("b", names_of("x"))
        blocks.release("b")  # used again
        blocks.reserve("a", 4 * SIZE)
        assert known(blocks, "xyz") == 1
        assert known(blocks, "uvw") == 1

    def test_blocks_without_a_name_go_before_cached_ones(self):
        blocks = BlockTable(range(4), SIZE)
        computed(blocks, "a", "xy")
        blocks.release("a")
        blocks.reserve("b", 2 * SIZE)
        assert known(blocks, "xy") == 2
        blocks.reserve("b", 4 * SIZE)
        assert blocks.cached_blocks == 0
        with pytest.raises(DeviceMemoryError, match="needs 1 KV blocks, 0 are free"):
            blocks.reserve("c", 1)

    def test_cached_blocks_are_never_moved_and_make_room_for_owned_ones(self):
        blocks = BlockTable(range(6), SIZE)
        computed(blocks, "cached", "xyz")
        blocks.reserve("a", 2 * SIZE)
        blocks.release("cached")
        assert blocks.table("a") == [2, 1]
        assert blocks.resize(range(3, 6)) == {2: 3, 1: 4}
        assert known(blocks, "xyz") == 1

    def test_what_stands_behind_a_dropped_block_is_dropped_too(self):
        blocks = BlockTable(range(6), SIZE)
        blocks.reserve("crowd", 4 * SIZE)
        computed(blocks, "a", "x")  # in block 1
        blocks.release("crowd")
        computed(blocks, "b", "xy", known=1)  # in block 5
        blocks.release("a")
        blocks.release("b")
        assert blocks.resize(range(2, 6)) == {}
        assert (blocks.cached_blocks, blocks.free_blocks) == (0, 4)

    def test_a_shared_block_moves_once_for_all_its_owners(self):
        blocks = BlockTable(range(6), SIZE)
        blocks.reserve("crowd", 4 * SIZE)
        computed(blocks, "a", "x")
        computed(blocks, "b", "x", known=1)
        blocks.release("crowd")
        assert blocks.resize(range(2, 6)) == {1: 5}
        assert blocks.table("a") == blocks.table("b") == [5]
        assert (blocks.shared("a"), known(blocks, "x")) == (1, 1)
        blocks.release("a")
        blocks.release("b")
        assert blocks.free_blocks == 4


class TestSpoiling:
    def test_what_was_spoiled_is_not_found_and_comes_free_with_its_owners(self):
        blocks = BlockTable(range(8), SIZE)
        computed(blocks, "rests", "xyzw")
        blocks.release("rests")
        computed(blocks, "bad", "xy", known=2)
        blocks.spoil("bad")
        assert (known(blocks, "xyzw"), blocks.cached_blocks, blocks.free_blocks) == (0, 0, 6)
        blocks.release("bad")
        assert blocks.free_blocks == 8

    def test_nor_is_what_others_who_share_it_go_on_to_compute(self):
        blocks = BlockTable(range(8), SIZE)
        computed(blocks, "bad", "xy")
        blocks.begin_with("b", names_of("xy"))
        blocks.reserve("b", 3 * SIZE)
        blocks.spoil("bad")
        blocks.release("bad")
        computed(blocks, "again", "xy")
        blocks.name("b", names_of("xyz"), 2, 3)
        assert known(blocks, "xyz") == 2
        assert not set(blocks.table("again")) & set(blocks.table("b"))
        blocks.release("b")
        assert (blocks.cached_blocks, blocks.free_blocks) == (0, 6)


class Histories(RuleBasedStateMachine):
    """Requests come, grow, compute, share and go, some spoiled, while the range of ids moves."""

    @initialize(first=st.integers(0, 4), count=st.integers(0, 14), ring=st.integers(0, 20))
    def make(self, first: int, count: int, ring: int) -> None:
        self.blocks = BlockTable(range(first, first + count), SIZE, ring)
        self.texts: dict[str, str] = {}
        self.named: dict[str, int] = {}
        self.holds: dict[int, str] = {}  # all letters up to a block's
        self.bad: set[int] = set()

    def owners(self) -> Counter[int]:
        return Counter(block for name in self.texts for block in self.blocks.table(name))

    @rule(name=st.sampled_from("abcd"), text=st.text("xy", min_size=1, max_size=5))
    def come(self, name: str, text: str) -> None:
        if name in self.texts:
            return
        known, owned = self.blocks.find(names_of(text), len(text))
        before = self.blocks.free_blocks
        self.blocks.begin_with(name, names_of(text)[:known])
        assert before - self.blocks.free_blocks == known - owned
        table = self.blocks.table(name)
        assert [self.holds[block] for block in table] == [text[: n + 1] for n in range(known)]
        assert set(names_of(text)[:known]) <= set(self.blocks.names)
        assert not self.bad & set(table)
        self.texts[name], self.named[name] = text[:known], known
        self.write(name, text[known:])

    @rule(name=st.sampled_from("abcd"), letters=st.text("xy", min_size=1, max_size=2))
    def write(self, name: str, letters: str) -> None:
        if name not in self.texts:
            return
        text = self.texts[name]
        need = len(letters)
        if need > self.blocks.free_blocks:
            with pytest.raises(DeviceMemoryError):
                self.blocks.reserve(name, (len(text) + need) * SIZE)
            return
        self.blocks.reserve(name, (len(text) + need) * SIZE)
        self.texts[name] = text + letters
        table = self.blocks.table(name)
        spoiled = bool(self.bad & set(table[: len(text)]))
        owners = self.owners()
        for place in range(len(text), len(text) + need):
            block = table[place]
            assert owners[block] == 1
            assert self.blocks._named.name_of(block) is None
            self.holds[block] = self.texts[name][: place + 1]
            (self.bad.add if spoiled else self.bad.discard)(block)

    @precondition(lambda self: getattr(self, "texts", None))
    @rule(data=st.data())
    def computes(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        text = self.texts[name]
        end = data.draw(st.integers(self.named[name], len(text)))
        self.blocks.name(name, names_of(text), self.named[name], end)
        self.named[name] = end

    @rule(name=st.sampled_from("abcd"), spoiled=st.booleans())
    def leave(self, name: str, spoiled: bool) -> None:
        if name not in self.texts:
            return
        if spoiled:
            self.bad |= set(self.blocks.table(name))
            for other in self.texts:
                table = self.blocks.table(other)
                first = next((n for n, block in enumerate(table) if block in self.bad), None)
                self.bad |= set() if first is None else set(table[first:])
            self.blocks.spoil(name)
        self.blocks.release(name)
        del self.texts[name], self.named[name]

    @rule(first=st.integers(0, 8), count=st.integers(0, 16))
    def resize(self, first: int, count: int) -> None:
        ids = range(first, first + count)
        owned = set(self.owners())
        if self.blocks.shortfall(ids):
            assert len(owned) > count
            with pytest.raises(DeviceMemoryError):
                self.blocks.resize(ids)
            return
        moves = self.blocks.resize(ids)
        assert set(moves) == {block for block in owned if block not in ids}
        assert not set(moves.values()) & owned
        assert len(set(moves.values())) == len(moves)
        for old, new in moves.items():
            self.holds[new] = self.holds[old]
            (self.bad.add if old in self.bad else self.bad.discard)(new)

    @invariant()
    def blocks_are_conserved_and_owners_counted(self) -> None:
        if not hasattr(self, "blocks"):
            return
        blocks, owners = self.blocks, self.owners()
        cached, free = list(blocks._named._resting), [abs(key) for key in blocks._free]
        assert sorted([*owners, *cached, *free]) == list(blocks.ids)
        assert blocks.free_blocks == len(cached) + len(free)
        assert blocks._others == {each: count - 1 for each, count in owners.items() if count > 1}
        for name, text in self.texts.items():
            table = blocks.table(name)
            assert [self.holds[block] for block in table] == [
                text[: place + 1] for place in range(len(text))
            ]
            shared = [owners[block] > 1 for block in table]
            assert shared == sorted(shared, reverse=True)
            assert blocks.shared(name) == sum(shared)

    @invariant()
    def a_name_is_true_and_so_is_whatever_it_stands_behind(self) -> None:
        if not hasattr(self, "blocks"):
            return
        named = self.blocks._named
        assert {block: name for name, block in named._block_of.items()} == named._name_of
        assert set(named._before) == set(named._block_of)
        for name, block in named._block_of.items():
            assert self.holds[block].encode() == name
            assert block not in self.bad
            assert named._before[name] == name[:-1]
            if len(name) > 1:
                before = named._block_of[name[:-1]]
                for each in self.texts:
                    table = self.blocks.table(each)
                    assert block not in table or before in table


Histories.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
