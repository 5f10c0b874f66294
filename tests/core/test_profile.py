"""The offline stage on a tiny model: a record that predicts, is kept, and is made again if bad."""

import itertools
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny_llama

from select_n_core.config import LinkConfig, ModelConfig
from select_n_core.decisions.latency import StepShape
from select_n_core.decisions.layout import ModelMemory
from select_n_core.engine import planning
from select_n_core.engine.planning import prepare, record_for, record_path
from select_n_core.errors import DeviceMemoryError, HostMemoryError, InfeasibleError, InputError
from select_n_core.links.open import open_link
from select_n_core.models.cache import CACHE_VARIABLE
from select_n_core.models.load import load_model, take_apart
from select_n_core.offload.placement import model_memory
from select_n_core.profiling import rig
from select_n_core.profiling.clock import DeviceClock
from select_n_core.profiling.fingerprint import fingerprint
from select_n_core.profiling.grid import (
    fitted_shapes,
    held_out_shapes,
    streamed_ks,
    streamed_shapes,
)
from select_n_core.profiling.heldout import goal, p95, split_half_noise
from select_n_core.profiling.measure import Effort, measure_record
from select_n_core.profiling.passes import Pass, Shape, middle, run_passes
from select_n_core.profiling.rig import Case, find_room, placed
from select_n_core.profiling.sweeps import Sweep, run_sweeps, undisturbed
from select_n_core.record import load_record

torch.set_num_threads(1)

LINK = LinkConfig(kind="emulated", bandwidth="400MB/s", latency="1ms")
BRIEF = Effort(
    sweeps=2, repeats=3, batches=(1, 4), contexts=(16, 64), chunks=(8, 32), held_out=True
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def here(directory):
    return fingerprint("tiny", directory, "float32", LINK)


@pytest.fixture(scope="module")
def measured(directory, here):
    """(record, what was reported on the way)."""
    reports: list[tuple[str, float]] = []
    record = measure_record(
        load_model(directory, "float32"),
        here,
        LINK,
        BRIEF,
        lambda what, share: reports.append((what, share)),
    )
    return record, reports


@pytest.fixture
def record(measured):
    return measured[0]


class TestMeasuring:
    def test_sizes_are_the_models(self, record, directory):
        memory = model_memory(load_model(directory, "float32"), 32)
        assert record.memory(32) == memory
        assert record.unit_bytes == (147_968,) * 6
        assert record.max_context == 512

    def test_a_copy_takes_what_the_link_was_configured_to(self, record):
        paced_s = 1e-3 + 147_968 / 400e6
        assert record.transfer_s >= paced_s * (1 - 1e-6)
        directions = [sample.direction for sample in record.transfers]
        assert directions == ["h2d", "d2h"]
        for sample in record.transfers:
            assert len(sample.seconds) == 6
            assert min(sample.seconds) >= paced_s * (1 - 1e-6)
            assert min(sample.beside_compute_s) >= paced_s * (1 - 1e-6)

    def test_every_shape_was_measured_streaming_and_resident(self, record):
        for mode in (record.streaming, record.resident):
            shapes = {(s.decode_rows, s.context_tokens, s.prefill_tokens) for s in mode.samples}
            assert {(1, 16, 0), (1, 65, 0), (4, 64, 0), (4, 256, 0)} <= shapes
            assert {(0, 0, 8), (0, 0, 32)} <= shapes
            assert {(4, 256, 32), (4, 64, 32)} <= shapes
            assert [tokens for tokens, _ in mode.token_grid] == [1, 4, 32]
        assert record.streaming.threads == 1
        assert record.streaming.cold is not None
        assert record.resident.cold is None

    def test_steps_of_the_grid_were_measured_with_units_streamed(self, record):
        fitted = {sample.shape() for sample in record.streaming.samples}
        assert {sample.shape() for sample in record.streamed} <= fitted
        assert len({sample.k for sample in record.streamed}) > 1
        assert min(sample.k for sample in record.streamed) > 0
        for sample in record.streamed:
            assert len(sample.seconds) % 3 == 0

    def test_the_latency_model_predicts_times_that_grow_with_streaming(self, record):
        latency = record.latency_model()
        one = StepShape(decode_rows=1, context_tokens=32)
        times_s = [latency.iteration_s(one, k, 2) for k in range(1, 7)]
        assert times_s[0] > 0
        assert latency.iteration_s(one, 0, 2) > 0
        for fewer_s, more_s in pairwise(times_s):
            assert more_s > 0.95 * fewer_s  # where a unit lies may matter more than that it is one
        assert times_s[-1] >= 6 * record.transfer_s
        assert latency.iteration_s(StepShape().with_chunk(0, 64), 3, 2) > 0

    def test_held_out_steps_are_judged_by_the_model_of_the_record(self, record):
        latency = record.latency_model()
        fitted = {sample.shape() for sample in record.streaming.samples}
        kinds = {(bool(s.decode_rows), bool(s.prefill_tokens)) for s in record.held_out}
        assert kinds == {(True, False), (False, True), (True, True)}
        assert {0} < {sample.k for sample in record.held_out}
        for sample in record.held_out:
            assert sample.shape() not in fitted
            assert len(sample.seconds) % 3 == 0  # whole sweeps, as many as were undisturbed
            assert sample.predicted_s == latency.iteration_s(
                sample.shape(), sample.k, sample.slots, rows=sample.rows
            )
        assert record.held_out_p95 == p95([sample.error for sample in record.held_out])
        assert record.held_out_noise == p95([sample.noise for sample in record.held_out])

    def test_progress_runs_to_the_end(self, measured):
        shares = [share for _, share in measured[1]]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)

    def test_it_survives_its_file(self, record, tmp_path):
        record.save(tmp_path / "record.json")
        assert load_record(tmp_path / "record.json") == record

    def test_the_model_can_be_measured_again_afterwards(self, directory, here):
        model = load_model(directory, "float32")
        once = Effort(sweeps=1, repeats=1, batches=(1,), contexts=(16,), chunks=(8,))
        first, second = (measure_record(model, here, LINK, once) for _ in range(2))
        assert first.unit_bytes == second.unit_bytes

    def test_a_model_of_one_layer_can_be_measured(self, here):
        once = Effort(sweeps=1, repeats=1, batches=(1,), contexts=(16,), chunks=(8,))
        record = measure_record(take_apart(tiny_llama(layers=1)), here, LINK, once)
        assert record.latency_model().iteration_s(StepShape(1, 16), 1, 2) > 0

    def test_contexts_beyond_the_model_are_left_out(self, here):
        effort = Effort(sweeps=1, repeats=1, batches=(1,), contexts=(16, 600), chunks=(8, 700))
        record = measure_record(take_apart(tiny_llama()), here, LINK, effort)
        assert max(s.context_tokens for s in record.streaming.samples) == 16
        assert max(s.prefill_tokens for s in record.streaming.samples) == 8


def test_a_sweep_that_shared_the_machine_does_not_count():
    def sweep(wall_s: float) -> Sweep:
        return {Case(Shape(((16, 1),)), 0): [Pass(wall_s, 0, 0, 0, 0)] * 3}

    calm, slower, disturbed = sweep(0.100), sweep(0.107), sweep(0.150)
    assert undisturbed([slower, disturbed, calm]) == [slower, calm]
    assert undisturbed([]) == []


class TestSweeps:
    CASES = tuple(Case(Shape(((context, 1),)), 0) for context in range(1, 9))

    def swept(self, wall_s):
        """(order in which the cases were visited, passes, noise); `wall_s` of a visit's number."""
        visited: list[Case] = []

        def visit(case: Case) -> list[Pass]:
            visited.append(case)
            return [Pass(wall_s(len(visited) - 2), 0, 0, 0, 0)]

        passes, noise = run_sweeps(visit, self.CASES, 2, lambda what, done: None)
        return visited[1:], passes, noise

    def test_each_takes_all_cases_in_an_order_of_its_own(self):
        visited, passes, noise = self.swept(lambda number: 0.1)
        first, second = visited[:8], visited[8:]
        assert set(first) == set(second) == set(self.CASES)
        assert first != second
        assert noise == 0
        assert all(len(passes[case]) == 2 for case in self.CASES)

    def test_a_disturbed_one_is_made_again(self):
        visited, passes, _ = self.swept(lambda number: 0.2 if number < 8 else 0.1)
        assert len(visited) == 3 * 8
        assert {each.wall_s for case in self.CASES for each in passes[case]} == {0.1}

    def test_on_a_machine_that_is_never_at_rest_they_come_to_an_end(self):
        visited, passes, _ = self.swept(lambda number: 1 / (2 + number // 8))
        assert len(visited) == 5 * 8
        assert all(len(passes[case]) == 1 for case in self.CASES)


def test_the_middle_of_some_passes_leaves_the_fastest_and_the_slowest_out():
    passes = [Pass(wall_s, 0, 0, 0, 0) for wall_s in (9.0, 2.0, 3.0, 1.0)]
    assert [each.wall_s for each in middle(passes)] == [2.0, 3.0]
    assert middle(passes[:3]) == [passes[2]]
    assert middle(passes[:1]) == passes[:1]
    assert len(middle(passes * 5)) == 10


def test_a_brief_effort_covers_what_the_replica_will_run():
    effort = Effort.brief(max_batch=8, max_step_tokens=256)
    assert effort.batches == (1, 4, 8)
    assert effort.chunks == (32, 128, 256)
    assert not effort.held_out


class TestGrid:
    def test_no_size_of_a_held_out_shape_is_in_the_grid(self):
        effort = Effort.full()
        fitted = fitted_shapes(effort, 8192)
        batches = {len([1 for _, tokens in shape.rows if tokens == 1]) for shape in fitted}
        chunks = {tokens for shape in fitted for _, tokens in shape.rows if tokens > 1}
        for shape in held_out_shapes(effort, 8192):
            facts = shape.facts()
            assert facts.decode_rows == 0 or facts.decode_rows not in batches
            assert facts.prefill_tokens == 0 or facts.prefill_tokens not in chunks

    def test_it_is_decode_prompt_and_mixed_steps_alike(self):
        shapes = [shape.facts() for shape in held_out_shapes(Effort.full(), 8192)]
        kinds = [(bool(s.decode_rows), bool(s.prefill_tokens)) for s in shapes]
        assert kinds == [(True, False), (False, True), (True, True)] * 3

    def test_what_reaches_beyond_the_models_context_is_left_out(self):
        for shape in fitted_shapes(Effort.full(), 128) + held_out_shapes(Effort.full(), 128):
            assert all(context + tokens <= 128 for context, tokens in shape.rows)

    def test_a_grid_without_room_in_between_holds_nothing_out(self):
        assert held_out_shapes(Effort(batches=(1, 2), held_out=True), 8192) == []

    def test_over_the_turns_copies_hide_balance_and_bind(self):
        assert [streamed_ks(0.1, 0.01, 30, turn) for turn in range(3)] == [
            (5, 11),
            (11, 16),
            (5, 16),
        ]
        assert streamed_ks(0.1, 1.0, 30, 0) == (1,)
        assert streamed_ks(0.1, 1e-6, 30, 1) == (20, 30)

    def test_what_is_streamed_for_the_fit_is_of_the_grid_and_of_every_kind(self):
        for effort in (Effort.full(), Effort.brief(8, 256), BRIEF):
            shapes = streamed_shapes(effort, 8192)
            assert set(shapes) <= set(fitted_shapes(effort, 8192))
            facts = [shape.facts() for shape in shapes]
            kinds = {(bool(s.decode_rows), bool(s.prefill_tokens)) for s in facts}
            assert kinds == {(True, False), (False, True), (True, True)}


class TestNoise:
    def test_repeats_that_never_differ_have_none(self):
        assert split_half_noise([0.01] * 20) == 0

    def test_it_is_about_the_spread_of_a_median_of_half_of_them(self):
        draw = np.random.default_rng(3)
        noises = [split_half_noise(draw.normal(1, 0.02, 20)) for _ in range(50)]
        # Medians of 10 such values differ by 0.02 * 1.25 * sqrt(2 / 10), half of them by 2/3 of it.
        assert 0.004 < np.median(noises) < 0.012

    def test_one_slow_repeat_is_no_noise_of_the_median(self):
        assert split_half_noise([0.01] * 19 + [0.1]) == 0

    def test_the_goal_is_5_per_cent_until_the_noise_says_otherwise(self):
        assert goal(0.01) == 0.05
        assert goal(0.06) == pytest.approx(0.09)

    def test_p95_of_twenty_leaves_the_worst_out(self):
        assert p95([0.01] * 19 + [1.0]) == pytest.approx(0.01 + 0.05 * 0.99)
        assert p95([]) is None


class TestRoom:
    MEMORY = ModelMemory(1 << 20, (1 << 20,) * 8, 1 << 16, 32)

    @pytest.fixture
    def room(self, monkeypatch):
        def found(host_mib: float, device_mib: float, device: str = "cuda"):
            mib = 1 << 20
            free, given = int(host_mib * mib / 0.8), int(device_mib * mib / 0.8)
            monkeypatch.setattr(rig, "available_host_bytes", lambda: free)
            monkeypatch.setattr(rig, "available_device_bytes", lambda _: given)
            return find_room(self.MEMORY, torch.device(device), [Shape(((32, 1),))], slots=2)

        return found

    def test_a_device_that_holds_everything_can_be_measured_at_any_k(self, room):
        assert (room(64, 64).least, room(64, 64).most) == (0, 8)

    def test_a_device_that_is_too_small_streams_what_it_must(self, room):
        assert (room(64, 8).least, room(64, 8).most) == (4, 8)

    def test_host_memory_limits_what_can_be_streamed(self, room):
        assert room(3.5, 64).most == 3

    def test_on_a_cpu_arena_and_mirrors_share_the_memory(self, room):
        assert (room(12, 12, "cpu").least, room(12, 12, "cpu").most) == (6, 6)

    def test_too_little_of_either_is_said_so(self, room):
        with pytest.raises(HostMemoryError, match="needs 1 MiB of host memory for a unit"):
            room(0.5, 64)
        with pytest.raises(DeviceMemoryError, match="with 8 of 8 units streamed"):
            room(64, 2)


class TestDeviceClock:
    @pytest.fixture(autouse=True)
    def _events_a_millisecond_apart(self, monkeypatch):
        ticks = itertools.count()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at_ms = next(ticks)

            def elapsed_time(self, later: "Event") -> float:
                return float(later.at_ms - self.at_ms)

        self.capturing = False
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(
            torch.cuda, "is_current_stream_capturing", lambda: self.capturing, raising=False
        )

    @pytest.fixture
    def one_pass(self):
        model, shape = take_apart(tiny_llama(layers=4)), Shape(((16, 1),) * 2)
        link, device = open_link(LINK)
        with placed(model, link, device, [shape], slots=2) as rig:
            clock = DeviceClock(model)
            rig.executor.turn(2)
            yield lambda: run_passes(rig.executor, clock, shape, 1, warm_up=1)[0]
            clock.close()
        link.close()

    def test_units_are_timed_between_their_own_events(self, one_pass):
        found = one_pass()
        assert (found.home_s, found.streamed_s) == pytest.approx((1e-3, 1e-3))
        assert found.wait_s == pytest.approx(1e-3)

    def test_a_captured_step_tells_its_sum_alone(self, one_pass):
        self.capturing = True  # no unit leaves a mark
        found = one_pass()
        assert 4 * found.home_s == pytest.approx(found.wall_s)
        assert (found.wait_s, found.outside_s) == (0, 0)


class TestFingerprint:
    def test_it_is_the_same_twice(self, directory):
        assert fingerprint("a", directory, "float32", LINK) == fingerprint(
            "a", directory, "float32", LINK
        )

    def test_another_link_dtype_or_model_is_another_place(self, directory, tmp_path):
        here = fingerprint("a", directory, "float32", LINK)
        faster = LinkConfig(kind="emulated", bandwidth="1GB/s", latency="1ms")
        deeper = save_tiny(tmp_path / "deeper", layers=7)
        others = [
            fingerprint("a", directory, "bfloat16", LINK),
            fingerprint("a", directory, "float32", faster),
            fingerprint("a", deeper, "float32", LINK),
        ]
        assert all(other != here for other in others)
        assert len({record_path(place) for place in [here, *others]}) == 4


class TestKeeping:
    @pytest.fixture(autouse=True)
    def counted(self, tmp_path, monkeypatch, record):
        """A cache of its own, and how often something was measured."""
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        self.measured = 0

        def count(*_arguments):
            self.measured += 1
            return record

        monkeypatch.setattr(planning, "measure_record", count)

    @pytest.fixture
    def config(self, directory):
        def make(**changes) -> ModelConfig:
            facts = {
                "name": "tiny",
                "source": "tiny",
                "dtype": "float32",
                "device_memory": "2MiB",
                "host_memory": "2MiB",
                "link": LINK,
                "slo": {"tpot": "1s"},
                "workload": {"prompt_tokens": 32, "output_tokens": 32},
            }
            return ModelConfig(**{**facts, **changes})

        return make

    def test_an_unmeasured_model_is_measured_once(self, config, directory, record):
        first, loaded = record_for(config(), directory)
        assert (self.measured, first) == (1, record)
        assert loaded is not None
        second, not_loaded = record_for(config(), directory)
        assert (self.measured, second) == (1, record)
        assert not_loaded is None

    @pytest.mark.parametrize("content", ["", "{", "{}"])
    def test_a_spoilt_record_of_ours_is_measured_again(self, config, directory, here, content):
        path = record_path(here)
        path.write_text(content)
        record_for(config(), directory)
        assert self.measured == 1
        assert load_record(path)

    def test_another_link_is_measured_for_itself(self, config, directory):
        record_for(config(), directory)
        record_for(config(link={"kind": "emulated", "bandwidth": "2GB/s"}), directory)
        assert self.measured == 2

    def test_a_prepared_model_says_its_plan_in_one_line(self, config, directory):
        prepared = prepare(config(source=str(directory), interval=2))
        assert prepared.plan.k == 3
        assert re.fullmatch(
            r"tiny: requested interval 2\.0, tpot 1 s, device 2 MiB; pinned 433\.5 KiB of host "
            r"memory; N = 2 \(k = 3 of 6 layers streamed over the emulated link at \S+ GB/s\); "
            r"predicted TPOT \S+ m?s at \d+ requests, \d+ KV tokens \[forced_interval: .*\]",
            prepared.line(),
        )

    def test_off_is_zero_units_and_auto_is_the_planners_choice(self, config, directory):
        source = str(directory)
        off = prepare(config(source=source, interval="off"))
        assert (off.plan.k, off.plan.interval) == (0, None)
        assert "N = off (k = 0 of 6 layers" in off.line()
        # One request in ten seconds: even a slow resident pass serves that.
        workload = {"prompt_tokens": 32, "output_tokens": 32, "rate": 0.1}
        auto = prepare(config(source=source, workload=workload))
        assert auto.plan.k == 0
        assert auto.plan.note == "offload_not_needed"

    def test_an_infeasible_plan_names_model_reason_and_mend(self, config, directory):
        with pytest.raises(InfeasibleError, match=r"^model tiny: device_too_small: ") as caught:
            prepare(config(source=str(directory), device_memory="64KiB"))
        assert caught.value.reason == "device_too_small"

    def test_a_typical_request_beyond_the_models_context_is_refused(self, config, directory):
        workload = {"prompt_tokens": 500, "output_tokens": 100}
        with pytest.raises(InputError, match="is 600, the model's context is 512"):
            prepare(config(source=str(directory), workload=workload))
