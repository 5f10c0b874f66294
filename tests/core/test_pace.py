"""Step times from the table are those of the latency model, a little on the late side."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.decisions.pace import pace_of

MS = 1e-3
MODEL = LatencyModel(
    units=24,
    transfer_s=5 * MS,
    streaming=ComputeModel(
        ((1, 0.8 * MS), (64, 1 * MS), (512, 6 * MS)),
        per_context_token_s=2e-8,
        per_pair_s=1e-9,
        outside_s=2 * MS,
        outside_per_row_s=1e-5,
        streamed_extra_s=0.1 * MS,
        stalled_extra_s=0.2 * MS,
        stall_s=2 * MS,
        copy_slowdown=0.1,
    ),
)
shapes = st.builds(
    StepShape,
    decode_rows=st.integers(0, 300),
    context_tokens=st.integers(0, 200_000),
    prefill_tokens=st.integers(0, 400),
    prefill_pairs=st.integers(0, 200_000),
)


@settings(deadline=None)
@given(shapes, st.integers(1, 24), st.integers(1, 3))
def test_the_table_is_never_early_and_hardly_late(shape, k, slots):
    true_s = MODEL.iteration_s(shape, k, slots)
    assert 0.995 * true_s <= pace_of(MODEL, k, slots).step_s(shape) <= 1.04 * true_s


@given(shapes)
def test_with_nothing_streamed_the_formula_itself_answers(shape):
    assert pace_of(MODEL, 0, 2).step_s(shape) == MODEL.iteration_s(shape, 0, 2)


@settings(deadline=None)
@given(shapes, st.integers(0, 24), st.floats(0, 1), st.integers(0, 600))
def test_the_most_tokens_within_a_time_are_just_within_it(shape, k, budget_s, limit):
    pace = pace_of(MODEL, k, 2)
    most = pace.tokens_within(shape, budget_s, limit)
    assert 0 <= most <= limit
    if most:
        assert pace.step_s(shape.with_chunk(0, most)) <= budget_s
    if most < limit:
        assert pace.step_s(shape.with_chunk(0, most + 1)) > budget_s


@pytest.mark.parametrize("k", [0, 4, 12, 24])
def test_free_tokens_cost_nothing_and_one_more_would(k):
    pace, shape = pace_of(MODEL, k, 2), StepShape(4, 400)
    free = pace.free_tokens(shape, 500)
    assert (free > 0) == (k > 4)
    alone_s = pace.step_s(shape)
    assert pace.step_s(shape.with_chunk(0, free)) <= alone_s * 1.001
    assert pace.step_s(shape.with_chunk(0, free + 1)) > alone_s * 1.001
