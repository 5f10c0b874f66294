"""The device arena's map: nothing overlaps, nothing is lost, more streaming is more KV."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.layout import ModelMemory, arena_bytes_for, device_layout
from select_n_core.decisions.order import offload_order
from select_n_core.errors import InputError

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


def kv_blocks(layout):
    return len(layout.kv_ids(layout.k_min))


def regions(memory, layout):
    """(start, end) of everything that has a place."""
    found = [(0, memory.static_bytes)]
    found += [(at, at + memory.unit_bytes[unit]) for unit, at in layout.homes.items()]
    ids = layout.kv_ids(layout.k_min)
    found.append(
        tuple(layout.lattice_offset + i * memory.kv_block_bytes for i in (ids.start, ids.stop))
    )
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
    spare = arena_bytes - arena_bytes_for(memory, k, slots, kv_blocks(layout))
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
    assert kv_blocks(device_layout(memory, nbytes, k, slots)) == blocks
    less = device_layout(memory, nbytes - 1, k, slots)
    assert less is None or kv_blocks(less) < blocks


@given(placements(), st.data())
def test_streaming_one_more_unit_never_costs_kv_blocks(placement, data):
    memory, arena_bytes, k, slots = placement
    if 0 < k < memory.units:
        more = device_layout(memory, arena_bytes, k + 1, slots)
        assert kv_blocks(more) >= kv_blocks(device_layout(*placement))


@given(memories(even=True, least_units=6), st.integers(1, 4), st.data())
def test_with_equal_units_streaming_gains_all_but_the_ring(memory, slots, data):
    k = data.draw(st.integers(1, memory.units))
    arena_bytes = arena_bytes_for(memory, 0, slots, 20) + slots * memory.slot_bytes
    resident = device_layout(memory, arena_bytes, 0, slots)
    streaming = device_layout(memory, arena_bytes, k, slots)
    gained = homes_end(memory, resident) - homes_end(memory, streaming)
    assert gained - slots * memory.slot_bytes == (k - slots) * memory.slot_bytes
    if k > slots:
        assert kv_blocks(streaming) >= kv_blocks(resident)
    if k < slots:
        assert kv_blocks(streaming) <= kv_blocks(resident)


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


class TestMovingK:
    """One layout for every k from k_min to k_max."""

    @given(placements(), st.data())
    def test_the_blocks_at_each_k_are_those_of_a_layout_of_its_own(self, placement, data):
        memory, arena_bytes, k_min, slots = placement
        if not k_min:
            return
        k = data.draw(st.integers(k_min, memory.units))
        moving = device_layout(memory, arena_bytes, k_min, slots, memory.units)
        still = device_layout(memory, arena_bytes, k, slots)
        assert len(moving.kv_ids(k)) == kv_blocks(still)
        at = moving.lattice_offset + moving.kv_ids(k).start * memory.kv_block_bytes
        assert at == still.lattice_offset + still.kv_ids(k).start * memory.kv_block_bytes
        assert moving.slots == still.slots

    @given(placements(), st.data())
    def test_lent_blocks_touch_no_home_that_is_in_use(self, placement, data):
        memory, arena_bytes, k_min, slots = placement
        layout = device_layout(memory, arena_bytes, k_min, slots, memory.units)
        if layout is None:  # nothing streamed fits, but no place for a ring beside it
            assert k_min == 0
            return
        k = data.draw(st.integers(k_min, memory.units))
        at_home = [
            layout.homes[unit] + memory.unit_bytes[unit] for unit in offload_order(memory.units)[k:]
        ]
        ids = layout.kv_ids(k)
        begin = layout.lattice_offset + ids.start * memory.kv_block_bytes
        end = layout.lattice_offset + ids.stop * memory.kv_block_bytes
        assert begin >= max(at_home, default=memory.static_bytes)
        assert end <= (arena_bytes if k == 0 else layout.slots[0])
        assert 0 <= ids.start <= ids.stop <= layout.lattice_blocks

    @given(memories(), st.integers(1, 4))
    def test_at_k_zero_the_ring_is_lent_too(self, memory, slots):
        arena_bytes = arena_bytes_for(memory, 0, slots, 3) + slots * memory.slot_bytes
        layout = device_layout(memory, arena_bytes, 0, slots, memory.units)
        assert (
            layout.kv_ids(0).stop - layout.ring_id
            == slots * memory.slot_bytes // memory.kv_block_bytes
        )
        assert layout.kv_ids(1).stop == layout.ring_id

    def test_k_outside_its_range_is_refused(self):
        layout = device_layout(ModelMemory(256, (256,) * 4, 256, 16), 10_000, 1, 2, 3)
        for k in (0, 4):
            with pytest.raises(InputError, match="k must be between 1 and 3"):
                layout.kv_ids(k)
