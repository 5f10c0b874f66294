"""Fitting: known coefficients come back from samples made with them, and others are predicted."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from select_n_core.decisions.latency import StepShape
from select_n_core.profiling.fit import fit_mode, least_squares
from select_n_core.profiling.grid import Effort, fitted_shapes, held_out_shapes
from select_n_core.record import ColdSample, ComputeSample

MS = 1e-3
UNITS = 30
COLD = ColdSample(streamed_extra_s=0.1 * MS, stalled_extra_s=0.3 * MS, stall_s=4 * MS)
PER_CONTEXT_S, PER_PAIR_S, PER_PART_S = 3e-7, 2e-8, 0.15 * MS
OUTSIDE_S, PER_ROW_S = 4 * MS, 0.5 * MS
GRID = fitted_shapes(Effort.full(), max_context=8192)
HELD_OUT = held_out_shapes(Effort.full(), max_context=8192)


def by_tokens_s(tokens: int) -> float:
    """Rises by the token, and by more from 40 of them on: a knot of the full grid."""
    return (1 + 0.03 * tokens + 0.02 * max(0, tokens - 40)) * MS


def unit_s(shape: StepShape) -> float:
    return (
        by_tokens_s(shape.tokens)
        + PER_CONTEXT_S * shape.context_tokens
        + PER_PAIR_S * shape.prefill_pairs
        + PER_PART_S * max(0, (shape.decode_rows > 0) + shape.chunks - 1)
    )


def sample(shape: StepShape, rows: int, noise: float = 1.0) -> ComputeSample:
    return ComputeSample(
        decode_rows=shape.decode_rows,
        context_tokens=shape.context_tokens,
        prefill_tokens=shape.prefill_tokens,
        prefill_pairs=shape.prefill_pairs,
        chunks=shape.chunks,
        rows=rows,
        unit_s=unit_s(shape) * noise,
        outside_s=(OUTSIDE_S + PER_ROW_S * rows) * noise,
        variation=0.01,
        repeats=7,
    )


def samples(noise=lambda: 1.0) -> list[ComputeSample]:
    return [sample(shape.facts(), len(shape.rows), noise()) for shape in GRID]


def fitted(of: list[ComputeSample], cold: ColdSample | None = COLD):
    return fit_mode(of, cold, threads=1, units=UNITS)


def test_known_coefficients_come_back():
    mode = fitted(samples())
    assert mode.per_context_token_s == pytest.approx(PER_CONTEXT_S)
    assert mode.per_pair_s == pytest.approx(PER_PAIR_S)
    assert mode.per_part_s == pytest.approx(PER_PART_S)
    assert mode.outside_s == pytest.approx(OUTSIDE_S)
    assert mode.outside_per_row_s == pytest.approx(PER_ROW_S)
    assert [tokens for tokens, _ in mode.token_grid] == [1, 4, 16, 40, 100, 256]
    for tokens, seconds in mode.token_grid:
        assert seconds == pytest.approx(by_tokens_s(tokens))
    assert mode.fit_error == pytest.approx(0, abs=1e-9)
    assert (mode.threads, mode.cold) == (1, COLD)
    assert mode.samples == tuple(samples())


@pytest.mark.parametrize("shape", HELD_OUT)
def test_the_fitted_model_predicts_shapes_that_were_not_measured(shape):
    model = fitted(samples()).compute_model()
    assert model.unit_s(shape.facts()) == pytest.approx(unit_s(shape.facts()))
    assert model.outside(6) == pytest.approx(OUTSIDE_S + 6 * PER_ROW_S)


def test_every_prompt_of_a_step_is_charged_for():
    model = fitted(samples()).compute_model()
    one = StepShape(decode_rows=4, context_tokens=800).with_chunk(0, 60)
    two = StepShape(decode_rows=4, context_tokens=800).with_chunk(0, 30).with_chunk(0, 30)
    pairs_s = PER_PAIR_S * (two.prefill_pairs - one.prefill_pairs)
    assert model.unit_s(two) == pytest.approx(model.unit_s(one) + PER_PART_S + pairs_s)


def test_noise_of_a_few_per_cent_stays_a_few_per_cent():
    draw = random.Random(1)
    mode = fitted(samples(lambda: draw.uniform(0.97, 1.03)))
    assert 0 < mode.fit_error < 0.06
    model = mode.compute_model()
    for shape in (*GRID, *HELD_OUT):
        facts, rows = shape.facts(), len(shape.rows)
        step_s = UNITS * unit_s(facts) + OUTSIDE_S + PER_ROW_S * rows
        assert UNITS * model.unit_s(facts) + model.outside(rows) == pytest.approx(step_s, rel=0.05)


def test_the_fit_error_is_the_largest_on_its_own_steps():
    wild = samples()
    wild.append(sample(StepShape(4, 4 * 64), 4, noise=2.0))
    mode = fitted(wild)
    model = mode.compute_model()
    predicted_s = [UNITS * model.unit_s(s.shape()) + model.outside(s.rows) for s in wild]
    measured_s = [UNITS * s.unit_s + s.outside_s for s in wild]
    errors = [abs(p / m - 1) for p, m in zip(predicted_s, measured_s, strict=True)]
    assert mode.fit_error == pytest.approx(max(errors))
    assert mode.fit_error > 0.2


def test_what_prompt_tokens_cost_outside_the_units_is_not_lost():
    heavier = [
        s.model_copy(update={"outside_s": s.outside_s + 2e-6 * s.prefill_tokens}) for s in samples()
    ]
    mode = fitted(heavier)
    assert mode.outside_s == pytest.approx(OUTSIDE_S)
    assert mode.fit_error < 1e-3


def test_attention_measured_faster_with_more_context_counts_as_free():
    decode = [
        sample(StepShape(4, 4 * 64), 4, noise=1.1),
        sample(StepShape(4, 4 * 512), 4, noise=0.5),
    ]
    mode = fitted(decode, None)
    assert mode.per_context_token_s == 0
    assert mode.compute_model().unit_s(StepShape(4, 10_000)) > 0


def test_one_sample_is_a_model_of_that_step():
    mode = fit_mode([sample(StepShape(1, 64), 1)], None, threads=2, units=UNITS)
    assert (mode.per_pair_s, mode.outside_per_row_s) == (0, 0)
    assert mode.fit_error == pytest.approx(0, abs=1e-9)
    assert mode.compute_model().outside(9) == pytest.approx(mode.samples[0].outside_s)


@settings(deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_noise_leaves_a_model_that_never_gets_faster_with_more_work(draw):
    mode = fitted(samples(lambda: draw.uniform(0.2, 5)))
    model = mode.compute_model()  # refuses a grid that does not ascend
    assert all(seconds > 0 for _, seconds in mode.token_grid)
    assert model.unit_s(StepShape(8, 4000)) >= model.unit_s(StepShape(4, 2000)) > 0
    less = StepShape(4, 2000).with_chunk(0, 20)
    assert model.unit_s(less) >= model.unit_s(StepShape(4, 2000))
    assert model.unit_s(less.with_chunk(100, 20)) >= model.unit_s(less)
    assert model.outside(8) >= model.outside(1) >= 0


class TestLeastSquares:
    def test_it_is_the_ordinary_one_where_that_is_positive(self):
        draw = np.random.default_rng(1)
        columns, truth = draw.random((20, 5)), np.array([1.0, 0.5, 2.0, 0.1, 3.0])
        assert least_squares(columns, columns @ truth) == pytest.approx(truth)

    def test_columns_of_very_different_size_are_told_apart(self):
        draw = np.random.default_rng(2)
        columns = draw.random((20, 3)) * np.array([1.0, 1e6, 1e-6])
        truth = np.array([1e-3, 2e-9, 5.0])
        assert least_squares(columns, columns @ truth) == pytest.approx(truth)

    @settings(deadline=None)
    @given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 8))
    def test_what_it_finds_cannot_be_bettered(self, seed, rows, unknowns):
        draw = np.random.default_rng(seed)
        columns, target = draw.normal(size=(rows, unknowns)), draw.normal(size=rows)
        found = least_squares(columns, target)
        gain = columns.T @ (target - columns @ found)
        assert (found >= 0).all()
        # Karush, Kuhn and Tucker: nothing at zero wants to rise, nothing above it to move.
        assert (gain <= 1e-6).all()
        assert np.abs(gain[found > 1e-9]).max(initial=0.0) <= 1e-6

    def test_the_same_column_twice_is_no_trouble(self):
        column = np.arange(1.0, 6.0)
        found = least_squares(np.column_stack([column, column]), 3 * column)
        assert found.sum() == pytest.approx(3)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_time_is_no_sample(seconds):
    facts = sample(StepShape(1, 64), 1).model_dump()
    with pytest.raises(ValidationError, match="unit_s"):
        ComputeSample(**{**facts, "unit_s": seconds})
