"""The planner: k and N from a latency model, a memory budget and targets; or why there is none."""

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from select_n_core.decisions.candidate import TPOT_MARGIN, PlanInputs, evaluate
from select_n_core.decisions.interval import WORTH
from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.decisions.layout import ModelMemory, arena_bytes_for
from select_n_core.decisions.plan import (
    Note,
    Reason,
    capacity_tokens,
    make_plan,
)
from select_n_core.errors import InputError
from select_n_core.quantities import parse_bytes, parse_seconds
from select_n_core.slo import SLO

MS, MIB = 1e-3, 1 << 20

# The demo model on two cores and a link of 1 GB/s, in round numbers.
STREAMING = ComputeModel(
    token_grid=((1, 1.2 * MS), (4, 1.3 * MS), (8, 1.5 * MS), (32, 2.4 * MS), (256, 9 * MS)),
    per_context_token_s=1.5e-7,
    per_pair_s=2e-8,
    outside_s=4 * MS,
    outside_per_row_s=0.4 * MS,
    streamed_extra_s=0.1 * MS,
    stalled_extra_s=0.2 * MS,
    stall_s=5 * MS,
)
RESIDENT = replace(
    STREAMING,
    token_grid=((1, 0.8 * MS), (256, 6 * MS)),
    streamed_extra_s=0.0,
    stalled_extra_s=0.0,
)
DEMO_MEMORY = ModelMemory(
    static_bytes=56_627_712,
    unit_bytes=(7_080_192,) * 30,
    kv_block_bytes=23_040 * 32,
    block_tokens=32,
)


def demo(tpot_ms: float = 100, device_mib: float = 256, host_mib: float = 1024, **changes):
    inputs = PlanInputs(
        memory=DEMO_MEMORY,
        latency=LatencyModel(30, 7.1 * MS, STREAMING, RESIDENT),
        slo=SLO(tpot_s=tpot_ms * MS, ttft_s=2.0),
        device_bytes=int(device_mib * MIB),
        host_bytes=int(host_mib * MIB),
        max_batch=8,
    )
    return replace(inputs, **changes)


def upper_k(plan) -> int:
    """The largest k that the targets and host memory allow."""
    return max(c.k for c in plan.candidates if c.fits_host and c.meets_tpot and c.meets_ttft)


class TestDemo:
    def test_the_quickstart_must_stream_and_says_one_in_how_many(self):
        plan = make_plan(demo())
        assert plan.feasible
        assert plan.k > 2
        assert plan.interval == pytest.approx(30 / plan.k, abs=1e-4)
        assert not plan.candidates[0].fits_device
        assert plan.message == f"one in every {plan.interval:g} layers streams from host memory"
        assert plan.predicted_tpot_s <= 0.1 * (1 - TPOT_MARGIN)
        assert plan.k_min <= plan.k <= plan.mirrors
        assert plan.host_bytes == plan.mirrors * 7_080_192
        assert plan.max_batch >= 1
        assert plan.reason is plan.note is None

    def test_tighter_targets_bound_k_lower(self):
        bounds = [upper_k(make_plan(demo(tpot_ms))) for tpot_ms in (45, 60, 100, 250)]
        assert bounds == sorted(set(bounds))
        assert bounds[-1] == 30

    def test_the_interval_range_runs_from_the_targets_bound_to_memorys(self):
        plan = make_plan(demo())
        assert plan.interval_range == (
            pytest.approx(30 / upper_k(plan), abs=1e-4),
            pytest.approx(30 / min(c.k for c in plan.candidates if c.fits_device), abs=1e-4),
        )
        low, high = plan.interval_range
        assert low <= plan.interval <= high

    def test_host_memory_of_64_mib_caps_k_at_9(self):
        plan = make_plan(demo(tpot_ms=250, host_mib=64))
        assert DEMO_MEMORY.host_cap(64 * MIB) == 9
        assert upper_k(plan) == 9
        assert plan.feasible
        assert plan.k <= 9

    def test_too_small_an_arena_for_the_target_is_an_empty_range_naming_both_bounds(self):
        plan = make_plan(demo(device_mib=128))
        assert not plan.feasible
        assert plan.reason is Reason.INTERVAL_RANGE_EMPTY
        low, high = plan.interval_range
        assert low > high
        assert f"N >= {low:g} (k <= {upper_k(plan)})" in plan.message
        assert f"N <= {high:g} (k >= {plan.k})" in plan.message
        assert "MiB of device_memory, or a tpot of " in plan.message

    def test_a_target_below_compute_says_what_it_would_take(self):
        plan = make_plan(demo(tpot_ms=20, device_mib=512))
        assert plan.reason is Reason.SLO_BELOW_COMPUTE
        least_s = parse_seconds(re.search(r"needs a tpot of (\S+ m?s)", plan.message)[1])
        assert "the targets are 20 ms and 2 s; raise them" in plan.message
        assert make_plan(demo(tpot_ms=least_s / MS, device_mib=512)).feasible

    def test_a_first_token_that_cannot_come_in_time_names_ttft(self):
        plan = make_plan(demo(slo=SLO(tpot_s=0.1, ttft_s=0.01)))
        assert plan.reason is Reason.SLO_BELOW_COMPUTE
        assert "needs a ttft of " in plan.message
        assert "the targets are 100 ms and 10 ms; raise them" in plan.message

    def test_a_device_below_static_weights_and_one_request_says_what_it_would_take(self):
        plan = make_plan(demo(device_mib=64))
        assert plan.reason is Reason.DEVICE_TOO_SMALL
        assert plan.interval_range is None
        assert "64 MiB are given; raise device_memory" in plan.message

    def test_host_memory_below_what_the_device_leaves_out_says_what_it_would_take(self):
        plan = make_plan(demo(host_mib=16))
        assert plan.reason is Reason.HOST_TOO_SMALL
        assert "16 MiB are given; raise host_memory or device_memory" in plan.message
        needed = parse_bytes(re.search(r"takes (\S+ \S+) of host memory", plan.message)[1])
        assert make_plan(demo(tpot_ms=100, host_mib=needed / MIB)).feasible

    def test_a_device_that_holds_everything_streams_nothing(self):
        plan = make_plan(demo(device_mib=512))
        assert (plan.feasible, plan.k, plan.interval) == (True, 0, None)
        assert plan.note is Note.OFFLOAD_NOT_NEEDED
        assert plan.host_bytes == 0
        assert plan.interval_range[1] is None

    def test_an_expected_rate_streams_no_more_than_it_takes(self):
        by_rate = [make_plan(demo(rate_per_s=rate)).k for rate in (0.1, 1.0, 2.0, 100.0)]
        assert by_rate == sorted(by_rate)
        assert by_rate[0] < by_rate[-1] == make_plan(demo()).k

    def test_one_request_may_take_all_kv_that_k_can_free_but_not_more_than_the_model_holds(self):
        inputs = demo()
        plan = make_plan(inputs)
        most = plan.candidates[plan.mirrors]
        assert most.feasible
        assert capacity_tokens(plan, inputs) == most.kv_tokens > plan.kv_tokens
        fixed = make_plan(demo(forced_k=plan.k))
        assert capacity_tokens(fixed, inputs) == fixed.kv_tokens
        assert capacity_tokens(plan, replace(inputs, max_context=300)) == 300


class TestLendingFromNothingStreamed:
    """k = 0 is best for typical requests; mirrors are pinned if other requests gain by them."""

    def test_homes_may_be_lent_where_more_requests_than_fit_would_be_in_time(self):
        plan = make_plan(demo(device_mib=290))
        assert (plan.k, plan.k_min, plan.note) == (0, 0, Note.OFFLOAD_NOT_NEEDED)
        assert plan.mirrors == upper_k(plan) > 2
        assert plan.candidates[plan.mirrors].kv_tokens > plan.kv_tokens
        assert plan.host_bytes == DEMO_MEMORY.mirrored_bytes(plan.mirrors)
        assert plan.message.endswith(f"until requests wait for KV, then up to k = {plan.mirrors}")

    def test_nothing_is_pinned_where_time_binds_before_kv_does(self):
        plan = make_plan(demo(device_mib=320))
        assert (plan.k, plan.k_min, plan.mirrors, plan.host_bytes) == (0, 0, 0, 0)
        assert plan.message == "everything fits on the device: nothing is streamed"

    def test_host_memory_bounds_what_may_be_lent(self):
        few = make_plan(demo(device_mib=290, host_mib=7 * 7_080_192 / MIB))
        assert (few.k, few.mirrors) == (0, 7)
        none = make_plan(demo(device_mib=290, host_mib=2 * 7_080_192 / MIB))
        assert (none.mirrors, none.host_bytes) == (0, 0)  # as many as slots free nothing

    def test_a_fixed_interval_of_none_pins_nothing(self):
        assert make_plan(demo(device_mib=290, forced_k=0)).host_bytes == 0

    def test_a_context_too_short_to_fill_the_kv_pins_nothing(self):
        assert make_plan(demo(device_mib=290, max_context=192, max_batch=2)).mirrors == 0

    def test_a_request_longer_than_all_kv_of_k_0_is_taken(self):
        inputs = demo(device_mib=275, rate_per_s=0.1)
        plan = make_plan(inputs)
        assert plan.k == 0
        assert capacity_tokens(plan, inputs) > plan.kv_tokens


class TestForcedInterval:
    def test_it_is_obeyed_and_noted(self):
        plan = make_plan(demo(forced_k=9))
        assert (plan.feasible, plan.k, plan.note) == (True, 9, Note.FORCED_INTERVAL)

    def test_it_is_obeyed_even_where_it_misses_the_targets(self):
        plan = make_plan(demo(forced_k=30))
        assert plan.feasible
        assert plan.note is Note.FORCED_INTERVAL_MISSES_SLO
        assert plan.predicted_tpot_s > 0.1
        assert plan.max_batch == 8

    @pytest.mark.parametrize("k", [1, 2])
    def test_as_many_units_as_slots_free_nothing_and_that_is_said(self, k):
        plan = make_plan(demo(device_mib=512, forced_k=k))
        assert (plan.k, plan.note) == (k, Note.FORCED_INTERVAL_GAINS_NOTHING)
        assert "frees no device memory" in plan.message

    def test_off_where_the_model_does_not_fit_names_the_mend(self):
        plan = make_plan(demo(forced_k=0))
        assert plan.reason is Reason.DEVICE_TOO_SMALL
        needed = parse_bytes(re.search(r"needs (\S+ \S+) of device memory", plan.message)[1])
        assert "raise device_memory or set interval: auto" in plan.message
        assert make_plan(demo(forced_k=0, device_mib=needed / MIB)).feasible

    def test_too_little_host_memory_names_the_mend(self):
        plan = make_plan(demo(forced_k=15, host_mib=64))
        assert plan.reason is Reason.HOST_TOO_SMALL
        assert "raise host_memory or set interval: auto" in plan.message

    def test_memory_for_one_request_runs_one_at_a_time(self):
        one = arena_bytes_for(DEMO_MEMORY, 30, 2, 6)
        plan = make_plan(demo(forced_k=30, device_bytes=one))
        assert (plan.kv_tokens, plan.max_batch) == (192, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device_bytes", 0),
        ("slots", 0),
        ("max_batch", 0),
        ("prompt_tokens", 0),
        ("output_tokens", 0),
        ("host_bytes", -1),
        ("forced_k", 31),
        ("max_step_tokens", 7),
        ("max_context", 191),
    ],
)
def test_impossible_inputs_are_refused_by_name(field, value):
    names = {
        "forced_k": "interval",
        "host_bytes": "host_memory",
        "max_context": "prompt_tokens",
    }
    with pytest.raises(InputError) as caught:
        make_plan(demo(**{field: value}))
    assert caught.value.field == names.get(field, field)


@st.composite
def compute_models(draw):
    seconds = draw(st.lists(st.floats(0, 4), min_size=5, max_size=5).map(sorted))
    base_ms = draw(st.floats(0.1, 3))
    return ComputeModel(
        token_grid=tuple(
            (tokens, (base_ms + ms) * MS)
            for tokens, ms in zip((1, 4, 16, 64, 256), seconds, strict=True)
        ),
        per_context_token_s=draw(st.floats(0, 5e-7)),
        per_pair_s=draw(st.floats(0, 5e-8)),
        outside_s=draw(st.floats(0, 30)) * MS,
        outside_per_row_s=draw(st.floats(0, 2)) * MS,
    )


@st.composite
def situations(draw, even=True):
    """Any model and machine; where it was measured resident, that is no slower than streaming."""
    units, pages = draw(st.integers(4, 24)), st.integers(1, 200)
    sizes = [draw(pages)] * units if even else [draw(pages) for _ in range(units)]
    memory = ModelMemory(
        draw(pages) * 256, tuple(256 * size for size in sizes), draw(pages) * 256, 32
    )
    streaming = draw(compute_models())
    resident = replace(
        streaming,
        token_grid=tuple((tokens, 0.7 * s) for tokens, s in streaming.token_grid),
        outside_s=0.9 * streaming.outside_s,
    )
    latency = LatencyModel(
        units, draw(st.floats(0.1, 20)) * MS, streaming, draw(st.sampled_from([None, resident]))
    )
    fast_s = latency.iteration_s(StepShape(1, 160), 0, 2)
    slow_s = latency.iteration_s(StepShape(8, 1280), units, 2)
    return PlanInputs(
        memory=memory,
        latency=latency,
        slo=SLO(draw(st.floats(0.9 * fast_s, 1.3 * slow_s)), draw(st.floats(0.05, 5))),
        device_bytes=int(draw(st.floats(0.2, 1.5)) * arena_bytes_for(memory, 0, 2, 6)),
        host_bytes=int(draw(st.floats(0.2, 1.2)) * sum(memory.unit_bytes)),
        slots=draw(st.integers(1, 3)),
        max_batch=draw(st.sampled_from([1, 4, 8])),
        rate_per_s=draw(st.one_of(st.none(), st.floats(0.1, 10))),
    )


planning = settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@planning
@given(situations(), st.floats(1, 3))
def test_a_tighter_tpot_never_gives_a_smaller_interval(inputs, looser):
    tight = make_plan(inputs)
    loose = make_plan(replace(inputs, slo=SLO(inputs.slo.tpot_s * looser, inputs.slo.ttft_s)))
    assert not tight.feasible or loose.feasible
    if tight.feasible:
        assert tight.k <= loose.k


@planning
@given(situations(even=False))
def test_a_feasible_plan_keeps_every_limit(inputs):
    plan = make_plan(inputs)
    if plan.feasible:
        assert plan.reason is None
        assert plan.predicted_tpot_s <= inputs.slo.tpot_s * (1 - TPOT_MARGIN)
        assert plan.predicted_ttft_s <= inputs.slo.ttft_s
        assert plan.host_bytes <= inputs.host_bytes
        assert plan.kv_tokens >= 192 * plan.max_batch
        assert 1 <= plan.max_batch <= inputs.max_batch
        assert plan.k == 0 or plan.k > inputs.slots
    else:
        assert plan.reason is not None
        assert plan.max_batch == 0


@planning
@given(situations(), st.data())
def test_homes_are_lent_from_k_0_only_if_some_prompt_is_served_more_often(inputs, data):
    inputs = replace(inputs, max_context=20_000)
    plan = make_plan(inputs)
    assume(plan.feasible and not plan.k and plan.k_max)
    resident, size = plan.candidates[0], inputs.memory.block_tokens
    lending = [c.k for c in plan.candidates if c.feasible and c.kv_tokens > resident.kv_tokens]
    lending = [k for k in lending if k > inputs.slots]
    if plan.mirrors:
        assert plan.mirrors == max(lending)
        return
    longest = min(inputs.max_context, resident.kv_tokens + size) // size
    tokens = data.draw(st.integers(inputs.output_tokens // size + 1, longest)) * size
    sized = replace(inputs, prompt_tokens=tokens - inputs.output_tokens)
    without = evaluate(sized, 0).requests_per_s
    assert all(evaluate(sized, k).requests_per_s <= without * (1 + WORTH) for k in lending)


@planning
@given(situations(even=False), st.floats(1, 3))
def test_more_memory_never_hurts(inputs, more):
    plan = make_plan(inputs)
    richer = make_plan(
        replace(
            inputs,
            device_bytes=int(inputs.device_bytes * more),
            host_bytes=int(inputs.host_bytes * more),
        )
    )
    assert not plan.feasible or richer.feasible
    fits = [c.k for c in plan.candidates if c.fits_device]
    assert set(fits) <= {c.k for c in richer.candidates if c.fits_device}


@planning
@given(situations())
def test_of_equal_goodput_the_fewest_units_are_streamed(inputs):
    plan = make_plan(inputs)
    assume(plan.feasible)
    wanted = inputs.rate_per_s or float("inf")
    chosen = min(plan.candidates[plan.k].requests_per_s, wanted)
    fewer = [c for c in plan.candidates[: plan.k] if c.feasible and not 0 < c.k <= inputs.slots]
    assert all(c.requests_per_s < chosen * (1 - (0.04 if c.k == 0 else 1e-7)) for c in fewer)


def test_a_record_that_finds_resident_slower_does_not_start_streaming():
    """Nothing streamed may run in either thread mode, so noise cannot make offloading pay."""
    slow = replace(RESIDENT, outside_s=40 * MS)
    plan = make_plan(demo(device_mib=512, latency=LatencyModel(30, 1 * MS, STREAMING, slow)))
    assert plan.k == 0


@planning
@given(situations(), st.floats(0.1, 10))
def test_a_rate_to_serve_never_asks_for_more_streaming_than_the_most(inputs, rate_per_s):
    most = make_plan(replace(inputs, rate_per_s=None))
    assume(most.feasible)
    plan = make_plan(replace(inputs, rate_per_s=rate_per_s))
    assert plan.k <= most.k
    served = [p.candidates[p.k].requests_per_s for p in (plan, most)]
    # Not to offload at all is worth a few per cent of the rate.
    assert served[0] >= min(rate_per_s, served[1]) * (1 - (1e-5 if plan.k else 0.05))


@planning
@given(situations(even=False))
def test_the_mend_in_the_message_mends(inputs):
    plan = make_plan(inputs)
    if plan.reason is Reason.DEVICE_TOO_SMALL:
        needed = parse_bytes(re.search(r"needs (\S+ \w+) of device", plan.message)[1])
        mended = replace(inputs, device_bytes=needed)
    elif plan.reason is Reason.HOST_TOO_SMALL:
        needed = parse_bytes(re.search(r"takes (\S+ \w+) of host", plan.message)[1])
        mended = replace(inputs, host_bytes=needed)
    elif plan.reason is not None:
        tpot, ttft = (
            re.search(rf"a {name} of (\S+ m?s)", plan.message) for name in ("tpot", "ttft")
        )
        mended = replace(
            inputs,
            slo=SLO(
                parse_seconds(tpot[1]) if tpot else inputs.slo.tpot_s,
                parse_seconds(ttft[1]) if ttft else inputs.slo.ttft_s,
            ),
        )
    else:
        return
    assert make_plan(mended).reason is not plan.reason
    if plan.reason is Reason.INTERVAL_RANGE_EMPTY:
        needed = parse_bytes(re.search(r"give (\S+ \w+) of device_memory", plan.message)[1])
        assert make_plan(replace(inputs, device_bytes=needed)).feasible
