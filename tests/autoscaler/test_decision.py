import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.decision import ReplicaFacts, ScalingFacts, ScalingLimits, desired_replicas
from select_n_core.errors import ConfigError, InputError

LIMITS = ScalingLimits(low_water=0.05, high_water=0.3)


def replica(headroom, *, running=4.0, waiting=0.0, floor=0.0):
    return ReplicaFacts(
        ttft_headroom=1.0,
        tpot_headroom=headroom,
        running=running,
        waiting=waiting,
        tpot_floor=floor,
    )


def wanted(*replicas, target=None, low=1, high=8, limits=LIMITS, **facts):
    return desired_replicas(
        ScalingFacts(
            replicas=replicas,
            target_replicas=len(replicas) if target is None else target,
            min_replicas=low,
            max_replicas=high,
            **facts,
        ),
        limits,
    )


def test_no_report_keeps_the_number():
    assert wanted(target=3) == 3
    assert wanted(target=3, silent_replicas=3) == 3


def test_a_broken_promise_asks_for_one_more():
    assert wanted(replica(-0.4)) == 2
    assert wanted(replica(-40.0)) == 2


def test_headroom_between_the_marks_holds():
    assert wanted(replica(0.2), replica(0.2)) == 2


def test_either_promise_counts():
    late_first_token = dataclasses.replace(replica(0.9), ttft_headroom=-0.1)
    assert wanted(late_first_token) == 2


def test_waiting_requests_ask_for_one_more_only_when_no_replica_has_headroom():
    assert wanted(replica(0.2, waiting=2.0), replica(0.2)) == 3
    assert wanted(replica(0.2, waiting=2.0), replica(0.8)) == 2


def test_a_replica_that_already_serves_one_request_at_a_time_is_not_helped_by_another():
    assert wanted(replica(-0.4, running=0.9)) == 1


def test_idle_replicas_leave_one_at_a_time_down_to_the_minimum():
    idle = replica(1.0, running=0.0)
    assert wanted(idle, idle, idle) == 2
    assert wanted(idle, idle) == 1
    assert wanted(idle) == 1
    assert wanted(idle, idle, low=2) == 2


def test_a_replica_leaves_only_if_the_rest_keeps_the_high_water_mark():
    assert wanted(replica(0.66), replica(0.66)) == 1  # 1 - 0.34 * 2 = 0.32
    assert wanted(replica(0.64), replica(0.64)) == 2  # 1 - 0.36 * 2 = 0.28


def test_one_bad_replica_moves_the_number_neither_up_nor_down():
    well = replica(0.95)
    assert wanted(replica(-0.5), well, well, well) == 4
    assert wanted(replica(0.1), well, well, well) == 4


def test_a_step_up_is_not_taken_back_by_the_same_load():
    """The same requests on one replica more are never few enough to remove it again."""
    for fleet in range(1, 9):
        used = 0.96
        assert wanted(*[replica(1 - used)] * fleet, high=9) == fleet + 1
        after = replica(1 - used * fleet / (fleet + 1))
        assert wanted(*[after] * (fleet + 1), high=9) >= fleet + 1


def test_while_a_replica_is_starting_or_has_just_joined_no_other_is_asked_for():
    assert wanted(replica(-0.4), target=2) == 2
    assert wanted(replica(-0.4), replica(-0.4), settling=True) == 2


def test_a_replica_that_cannot_start_is_given_up_when_the_load_has_gone():
    assert wanted(replica(1.0, running=0.0), target=2) == 1


def test_the_load_of_a_silent_replica_is_unknown_so_none_is_removed():
    idle = replica(1.0, running=0.0)
    assert wanted(idle, idle, target=3, silent_replicas=1) == 3
    assert wanted(replica(-0.4), target=2, silent_replicas=1) == 3


def test_the_share_of_tpot_that_no_replica_can_shrink_is_set_apart():
    """A plan that fills the target on purpose is not overloaded."""
    assert wanted(replica(0.04)) == 2
    assert wanted(replica(0.04, floor=0.9)) == 1
    assert wanted(replica(0.001, floor=0.9)) == 2
    # 2 % of the 10 % that load can take: doubled, 4 % of it, so one replica is enough.
    assert wanted(replica(0.08, floor=0.9), replica(0.08, floor=0.9)) == 1
    assert wanted(replica(-0.4, floor=1.0)) == 1


@pytest.mark.parametrize(
    ("marks", "field"),
    [
        ({"low_water": 0.3, "high_water": 0.3}, "low_water"),
        ({"low_water": -1.0}, "low_water"),
        ({"high_water": 1.0}, "high_water"),
        ({"high_water": float("nan")}, "high_water"),
    ],
)
def test_water_marks_that_cannot_work_are_refused(marks, field):
    with pytest.raises(ConfigError) as error:
        ScalingLimits(**marks)
    assert error.value.field == field


@pytest.mark.parametrize(
    "change",
    [{"ttft_headroom": 1.5}, {"tpot_headroom": float("nan")}, {"running": -1}, {"tpot_floor": -1}],
)
def test_facts_that_make_no_sense_are_refused(change):
    with pytest.raises(InputError) as error:
        dataclasses.replace(replica(0.5), **change)
    assert error.value.field in change


headrooms = st.floats(-10, 1)
replicas = st.builds(
    ReplicaFacts,
    ttft_headroom=headrooms,
    tpot_headroom=headrooms,
    running=st.floats(0, 20),
    waiting=st.one_of(st.just(0.0), st.floats(0, 20)),
    tpot_floor=st.floats(0, 1.5),
)
limits = st.tuples(st.floats(-0.9, 0.9), st.floats(-0.9, 0.9)).filter(lambda m: m[0] < m[1])


@st.composite
def scaling_facts(draw):
    low = draw(st.integers(0, 6))
    return ScalingFacts(
        replicas=tuple(draw(st.lists(replicas, max_size=6))),
        target_replicas=draw(st.integers(0, 10)),
        min_replicas=low,
        max_replicas=draw(st.integers(low, 8)),
        silent_replicas=draw(st.integers(0, 2)),
        settling=draw(st.booleans()),
    )


@given(scaling_facts(), limits)
def test_the_number_stays_within_the_bounds_and_one_step(facts, marks):
    number = desired_replicas(facts, ScalingLimits(*marks))
    assert facts.min_replicas <= number <= facts.max_replicas
    if facts.min_replicas <= facts.target_replicas <= facts.max_replicas:
        assert abs(number - facts.target_replicas) <= 1


@given(scaling_facts(), limits, st.data())
def test_less_headroom_never_asks_for_fewer_replicas(facts, marks, data):
    losses = st.floats(0, 5)
    worse = dataclasses.replace(
        facts,
        replicas=tuple(
            dataclasses.replace(
                one,
                ttft_headroom=one.ttft_headroom - data.draw(losses),
                tpot_headroom=one.tpot_headroom - data.draw(losses),
            )
            for one in facts.replicas
        ),
    )
    marks = ScalingLimits(*marks)
    assert desired_replicas(worse, marks) >= desired_replicas(facts, marks)


@given(scaling_facts(), limits, st.permutations(range(6)))
def test_the_order_of_the_replicas_does_not_matter(facts, marks, order):
    shuffled = tuple(facts.replicas[i] for i in order if i < len(facts.replicas))
    other = dataclasses.replace(facts, replicas=shuffled)
    marks = ScalingLimits(*marks)
    assert desired_replicas(other, marks) == desired_replicas(facts, marks)
