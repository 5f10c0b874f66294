"""What a replica reports of its room: the curves of its levels against the model itself."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.decisions.pace import pace_of
from select_n_core.decisions.vacancy import levels_of

MS = 1e-3
COMPUTE = ComputeModel(
    ((1, 1 * MS), (16, 1.5 * MS), (256, 16 * MS)), 2e-8, 1e-9, 1 * MS, 0.01 * MS, copy_slowdown=0.1
)
LATENCY = LatencyModel(24, 6 * MS, COMPUTE)
KV_AT = ((0, 2000), (4, 4000), (12, 8000))


def levels(latency=LATENCY, at=KV_AT):
    return levels_of(latency, 2, at, max_batch=16, max_step_tokens=128)


def test_a_level_knows_its_k_and_kv():
    assert [(each.k, each.kv_tokens) for each in levels()] == [*KV_AT]


@given(st.integers(0, 2), st.integers(1, 16), st.floats(0, 1))
def test_a_step_is_predicted_nearly_as_the_model_does_and_rather_late(number, rows, share):
    level = levels()[number]
    context = int(share * level.kv_tokens * rows / 16)
    exact_s = pace_of(LATENCY, level.k, 2).step_s(StepShape(rows, context))
    said_s = level.step_s(level.compute_s(rows, context))
    assert 0.97 * exact_s <= said_s <= 1.12 * exact_s


@given(st.integers(0, 2), st.floats(0, 0.3))
def test_the_compute_within_a_budget_takes_just_that_budget(number, budget_s):
    level = levels()[number]
    within = level.compute_within(budget_s)
    if within == -math.inf:
        assert level.step_s(0) > budget_s
    else:
        assert level.step_s(within) == pytest.approx(budget_s, rel=1e-6)
        assert level.step_s(within + 1) > budget_s


def test_a_slower_link_shows_where_layers_are_streamed():
    slower = LatencyModel(24, 24 * MS, COMPUTE)
    before, after = levels(), levels(slower)
    alone = [each.step_s(each.compute_s(1, 0)) for each in before]
    later = [each.step_s(each.compute_s(1, 0)) for each in after]
    assert later[0] == alone[0]
    assert later[2] == pytest.approx(12 * 24 * MS, rel=0.02)
    assert later[2] > 3 * alone[2]


def test_a_model_without_any_compute_of_its_own_has_a_curve_too():
    flat = LatencyModel(4, 1 * MS, ComputeModel(((1, 1 * MS),), 0.0, 0.0, 0.0, 0.0))
    [level] = levels(flat, ((2, 64),))
    assert level.step_s(0) == level.step_s(level.compute_s(16, 64)) > 0
