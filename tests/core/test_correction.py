"""The latency model while serving: two factors follow what is seen, whatever is thrown at them."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from select_n_core.decisions.correction import Correction, Seen
from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape

MS = 1e-3
SLOTS = 2
RECORDED = LatencyModel(
    units=30,
    transfer_s=7 * MS,
    streaming=ComputeModel(((1, 1 * MS), (64, 1.2 * MS), (512, 6 * MS)), 2e-8, 1e-9, 5 * MS, 1e-5),
)
DECODING = StepShape(decode_rows=8, context_tokens=1200)
BROKEN = (math.nan, math.inf, -math.inf, -1.0, 0.0)


def machine(compute=1.0, link=1.0):
    """The machine as it really is."""
    return replace(RECORDED, transfer_s=RECORDED.transfer_s * link, compute_scale=compute)


def iteration(real, k, *, stall_known=True, shape=DECODING):
    seconds = real.iteration_s(shape, k, SLOTS)
    stall_s = max(0.0, seconds - real.compute_s(shape, k, seconds)) if stall_known else None
    return Seen(shape, k, seconds, stall_s, real.transfer_s if k else None)


def after(correction, seen, times):
    for _ in range(times):
        correction = correction.after(seen, RECORDED, SLOTS)
    return correction


def test_a_machine_as_recorded_needs_no_correction():
    correction = after(Correction(), iteration(machine(), 6), 100)
    assert correction.compute == pytest.approx(1, abs=0.02)
    assert correction.transfer == pytest.approx(1, abs=0.02)
    assert correction.error < 0.01
    assert Correction().applied(RECORDED) is RECORDED


@settings(deadline=None)
@given(st.floats(0.5, 3), st.floats(0.5, 3), st.integers(0, 30))
def test_predictions_come_to_what_is_seen(compute, link, k):
    real = machine(compute, link)
    correction = after(Correction(), iteration(real, k), 200)
    corrected = correction.applied(RECORDED)
    assert corrected.iteration_s(DECODING, k, SLOTS) == pytest.approx(
        real.iteration_s(DECODING, k, SLOTS), rel=0.06
    )


@pytest.mark.parametrize("stall_known", [True, False])
def test_a_link_at_half_its_bandwidth_is_known_within_a_few_iterations(stall_known):
    correction = after(Correction(), iteration(machine(link=2), 12, stall_known=stall_known), 8)
    assert correction.transfer > 1.7
    assert correction.compute == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("stall_known", [True, False])
def test_slower_compute_is_not_taken_for_a_slower_link(stall_known):
    correction = after(Correction(), iteration(machine(1.5), 4, stall_known=stall_known), 12)
    assert correction.transfer == 1
    assert correction.compute > 1.35


def test_where_copies_hide_compute_it_is_left_alone():
    correction = after(Correction(), iteration(machine(0.7), 20, stall_known=False), 100)
    assert correction.compute == 1


def test_it_rises_quickly_and_falls_slowly():
    risen = after(Correction(), iteration(machine(1.4), 0), 4)
    fallen = after(risen, iteration(machine(), 0), 4)
    assert risen.compute - 1 > 2 * (risen.compute - fallen.compute) > 0


def test_a_link_that_stalls_for_a_second_is_no_slow_link():
    stalled = replace(iteration(machine(), 10), seconds=1.05, stall_s=1.0, transfer_s=0.5)
    once = Correction().after(stalled, RECORDED, SLOTS)
    assert once.transfer <= 1.25
    assert once.compute < 1.2
    assert after(once, iteration(machine(), 10), 100).transfer == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("seconds", BROKEN)
def test_what_is_no_time_moves_nothing(seconds):
    good = iteration(machine(), 10)
    assert Correction().after(replace(good, seconds=seconds), RECORDED, SLOTS) == Correction()
    if seconds != 0:  # nothing may have waited
        stalled = Correction().after(replace(good, stall_s=seconds), RECORDED, SLOTS)
        assert stalled.compute == 1
    copied = Correction().after(replace(good, transfer_s=seconds), RECORDED, SLOTS)
    assert copied.transfer == 1


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 30),
            st.floats(allow_nan=True, allow_infinity=True),
            st.none() | st.floats(allow_nan=True, allow_infinity=True),
            st.none() | st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=30,
    )
)
def test_whatever_clocks_say_the_model_stays_a_model(story):
    correction = Correction()
    for k, seconds, stall_s, transfer_s in story:
        seen = Seen(DECODING, k, seconds, stall_s, transfer_s)
        correction = correction.after(seen, RECORDED, SLOTS)
        took_s = correction.applied(RECORDED).iteration_s(DECODING, k, SLOTS)
        assert math.isfinite(took_s)
        assert took_s > 0


def test_close_corrections_share_a_model():
    near = Correction(compute=1.2005, transfer=1.5).applied(RECORDED)
    assert Correction(compute=1.2, transfer=1.5001).applied(RECORDED) == near
