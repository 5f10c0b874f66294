"""The latency model: seconds of a step from its shape, and what fits into a budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.latency import (
    ComputeModel,
    LatencyModel,
    StepShape,
    chunk_pairs,
)
from select_n_core.decisions.law import iteration_s
from select_n_core.errors import InputError

MS = 1e-3


def compute(**changes) -> ComputeModel:
    facts = {
        "token_grid": ((1, 1.0 * MS), (8, 1.4 * MS), (64, 2.8 * MS), (256, 9.2 * MS)),
        "per_context_token_s": 2e-7,
        "per_pair_s": 1e-8,
        "outside_s": 3 * MS,
        "outside_per_row_s": 0.5 * MS,
    }
    return ComputeModel(**{**facts, **changes})


def model(**changes) -> LatencyModel:
    return LatencyModel(**{"units": 30, "transfer_s": 7 * MS, "streaming": compute(), **changes})


@given(st.integers(0, 300), st.integers(1, 300))
def test_pairs_of_a_chunk_are_what_its_queries_see(context, tokens):
    assert chunk_pairs(context, tokens) == sum(context + 1 + i for i in range(tokens))


def test_a_prompt_in_chunks_has_the_pairs_of_the_prompt_at_once():
    step = StepShape().with_chunk(0, 40).with_chunk(40, 60)
    assert (step.tokens, step.prefill_pairs) == (100, chunk_pairs(0, 100))


@pytest.mark.parametrize(
    ("tokens", "unit_ms"),
    [(0, 1.0), (1, 1.0), (8, 1.4), (36, 2.1), (64, 2.8), (256, 9.2), (448, 15.6)],
)
def test_time_by_tokens_is_linear_between_measured_points_and_beyond_the_last(tokens, unit_ms):
    flat = compute(per_context_token_s=0.0, per_pair_s=0.0)
    assert flat.unit_s(StepShape(prefill_tokens=tokens)) == pytest.approx(unit_ms * MS)


def test_one_measured_point_is_a_constant():
    assert compute(token_grid=((4, MS),)).unit_s(StepShape(prefill_tokens=999)) == MS


@given(st.integers(0, 600), st.integers(0, 600))
def test_more_tokens_never_compute_faster(fewer, more):
    fewer, more = sorted((fewer, more))
    assert compute().unit_s(StepShape().with_chunk(0, fewer)) <= compute().unit_s(
        StepShape().with_chunk(0, more)
    )


def test_attention_and_rows_are_charged_where_they_fall():
    step = StepShape(decode_rows=4, context_tokens=400).with_chunk(10, 4)
    assert compute().unit_s(step) == pytest.approx(1.4 * MS + 400 * 2e-7 + 50 * 1e-8)
    assert compute().outside(4) == pytest.approx(5 * MS)


def test_every_part_that_attends_by_itself_is_charged_for_beyond_the_first():
    charged = compute(per_part_s=0.2 * MS)
    decode, prompt = StepShape(4, 400), StepShape().with_chunk(10, 4)
    both = decode.with_chunk(10, 4)
    assert charged.unit_s(decode) == compute().unit_s(decode)
    assert charged.unit_s(prompt) == compute().unit_s(prompt)
    for step, extra_s in ((both, 0.2 * MS), (both.with_chunk(0, 8), 0.4 * MS)):
        assert charged.unit_s(step) == pytest.approx(compute().unit_s(step) + extra_s)
    assert charged.unit_s(both.with_chunk(0, 0)) == charged.unit_s(both)


def test_prompt_tokens_whose_chunks_nobody_counted_are_one_chunk():
    charged = compute(per_part_s=0.2 * MS)
    counted = StepShape(4, 400).with_chunk(10, 4)
    uncounted = StepShape(4, 400, counted.prefill_tokens, counted.prefill_pairs)
    assert charged.unit_s(uncounted) == charged.unit_s(counted)


steps = st.builds(
    StepShape,
    decode_rows=st.integers(0, 64),
    context_tokens=st.integers(0, 50_000),
    prefill_tokens=st.integers(0, 600),
    prefill_pairs=st.integers(0, 100_000),
    chunks=st.integers(0, 8),
)


@given(steps, steps)
def test_more_of_anything_never_computes_faster(one, other):
    charged = compute(per_part_s=0.2 * MS)
    sizes = {name: max(getattr(one, name), getattr(other, name)) for name in StepShape.__slots__}
    assert charged.unit_s(StepShape(**sizes)) >= max(charged.unit_s(one), charged.unit_s(other))


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["per_pair_s", "outside_s", "per_part_s", "copy_slowdown"])
def test_a_coefficient_that_is_no_time_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=field):
        compute(**{field: value})


@pytest.mark.parametrize("grid", [(), ((2, 1.0), (1, 2.0)), ((1, 2.0), (2, 1.0)), ((1, 1), (1, 2))])
def test_a_grid_that_does_not_ascend_is_refused(grid):
    with pytest.raises(InputError, match="token_grid must ascend"):
        compute(token_grid=grid)


def test_a_step_takes_what_the_law_says_of_its_compute():
    step = StepShape(decode_rows=8, context_tokens=800)
    expected_s = iteration_s(30, 12, 2, 1.56 * MS, 7 * MS, 7 * MS)
    assert model().iteration_s(step, 12, 2) == pytest.approx(expected_s)


def test_a_prompt_step_draws_one_row():
    step = StepShape().with_chunk(0, 64)
    assert model().iteration_s(step, 0, 2) == model().iteration_s(step, 0, 2, rows=1)
    assert model().iteration_s(step, 0, 2, rows=3) == pytest.approx(
        model().iteration_s(step, 0, 2) + 1 * MS
    )


def test_resident_compute_counts_at_k_0_alone():
    both = model(resident=compute(outside_s=1 * MS))
    assert both.iteration_s(StepShape(1), 0, 2) < model().iteration_s(StepShape(1), 0, 2)
    assert both.iteration_s(StepShape(1), 1, 2) == model().iteration_s(StepShape(1), 1, 2)


def test_nothing_streamed_is_never_predicted_slower_than_the_streaming_mode():
    slow = model(resident=compute(outside_s=30 * MS))
    assert slow.iteration_s(StepShape(1), 0, 2) == model().iteration_s(StepShape(1), 0, 2)


def test_units_that_come_late_and_cold_take_longer():
    cold = model(
        streaming=compute(streamed_extra_s=MS, stalled_extra_s=2 * MS, stall_s=5 * MS),
    )
    assert cold.iteration_s(StepShape(1), 3, 2) == pytest.approx(
        model().iteration_s(StepShape(1), 3, 2) + 3 * MS
    )


def test_copies_slow_compute_in_proportion_to_how_busy_the_link_is():
    step = StepShape(1)
    slowed = model(streaming=compute(copy_slowdown=0.5), transfer_s=1e-6)
    assert slowed.iteration_s(step, 1, 2) == pytest.approx(
        model(transfer_s=1e-6).iteration_s(step, 1, 2), rel=1e-3
    )
    alone_s = model().iteration_s(step, 0, 2)
    half = model(streaming=compute(copy_slowdown=0.5), transfer_s=alone_s / 2)
    units_s = alone_s - compute().outside(1)
    assert half.iteration_s(step, 1, 1) == pytest.approx(alone_s + 0.25 * units_s, rel=1e-2)


@given(st.integers(0, 8), st.integers(0, 30), st.floats(0, 0.5), st.integers(0, 256))
def test_tokens_within_a_budget_are_the_most_that_keep_it(rows, k, budget_s, limit):
    step = StepShape(decode_rows=rows, context_tokens=100 * rows)

    def took_s(tokens: int) -> float:
        return model().iteration_s(step.with_chunk(0, tokens), k, 2)

    tokens = model().tokens_within(step, k, 2, budget_s, limit)
    assert 0 <= tokens <= limit
    assert tokens == 0 or took_s(tokens) <= budget_s
    assert tokens == limit or took_s(tokens + 1) > budget_s


def test_tokens_are_free_while_copies_outlast_compute_and_never_without_copies():
    step = StepShape(decode_rows=1, context_tokens=64)
    free = model().free_tokens(step, 20, 2, 256)
    before_s = model().iteration_s(step, 20, 2)
    assert 0 < free < 256
    assert model().iteration_s(step.with_chunk(0, free), 20, 2) <= before_s * 1.001
    assert model().iteration_s(step.with_chunk(0, free + 1), 20, 2) > before_s
    assert model().free_tokens(step, 0, 2, 256) == 0


def test_compute_that_hides_the_copies_leaves_no_token_free():
    assert model(transfer_s=1e-5).free_tokens(StepShape(8, 800), 20, 2, 256) == 0


def test_copies_slow_compute_only_while_both_run():
    def model(copy_slowdown: float) -> LatencyModel:
        compute = ComputeModel(((1, 0.01),), 0.0, 0.0, 0.02, 0.0, copy_slowdown=copy_slowdown)
        return LatencyModel(8, 0.03, compute)

    shape = StepShape(1)
    plain, slowed = model(0.0), model(0.5)
    # One slot and every unit streamed: units wait for each copy, only g runs beside one.
    assert slowed.iteration_s(shape, 8, 1) == pytest.approx(
        plain.iteration_s(shape, 8, 1), rel=0.03
    )
    # Copies end before the compute does: they slow the share that they last.
    alone_s = plain.iteration_s(shape, 0, 2)
    assert slowed.iteration_s(shape, 1, 2) == pytest.approx(alone_s + 0.5 * 0.08 * 0.03 / alone_s)
    # Copies make the iteration: all compute is hidden beside them, however slow.
    assert slowed.iteration_s(shape, 8, 3) == pytest.approx(8 * 0.03)
