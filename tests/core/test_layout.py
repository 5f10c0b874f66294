"""The device arena's map: nothing overlaps, nothing is lost, more streaming is more KV."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.layout import ModelMemory, arena_bytes_for, device_layout
from select_n_core.decisions.order import offload_order
from select_n_core.errors import DeviceMemoryError, InputError
from select_n_core.kv.blocks import BlockTable

ALIGNED = st.integers(1, 40).map(lambda pages: pages * 256)


@st.composite
def memories(draw, least_units=1, even=False):
    units = draw(st.integers(least_units, 24))
    sizes = [draw(ALIGNED)] * units if even else [draw(ALIGNED) for _ in range(units)]
    return ModelMemory(draw(ALIGNED), tuple(sizes), draw(ALIGNED), draw(st.sampled_from([16, 32])))


@st.composite
def placements(draw, **shape):
    memory = draw(memories(**shape))
    k, slots = draw(st.integers(0, memory.units)), draw(st.integers(1, 4))
    arena_bytes = arena_bytes_for(memory, k, slots, 0) + draw(st.integers(0, 50_000))
    return memory, arena_bytes, k, slots


def regions(memory, layout):
    """(start, end) of everything that has a place."""
    found = [(0, memory.static_bytes)]
    found += [(at, at + memory.unit_bytes[unit]) for unit, at in layout.homes.items()]
    found.append((layout.kv_offset, layout.kv_offset + layout.kv_blocks * memory.kv_block_bytes))
    return found + [(at, at + memory.slot_bytes) for at in layout.slots]


@given(placements())
def test_regions_are_aligned_inside_the_arena_and_apart(placement):
    memory, arena_bytes, _, _ = placement
    layout = device_layout(*placement)
    ordered = sorted(regions(memory, layout))
    assert all(start % 256 == 0 for start, _ in ordered)
    assert ordered[0][0] == 0
    assert ordered[-1][1] <= arena_bytes
    assert all(before[1] <= after[0] for before, after in pairwise(ordered))


@given(placements())
def test_units_are_at_home_or_streamed_and_only_streaming_has_a_ring(placement):
    memory, _, k, slots = placement
    layout = device_layout(*placement)
    assert set(layout.homes) == set(offload_order(memory.units)[k:])
    assert len(layout.slots) == (slots if k else 0)


@given(placements())
def test_no_room_for_another_block_is_left_over(placement):
    memory, arena_bytes, k, slots = placement
    layout = device_layout(*placement)
    spare = arena_bytes - arena_bytes_for(memory, k, slots, layout.kv_blocks)
    assert 0 <= spare < memory.kv_block_bytes + 256


@given(placements())
def test_the_next_unit_to_be_demoted_lives_beside_the_kv_blocks(placement):
    memory, _, k, _ = placement
    layout = device_layout(*placement)
    homes = sorted(layout.homes, key=layout.homes.get)
    assert homes == list(reversed(offload_order(memory.units)[k:]))


@given(memories(), st.integers(1, 4), st.integers(0, 20), st.data())
def test_the_smallest_arena_for_some_blocks_holds_exactly_those(memory, slots, blocks, data):
    k = data.draw(st.integers(0, memory.units))
    nbytes = arena_bytes_for(memory, k, slots, blocks)
    assert device_layout(memory, nbytes, k, slots).kv_blocks == blocks
    less = device_layout(memory, nbytes - 1, k, slots)
    assert less is None or less.kv_blocks < blocks


@given(placements(), st.data())
def test_streaming_one_more_unit_never_costs_kv_blocks(placement, data):
    memory, arena_bytes, k, slots = placement
    if 0 < k < memory.units:
        more = device_layout(memory, arena_bytes, k + 1, slots)
        assert more.kv_blocks >= device_layout(*placement).kv_blocks


@given(memories(even=True, least_units=6), st.integers(1, 4), st.data())
def test_with_equal_units_streaming_gains_all_but_the_ring(memory, slots, data):
    k = data.draw(st.integers(1, memory.units))
    arena_bytes = arena_bytes_for(memory, 0, slots, 20) + slots * memory.slot_bytes
    resident = device_layout(memory, arena_bytes, 0, slots)
    streaming = device_layout(memory, arena_bytes, k, slots)
    gained = homes_end(memory, resident) - homes_end(memory, streaming)
    assert gained - slots * memory.slot_bytes == (k - slots) * memory.slot_bytes
    if k > slots:
        assert streaming.kv_blocks >= resident.kv_blocks
    if k < slots:
        assert streaming.kv_blocks <= resident.kv_blocks


def homes_end(memory, layout):
    """Where the homes end and space for KV begins."""
    return max(end for _, end in regions(memory, layout)[: 1 + len(layout.homes)])


@given(placements())
def test_an_arena_below_static_homes_and_ring_has_no_layout(placement):
    memory, _, k, slots = placement
    assert device_layout(memory, arena_bytes_for(memory, k, slots, 0) - 1, k, slots) is None


@given(memories(), st.integers(0, 300_000))
def test_host_memory_caps_k_at_the_mirrors_it_holds(memory, host_bytes):
    cap = memory.host_cap(host_bytes)
    assert memory.mirrored_bytes(cap) <= host_bytes
    assert cap == memory.units or memory.mirrored_bytes(cap + 1) > host_bytes


@pytest.mark.parametrize("k", [-1, 3])
def test_k_outside_the_model_is_refused(k):
    with pytest.raises(InputError, match="k must be between 0 and 2"):
        device_layout(ModelMemory(256, (256, 256), 256, 16), 10_000, k, 2)


class TestBlockTable:
    def test_a_request_gets_whole_blocks_for_its_tokens(self):
        blocks = BlockTable(4, 16)
        blocks.reserve("a", 17)
        assert len(blocks.table("a")) == 2
        assert (blocks.free_blocks, blocks.free_tokens) == (2, 32)

    def test_what_does_not_fit_takes_nothing(self):
        blocks = BlockTable(2, 16)
        with pytest.raises(DeviceMemoryError, match="request a needs 3 KV blocks, 2 are free"):
            blocks.reserve("a", 33)
        assert blocks.free_blocks == 2

    def test_nobody_reserves_twice(self):
        blocks = BlockTable(4, 16)
        blocks.reserve("a", 1)
        with pytest.raises(DeviceMemoryError, match="owns KV blocks already"):
            blocks.reserve("a", 1)
        assert blocks.free_blocks == 3

    @given(st.integers(0, 30), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 200))))
    def test_blocks_are_conserved_and_never_shared(self, count, calls):
        blocks = BlockTable(count, 16)
        live = {}
        for name, tokens in calls:
            if name in live:
                blocks.release(str(name))
                del live[name]
            elif blocks.blocks_of(tokens) <= blocks.free_blocks:
                blocks.reserve(str(name), tokens)
                live[name] = list(blocks.table(str(name)))
            owned = [block for table in live.values() for block in table]
            assert len(set(owned)) == len(owned)
            assert set(owned) <= set(range(count))
            assert blocks.free_blocks == count - len(owned)
