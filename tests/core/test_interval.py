"""The interval control at its lower end: what lies between k = 0 and more units than slots."""

from dataclasses import replace

import pytest
from test_step import MS, decoding, plan, state, waiting

from select_n_core.decisions.facts import Cause
from select_n_core.decisions.interval import frees_memory, next_up
from select_n_core.decisions.latency import ComputeModel, LatencyModel
from select_n_core.decisions.step import plan_step

BLOCKS_AT = (35, 16, 36, 45, 55, 64, 74)  # two slots; at k = 2 rounding gains a block
CALM = {"free_blocks": 2, "calm_s": 10.0, "dwell_s": 2.0}


class TestWhatFreesMemory:
    @pytest.mark.parametrize("slots", [1, 2, 3])
    def test_the_ring_takes_what_as_many_homes_as_it_has_slots_give(self, slots):
        useful = [k for k in range(7) if frees_memory(k, 0, slots)]
        assert useful == [0, *range(slots + 1, 7)]

    def test_where_there_is_always_a_ring_every_home_counts(self):
        assert all(frees_memory(k, 1, 2) for k in range(1, 7))

    def test_from_k_0_the_first_turn_goes_to_the_first_k_that_frees_kv(self):
        assert next_up(0, 6, 0, 2, BLOCKS_AT) == 3
        assert next_up(3, 6, 0, 2, BLOCKS_AT) == 4
        assert next_up(1, 6, 0, 2, BLOCKS_AT) == 3
        assert next_up(1, 6, 1, 2, (0, *BLOCKS_AT[1:])) == 2

    def test_units_smaller_than_a_block_are_passed_until_one_block_is_free(self):
        assert next_up(3, 6, 0, 2, (5, 5, 5, 6, 6, 6, 7)) == 6

    def test_it_ends_with_what_is_mirrored(self):
        assert next_up(0, 2, 0, 2, BLOCKS_AT) is None
        assert next_up(6, 6, 0, 2, BLOCKS_AT) is None


class TestTurns:
    """10 units: 1 ms a step for a row; a copy takes 2 ms."""

    def test_what_nobody_needs_goes_back_to_k_0_in_one_turn(self):
        spare = {"k": 3, "blocks": 45, "free_blocks": 41, "dwell_s": 20.0}
        now = {**spare, "blocks_at": BLOCKS_AT}
        assert plan([decoding("d")], **now).change == (0, Cause.SPARE)
        assert plan([decoding("d")], **now, k_min=1).change == (2, Cause.SPARE)
        full = {**now, "free_blocks": 45 - 32}  # of 35 at k = 0, some stay free
        assert plan([decoding("d")], **full).change is None

    def test_in_danger_it_passes_what_frees_nothing(self):
        slow = {"k": 4, "tpot_s": 2.5 * MS}  # k = 1 would do, and hold less KV than k = 0
        assert plan([decoding("d", slack_s=MS)], **slow).change == (0, Cause.LINK)
        assert plan([decoding("d", slack_s=MS)], **slow, k_min=1).change == (1, Cause.LINK)

    def test_in_danger_k_0_is_found_even_where_fewer_units_alone_do_not_help(self):
        """More threads compute where no link needs one: only k = 0 is faster."""
        streaming = ComputeModel(((1, 2 * MS),), 0.0, 0.0, 0.0, 0.0)
        resident = ComputeModel(((1, 1 * MS),), 0.0, 0.0, 0.0, 0.0)
        model = LatencyModel(10, 0.1 * MS, streaming, resident)
        late = state([decoding("d", slack_s=MS)], k=6, tpot_s=15 * MS)
        assert plan_step(late, model).change == (0, Cause.TPOT)
        assert plan_step(replace(late, k_min=1), model).change is None


class TestToStreamAtAll:
    """Copies hide behind compute, and one more row costs nothing: n + 1 rows serve 1/n more."""

    MODEL = LatencyModel(10, 0.1 * MS, ComputeModel(((1, 1 * MS),), 0.0, 0.0, 0.0, 0.0))

    def change(self, rows: int, k: int, k_up: int):
        running = [decoding(str(number)) for number in range(rows)]
        queue = [waiting("w", prompt=100, expected=2000)]
        now = state(running, queue, **CALM, k=k, k_up=k_up, max_batch=100)
        return plan_step(now, self.MODEL).change

    def test_it_must_serve_clearly_more(self):
        assert self.change(rows=15, k=0, k_up=3) == (3, Cause.KV)
        assert self.change(rows=25, k=0, k_up=3) is None

    def test_to_stream_one_unit_more_need_not(self):
        assert self.change(rows=25, k=3, k_up=4) == (4, Cause.KV)
