"""From a plan to what it needs of host memory, and what more or less of it means."""

import mmap
from dataclasses import replace
from itertools import pairwise

import pytest
from recorded import record

from select_n_core.decisions.candidate import PlanInputs
from select_n_core.decisions.lease import Ladder, paged, with_mirrors
from select_n_core.decisions.plan import make_plan
from select_n_core.slo import SLO

UNIT_BYTES = 3 * mmap.PAGESIZE - 256
PAGED = 3 * mmap.PAGESIZE


@pytest.fixture
def plan():
    """Six units of which three or more have to be streamed; each one more gives room for more."""
    made = record(unit_bytes=UNIT_BYTES)
    memory = made.memory(16)
    inputs = PlanInputs(
        memory=memory,
        latency=made.latency_model(),
        slo=SLO(tpot_s=5.0, ttft_s=30.0),
        device_bytes=memory.static_bytes + 5 * UNIT_BYTES + 2 * 8192,
        host_bytes=1 << 30,
        max_batch=64,
        prompt_tokens=12,
        output_tokens=4,
    )
    return make_plan(inputs)


def test_sizes_are_in_whole_pages():
    sizes = (0, 1, mmap.PAGESIZE, mmap.PAGESIZE + 1)
    assert [paged(size) for size in sizes] == [mmap.PAGESIZE * pages for pages in (0, 1, 1, 2)]


def test_the_floor_is_the_units_without_a_home_and_host_kv(plan):
    assert plan.k_min == 3
    assert Ladder.of(plan).floor_bytes == 3 * PAGED
    with_kv = Ladder.of(plan, host_kv_bytes=mmap.PAGESIZE + 1)
    assert with_kv.floor_bytes == 3 * PAGED + 2 * mmap.PAGESIZE


def test_each_rung_is_a_mirror_and_gains_what_the_planner_says(plan):
    rungs = Ladder.of(plan).rungs()
    assert [rung.nbytes for rung in rungs] == [PAGED] * 3
    rates = [candidate.requests_per_s for candidate in plan.candidates[3:]]
    assert rates == sorted(rates)
    gains = [after - before for before, after in pairwise(rates)]
    assert [rung.gain_per_s for rung in rungs] == pytest.approx(gains)
    assert gains[0] > 0


def test_a_mirror_that_makes_it_slower_gains_nothing_and_loses_nothing(plan):
    changed = list(plan.candidates)
    changed[4] = replace(changed[4], serving=changed[4].serving._replace(requests_per_s=0.001))
    slower = Ladder.of(replace(plan, candidates=tuple(changed)))
    gains = needed(slower.rungs())
    both = [rung.gain_per_s for rung in Ladder.of(plan).rungs()]
    assert gains == pytest.approx([0.0, both[0] + both[1], both[2]])


def needed(rungs) -> list[float]:
    """What they gain at the load there is."""
    return [0.0 if rung.spare else rung.gain_per_s for rung in rungs]


def test_nobody_gains_from_serving_more_than_comes(plan):
    least = plan.candidates[3].requests_per_s
    assert needed(Ladder.of(plan).rungs(least)) == [0.0] * 3
    assert sum(needed(Ladder.of(plan).rungs(least + 0.5))) == pytest.approx(0.5)


def test_what_no_load_wants_gains_far_less_than_what_one_does(plan):
    ladder = Ladder.of(plan)
    idle, loaded = ladder.rungs(0.0), ladder.rungs()
    assert all(rung.spare for rung in idle)
    assert not any(rung.spare for rung in loaded)
    assert 0 < 100 * max(idle).gain_per_s < min(rung.gain_per_s for rung in loaded)


def test_host_memory_that_the_plan_was_not_given_still_counts_as_a_gain(plan):
    """The ladder says what more would be worth: that there is no more now is why it is asked."""
    poor = [replace(each, fits_host=each.k <= 3) for each in plan.candidates]
    assert Ladder.of(replace(plan, candidates=tuple(poor))).rungs() == Ladder.of(plan).rungs()


def test_with_fewer_mirrors_the_best_k_below_is_chosen_and_the_rest_stays(plan):
    assert plan.k == plan.mirrors == 6
    fewer = with_mirrors(plan, 4)
    chosen = plan.candidates[4]
    assert (fewer.k, fewer.mirrors, fewer.host_bytes) == (4, 4, chosen.host_bytes)
    assert fewer.predicted_tpot_s == chosen.serving.tpot_s
    assert (fewer.kv_tokens, fewer.interval) == (chosen.kv_tokens, 1.5)
    assert (fewer.k_min, fewer.k_max, fewer.max_running) == (3, 6, plan.max_running)


def test_with_as_many_mirrors_as_k_streams_it_stays_as_it_was(plan):
    assert with_mirrors(plan, plan.mirrors) == plan


def test_a_ladder_ends_where_the_plan_may_mirror_no_more(plan):
    less = Ladder.of(with_mirrors(plan, 4))
    assert len(less.rungs()) == 1
    assert less.mirrored_bytes(4) == 4 * UNIT_BYTES
    assert less.floor_rate_per_s == plan.candidates[3].requests_per_s


def test_a_typical_request_lives_as_long_as_it_is_among_those_that_are_served(plan):
    chosen = plan.candidates[plan.k].serving
    assert Ladder.of(plan).lifetime_s == pytest.approx(chosen.batch / chosen.requests_per_s)


def test_where_typical_requests_gain_nothing_those_that_wait_do(plan):
    """They may be longer, and the planner mirrors units for such: see `decisions.lending`."""
    flat = replace(Ladder.of(plan), rates_per_s=(4.0,) * 7)
    assert needed(flat.rungs(9.0)) == [0.0] * 3
    assert [rung.gain_per_s for rung in flat.rungs(9.0, waiting_per_s=3.0)] == [1.0] * 3


def test_what_typical_requests_gain_counts_where_it_is_more_than_who_waits(plan):
    ladder = Ladder.of(plan)
    assert ladder.rungs(waiting_per_s=1e-9) == ladder.rungs()
