"""How a preempted cache comes back: over the link or computed again, whichever costs less."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.facts import RequestFacts, StepState, Way
from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.decisions.pace import pace_of
from select_n_core.decisions.preemption import preempted, recompute_s, release, swap_s
from select_n_core.decisions.service import ServicePolicy

MS = 1e-3
# One token costs 1 ms over 10 units, 0.1 ms more for each that joins; a copy takes 2 ms.
MODEL = LatencyModel(
    units=10,
    transfer_s=2 * MS,
    streaming=ComputeModel(((1, 0.1 * MS), (257, 2.66 * MS)), 0.0, 0.0, 0.0, 0.0),
)
BESIDE = StepShape(decode_rows=4, context_tokens=400)


def running(name: str, context: int = 64, blocks: int = 4, **facts) -> RequestFacts:
    return RequestFacts(name, context, 0, 1.0, blocks, **facts)


def state(*requests: RequestFacts, host_blocks: int = 100, block_copy_s: float = MS, k: int = 0):
    return StepState(
        running=requests,
        waiting=(),
        free_blocks=0,
        blocks=100,
        block_tokens=16,
        max_batch=8,
        max_step_tokens=64,
        least_chunk=16,
        k=k,
        slots=2,
        tpot_s=0.1,
        policy=ServicePolicy(0.1, 20.0, 1.0, 1e3),
        host_blocks=host_blocks,
        block_copy_s=block_copy_s,
    )


def ways(now: StepState, *victims: RequestFacts) -> list[Way]:
    return [each.way for each in preempted(victims, BESIDE, now, MODEL)]


class TestPrices:
    def test_with_an_idle_link_swapping_costs_the_way_out(self):
        assert swap_s(0.5 * MS, BESIDE, pace_of(MODEL, 0, 2)) == 0.5 * MS

    def test_where_copies_make_the_step_the_way_back_costs_as_much_again(self):
        busy = pace_of(MODEL, 10, 2)
        assert busy.step_s(BESIDE) == pytest.approx(busy.copies_s)
        assert swap_s(3 * MS, BESIDE, busy) == pytest.approx(6 * MS)

    def test_in_between_the_weights_leave_a_part_of_the_link(self):
        pace = pace_of(MODEL, 4, 2)
        many = StepShape(decode_rows=120)  # 12.9 ms of compute, 8 ms of copies
        idle_s = pace.step_s(many) - pace.copies_s
        assert idle_s > 4 * MS
        assert swap_s(idle_s + MS, many, pace) == pytest.approx(idle_s + 2 * MS)

    def test_computing_again_costs_what_the_steps_take_longer(self):
        pace = pace_of(MODEL, 0, 2)
        assert recompute_s(30, BESIDE, 60, pace) == pytest.approx(3 * MS)
        assert recompute_s(90, BESIDE, 60, pace) == pytest.approx(9 * MS)

    def test_with_nobody_beside_it_costs_whole_steps(self):
        pace = pace_of(MODEL, 0, 2)
        assert recompute_s(90, StepShape(), 60, pace) == pytest.approx(6.9 * MS + 3.9 * MS)

    def test_tokens_that_copies_hide_are_computed_again_for_nothing(self):
        assert recompute_s(30, BESIDE, 60, pace_of(MODEL, 10, 2)) == pytest.approx(0, abs=1e-9)


class TestWays:
    def test_the_cheaper_way_is_taken(self):
        # 6.4 ms to compute; 4 blocks to copy twice, of which a step of 1.3 ms hides a part.
        victim = running("v", context=64, blocks=4)
        assert ways(state(block_copy_s=0.95 * MS), victim) == [Way.SWAP]
        assert ways(state(block_copy_s=0.97 * MS), victim) == [Way.RECOMPUTE]

    def test_without_host_blocks_everything_is_computed_again(self):
        assert ways(state(host_blocks=0, block_copy_s=0.0), running("v")) == [Way.RECOMPUTE]

    def test_host_blocks_that_one_victim_takes_are_gone_for_the_next(self):
        now = state(host_blocks=7, block_copy_s=1e-6)
        assert ways(now, running("a"), running("b"), running("c", context=48)) == [
            Way.SWAP,
            Way.RECOMPUTE,
            Way.SWAP,
        ]

    def test_blocks_without_a_computed_token_are_not_worth_a_copy(self):
        empty = RequestFacts("v", 0, 50, 1.0, blocks=4)
        assert ways(state(block_copy_s=0.0), empty) == [Way.RECOMPUTE]


class TestRelease:
    def test_the_last_in_service_order_go_until_enough_came_back(self):
        requests = [running(name, priority=rank) for rank, name in enumerate("abcd")]
        assert [each.id for each in release(state(*requests), 5, MODEL)] == ["a", "b"]
        assert release(state(*requests), 0, MODEL) == ()

    @given(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=12), st.integers(0, 99)
    )
    def test_never_more_than_needed_and_never_too_few(self, sizes, blocks):
        requests = [
            running(str(number), context=max(1, size) * 16, blocks=size, priority=rank)
            for number, (size, rank) in enumerate(sizes)
        ]
        gone = [int(each.id) for each in release(state(*requests), blocks, MODEL)]
        freed = [sizes[number][0] for number in gone]
        assert sum(freed) >= min(blocks, sum(size for size, _ in sizes))
        assert not gone or sum(freed[:-1]) < blocks
        staying = [rank for number, (_, rank) in enumerate(sizes) if number not in gone]
        assert all(sizes[number][1] <= min(staying, default=9) for number in gone)
