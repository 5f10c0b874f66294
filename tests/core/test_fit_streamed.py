"""Fitting what streaming costs: known costs come back in the times of whole steps."""

import pytest
from recorded import mode, record

from select_n_core.decisions.latency import StepShape
from select_n_core.profiling.streamed import fit_streamed
from select_n_core.record import ColdSample, PerformanceRecord, StreamedSample

MS = 1e-3
LATE = {"stalled_extra_s": 0.5 * MS, "stall_s": 5 * MS}
SHAPES = (
    StepShape(decode_rows=4, context_tokens=256),
    StepShape(decode_rows=16, context_tokens=1024),
    StepShape().with_chunk(0, 40),
    StepShape(decode_rows=4, context_tokens=2048).with_chunk(0, 40),
)
KS = (2, 4, 8)


def made(extra_s: float, slowdown: float) -> PerformanceRecord:
    """Of a device with these costs."""
    cold = ColdSample(streamed_extra_s=extra_s, copy_slowdown=slowdown, **LATE)
    grid = ((1, 1 * MS), (64, 3 * MS))
    streaming = mode(1 * MS, 4 * MS, cold, grid, per_context_token_s=1e-7)
    return record(units=30, transfer_s=7 * MS, streaming=streaming)


def sample(shape: StepShape, k: int, seconds: float) -> StreamedSample:
    return StreamedSample(
        decode_rows=shape.decode_rows,
        context_tokens=shape.context_tokens,
        prefill_tokens=shape.prefill_tokens,
        prefill_pairs=shape.prefill_pairs,
        chunks=shape.chunks,
        rows=max(1, shape.decode_rows),
        k=k,
        slots=2,
        seconds=(seconds,) * 3,
    )


def fitted(truth: PerformanceRecord, *more: StreamedSample) -> PerformanceRecord:
    """From nothing but steps of `truth`."""
    model = truth.latency_model()
    steps = [sample(shape, k, model.iteration_s(shape, k, 2)) for shape in SHAPES for k in KS]
    return fit_streamed(made(0.0, 0.0).model_copy(update={"streamed": (*steps, *more)}))


@pytest.mark.parametrize(
    ("extra_s", "slowdown"), [(0.3 * MS, 0.0), (0.0, 0.1), (0.2 * MS, 0.15), (0.0, 0.0)]
)
def test_steps_take_as_long_as_they_were_seen_to(extra_s, slowdown):
    truth = made(extra_s, slowdown)
    found = fitted(truth)
    for shape in (*SHAPES, StepShape(8, 800).with_chunk(100, 20)):
        for k in (1, 3, 6, 12):
            step_s = truth.latency_model().iteration_s(shape, k, 2)
            assert found.latency_model().iteration_s(shape, k, 2) == pytest.approx(step_s, rel=0.01)


def test_what_late_units_cost_is_left_as_it_was_measured():
    cold = fitted(made(0.2 * MS, 0.1)).streaming.cold
    assert (cold.stalled_extra_s, cold.stall_s) == (LATE["stalled_extra_s"], LATE["stall_s"])


def test_a_disturbed_step_does_not_lead_it_astray():
    truth = made(0.2 * MS, 0.1)
    step_s = truth.latency_model().iteration_s(SHAPES[0], 3, 2)
    found = fitted(truth, sample(SHAPES[0], 3, 2 * step_s)).latency_model()
    assert found.iteration_s(SHAPES[0], 3, 2) == pytest.approx(step_s, rel=0.03)


def test_steps_that_were_faster_than_compute_alone_cost_nothing():
    quick = [sample(shape, k, 1 * MS) for shape in SHAPES for k in KS]
    cold = fit_streamed(made(0.1 * MS, 0.1).model_copy(update={"streamed": tuple(quick)})).streaming
    assert (cold.cold.streamed_extra_s, cold.cold.copy_slowdown) == (0, 0)


def test_a_record_without_such_steps_stays_as_it_is():
    plain = made(0.1 * MS, 0.1)
    assert fit_streamed(plain) == plain
