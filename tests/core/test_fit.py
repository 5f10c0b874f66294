"""Fitting: known coefficients come back from samples made with them."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from select_n_core.decisions.latency import StepShape, chunk_pairs
from select_n_core.profiling.fit import fit_mode, shape_of
from select_n_core.record import ColdSample, ComputeSample

MS = 1e-3
COLD = ColdSample(streamed_extra_s=0.1 * MS, stalled_extra_s=0.3 * MS, stall_s=4 * MS)
PER_CONTEXT_S, PER_PAIR_S, OUTSIDE_S, PER_ROW_S = 3e-7, 2e-8, 4 * MS, 0.5 * MS


def by_tokens_s(tokens: int) -> float:
    return (1 + 0.03 * tokens) * MS


def sample(shape: StepShape, rows: int, noise: float = 1.0) -> ComputeSample:
    unit_s = (
        by_tokens_s(shape.tokens)
        + PER_CONTEXT_S * shape.context_tokens
        + PER_PAIR_S * shape.prefill_pairs
    )
    return ComputeSample(
        decode_rows=shape.decode_rows,
        context_tokens=shape.context_tokens,
        prefill_tokens=shape.prefill_tokens,
        prefill_pairs=shape.prefill_pairs,
        rows=rows,
        unit_s=unit_s * noise,
        outside_s=(OUTSIDE_S + PER_ROW_S * rows) * noise,
        variation=0.01,
        repeats=7,
    )


def samples(noise=lambda: 1.0) -> list[ComputeSample]:
    decode = [
        sample(StepShape(batch, batch * context), batch, noise())
        for batch in (1, 4, 8)
        for context in (64, 512)
    ]
    prompts = [
        sample(StepShape().with_chunk(context, tokens), 1, noise())
        for tokens in (32, 128)
        for context in (0, 512)
    ]
    return decode + prompts


def test_known_coefficients_come_back():
    mode = fit_mode(samples(), COLD, threads=1)
    assert mode.per_context_token_s == pytest.approx(PER_CONTEXT_S)
    assert mode.per_pair_s == pytest.approx(PER_PAIR_S)
    assert mode.outside_s == pytest.approx(OUTSIDE_S)
    assert mode.outside_per_row_s == pytest.approx(PER_ROW_S)
    assert [tokens for tokens, _ in mode.token_grid] == [1, 4, 8, 32, 128]
    for tokens, seconds in mode.token_grid:
        assert seconds == pytest.approx(by_tokens_s(tokens))
    assert mode.fit_error == pytest.approx(0, abs=1e-9)
    assert (mode.threads, mode.cold) == (1, COLD)
    assert mode.samples == tuple(samples())


def test_the_fitted_model_predicts_shapes_that_were_not_measured():
    model = fit_mode(samples(), COLD, threads=1).compute_model()
    unseen = StepShape(decode_rows=6, context_tokens=6 * 200).with_chunk(100, 50)
    expected_s = by_tokens_s(56) + PER_CONTEXT_S * 1200 + PER_PAIR_S * chunk_pairs(100, 50)
    assert model.unit_s(unseen) == pytest.approx(expected_s)
    assert model.outside(6) == pytest.approx(OUTSIDE_S + 6 * PER_ROW_S)


def test_noise_of_a_few_per_cent_stays_a_few_per_cent():
    draw = random.Random(1)
    mode = fit_mode(samples(lambda: draw.uniform(0.97, 1.03)), COLD, threads=1)
    assert 0 < mode.fit_error < 0.1
    for exact in samples():
        assert mode.compute_model().unit_s(shape_of(exact)) == pytest.approx(exact.unit_s, rel=0.1)


def test_the_fit_error_is_the_largest_on_its_own_samples():
    wild = samples()
    wild.append(sample(StepShape(4, 4 * 64), 4, noise=2.0))
    mode = fit_mode(wild, COLD, threads=1)
    model = mode.compute_model()
    assert mode.fit_error == max(abs(model.unit_s(shape_of(s)) / s.unit_s - 1) for s in wild)
    assert mode.fit_error > 0.2


def test_attention_measured_faster_with_more_context_counts_as_free():
    decode = [
        sample(StepShape(4, 4 * 64), 4, noise=1.1),
        sample(StepShape(4, 4 * 512), 4, noise=0.5),
    ]
    mode = fit_mode(decode, None, threads=1)
    assert mode.per_context_token_s == 0
    assert mode.compute_model().unit_s(StepShape(4, 10_000)) > 0


def test_one_sample_is_a_constant_model():
    mode = fit_mode([sample(StepShape(1, 64), 1)], None, threads=2)
    assert (mode.per_context_token_s, mode.per_pair_s, mode.outside_per_row_s) == (0, 0, 0)
    assert mode.fit_error == 0
    model = mode.compute_model()
    assert model.unit_s(StepShape(9, 999)) == mode.samples[0].unit_s
    assert model.outside(9) == mode.samples[0].outside_s


@given(st.randoms(use_true_random=False))
def test_any_noise_leaves_a_model_that_never_gets_faster_with_more_work(draw):
    mode = fit_mode(samples(lambda: draw.uniform(0.2, 5)), COLD, threads=1)
    model = mode.compute_model()  # refuses a grid that does not ascend
    assert all(seconds > 0 for _, seconds in mode.token_grid)
    assert model.unit_s(StepShape(8, 4000)) >= model.unit_s(StepShape(4, 2000)) > 0
    assert model.outside(8) >= model.outside(1) >= 0


@pytest.mark.parametrize("unit_s", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_time_is_no_sample(unit_s):
    facts = sample(StepShape(1, 64), 1).model_dump()
    with pytest.raises(ValidationError, match="unit_s"):
        ComputeSample(**{**facts, "unit_s": unit_s})
