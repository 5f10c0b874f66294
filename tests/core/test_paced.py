"""Paced compute: a record's times without its weights, on real streaming, blocks and memory."""

import threading
import time
from contextlib import aclosing, contextmanager
from dataclasses import replace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import UNIT_BYTES, mode, paced_config, record
from running import Heard
from virtual import VirtualClock, VirtualLink

from select_n_core.decisions.law import iteration_s
from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.decisions.plan import make_plan
from select_n_core.engine import build
from select_n_core.engine.build import build_engine
from select_n_core.engine.client import ProcessClient
from select_n_core.engine.messages import FinishReason, Request, SamplingParams
from select_n_core.engine.planning import plan_inputs
from select_n_core.errors import ConfigError, EngineError, InputError, StreamingError
from select_n_core.links.board import Member
from select_n_core.links.paced import SAMPLE_BYTES, PacedLink, Timeline
from select_n_core.links.pacer import Pacer
from select_n_core.models.paced import VOCAB_SIZE, paced_model
from select_n_core.offload.paced import PacedExecutor, step_shape
from select_n_core.offload.placement import Placement, StepRow
from select_n_core.record import ColdSample

torch.set_num_threads(1)

BLOCK_TOKENS = 16
ONE_ROW = [StepRow(blocks=[0], context=7, tokens=[3])]


class OnVirtualTime:
    """A paced executor whose clock only sleepers move."""

    def __init__(self, made, k: int, slots: int, late_s: float = 0.0, **placed) -> None:
        self.clock = VirtualClock(late_s=late_s)
        self.timeline = Timeline(self.clock, self.clock.sleep)
        self.link = VirtualLink(self.clock, self.timeline, made.link_bytes_per_s)
        memory = made.memory(BLOCK_TOKENS)
        placement = Placement(
            arena_bytes=arena_bytes_for(memory, placed.get("k_min", k), slots, 4) + 256,
            k=k,
            slots=slots,
            block_tokens=BLOCK_TOKENS,
            threads=1,
            **placed,
        )
        model = paced_model(made, slots, self.timeline)
        self.executor = PacedExecutor(model, placement, self.link, self.timeline)

    def step_s(self, rows=ONE_ROW) -> float:
        begun_s = self.clock()
        self.executor.step(rows)
        return self.clock() - begun_s

    def steady_s(self, warm_up: int = 80, over: int = 16, rows=ONE_ROW) -> float:
        for _ in range(warm_up):
            self.executor.step(rows)
        begun_s = self.clock()
        for _ in range(over):
            self.executor.step(rows)
        return (self.clock() - begun_s) / over


@contextmanager
def on_virtual_time(made, k: int, slots: int = 2, **rest):
    built = OnVirtualTime(made, k, slots, **rest)
    try:
        yield built
    finally:
        built.executor.close()


def milliseconds(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most).map(lambda value: round(value, 3) * 1e-3)


class TestTimes:
    @settings(max_examples=80, deadline=None)
    @given(
        units=st.integers(1, 12),
        share=st.floats(0, 1),
        slots=st.integers(1, 4),
        unit_s=milliseconds(0.1, 3),
        outside_s=milliseconds(0, 10),
        transfer_s=milliseconds(0.1, 9),
    )
    def test_an_iteration_takes_what_the_law_says(
        self, units, share, slots, unit_s, outside_s, transfer_s
    ):
        k = round(share * units)
        made = record(units, unit_s, outside_s, transfer_s)
        expected_s = iteration_s(units, k, slots, unit_s, outside_s, transfer_s)
        with on_virtual_time(made, k, slots) as paced:
            assert paced.steady_s() == pytest.approx(expected_s, rel=0.01)

    @settings(max_examples=40, deadline=None)
    @given(
        k=st.integers(0, 8),
        slots=st.integers(1, 3),
        transfer_s=milliseconds(0.1, 6),
        contexts=st.lists(st.integers(1, 400), min_size=1, max_size=4),
        chunk=st.integers(0, 64),
    )
    def test_an_iteration_takes_what_the_latency_model_predicts(
        self, k, slots, transfer_s, contexts, chunk
    ):
        cold = ColdSample(
            streamed_extra_s=2e-4, stalled_extra_s=4e-4, stall_s=3e-3, copy_slowdown=0.2
        )
        streaming = mode(
            0,
            2e-3,
            cold,
            grid=((1, 1e-3), (8, 1.2e-3), (64, 4e-3)),
            per_context_token_s=2e-6,
            per_pair_s=1e-7,
            outside_per_row_s=1e-4,
        )
        made = record(8, transfer_s=transfer_s, streaming=streaming, resident=mode(1.1e-3, 1e-3))
        rows = [StepRow(blocks=[0], context=context, tokens=[1]) for context in contexts]
        if chunk > 1:
            rows.append(StepRow(blocks=[0], context=0, tokens=[1] * chunk, logits=False))
        expected_s = made.latency_model().iteration_s(step_shape(rows), k, slots)
        with on_virtual_time(made, k, slots) as paced:
            assert paced.steady_s(rows=rows) == pytest.approx(expected_s, rel=0.01)

    def test_waking_up_late_does_not_add_up(self):
        made = record(6, unit_s=1e-3, outside_s=1e-3, transfer_s=3e-3)
        with on_virtual_time(made, k=3) as punctual, on_virtual_time(made, 3, late_s=2e-3) as late:
            assert late.steady_s(over=100) == pytest.approx(punctual.steady_s(over=100), rel=0.01)

    def test_a_pause_between_two_steps_is_owed_to_nobody(self):
        with on_virtual_time(record(6, 1e-3, 1e-3), k=0, late_s=5e-3) as paced:
            paced.step_s()
            paced.clock.now_s += 60.0
            assert paced.step_s() == pytest.approx(7e-3 + 5e-3)

    def test_a_wait_for_a_copy_moves_what_comes_after_it_and_is_a_stall(self):
        made = record(6, unit_s=1e-3, outside_s=2e-3, transfer_s=5e-3)
        with on_virtual_time(made, k=6) as paced:
            took_s = paced.steady_s()
            stalled_s = paced.link.counters.stall_s
            paced.step_s()
            stalled_s = paced.link.counters.stall_s - stalled_s
        assert took_s == pytest.approx(30e-3)  # six copies back to back
        assert stalled_s == pytest.approx(30e-3 - 8e-3)

    def test_at_k_0_the_faster_mode_runs(self):
        made = record(6, 2e-3, 1e-3, resident=mode(1e-3, 1e-3))
        with on_virtual_time(made, k=0) as paced:
            assert paced.step_s() == pytest.approx(7e-3)

    def test_k_turns_and_the_law_follows(self):
        made = record(8, unit_s=1e-3, outside_s=1e-3, transfer_s=4e-3)
        with on_virtual_time(made, k=6, k_min=2, k_max=8, mirrors=8) as paced:
            for k in (6, 8, 3, 2, 5):
                paced.executor.turn(k)
                expected_s = iteration_s(8, k, 2, 1e-3, 1e-3, 4e-3)
                assert paced.steady_s() == pytest.approx(expected_s, rel=0.01)
                assert paced.executor.streamed == tuple(paced.executor.streamed)
                assert len(paced.executor.streamed) == k

    def test_a_step_that_fails_ends_and_the_next_one_is_whole(self):
        with on_virtual_time(record(6, 1e-3, 1e-3, 2e-3), k=3) as paced:
            whole_s = paced.steady_s()
            broken = paced.executor.mirrors[paced.executor.streamed[-1]]
            tag = broken[:8].clone()
            broken[0] ^= 1
            with pytest.raises(StreamingError, match="computes with the bytes of unit"):
                paced.steady_s(over=3)
            broken[:8] = tag
            assert not paced.timeline.running
            assert paced.steady_s() == pytest.approx(whole_s, rel=0.01)


class TestTimeline:
    def test_outside_a_step_it_is_the_clock(self):
        clock = VirtualClock()
        timeline = Timeline(clock, clock.sleep)
        assert timeline.now_s() == clock.now_s
        clock.now_s += 1.0
        assert timeline.now_s() == clock.now_s

    def test_within_a_step_it_runs_ahead_of_the_clock_until_the_end(self):
        clock = VirtualClock(0.0)
        timeline = Timeline(clock, clock.sleep)
        with timeline.step():
            timeline.compute(2.0)
            assert (timeline.now_s(), clock()) == (2.0, 0.0)
            assert timeline.reach(5.0) == 3.0
            assert timeline.reach(4.0) == 0.0
            assert timeline.take_wait() == 3.0
            assert timeline.take_wait() is None
        assert clock() == 5.0


class TestLink:
    """The real link, its worker and its bus, beside paced compute."""

    NBYTES = 1 << 20
    RATE = 1e8

    @pytest.fixture(params=["alone", "on a bus"])
    def link(self, request, tmp_path):
        shared = request.param == "on a bus"
        bus = Pacer("paced", self.RATE, directory=tmp_path) if shared else None
        link = PacedLink(Timeline(), self.RATE, pacer=bus)
        yield link
        link.close()

    @pytest.fixture
    def ends(self, link):
        host = torch.ones(self.NBYTES, dtype=torch.uint8)
        link.register(host)
        return torch.zeros(self.NBYTES, dtype=torch.uint8), host

    def test_a_copy_starts_when_compute_has_come_to_where_it_was_issued(self, link, ends):
        timeline = link.timeline
        with timeline.step():
            begun_s = timeline.now_s()
            timeline.compute(0.01)
            copy = link.copy(*ends, kind="weights")
            timeline.compute(0.002)
            link.wait(copy)
            ended_s = timeline.now_s()
        copy_s = self.NBYTES / self.RATE
        assert copy.started_s == pytest.approx(begun_s + 0.01, abs=1e-6)
        assert copy.duration_s() == pytest.approx(copy_s)
        assert ended_s == pytest.approx(begun_s + 0.01 + copy_s, abs=1e-6)
        assert link.counters.stall_s == pytest.approx(copy_s - 0.002)

    def test_a_copy_that_compute_does_not_wait_for_is_no_stall(self, link, ends):
        with link.timeline.step():
            copy = link.copy(*ends, kind="weights")
            link.timeline.compute(0.05)
            link.wait(copy)
        assert link.counters.stall_s == 0.0

    def test_an_event_happens_when_compute_gets_there(self, link):
        with link.timeline.step():
            link.timeline.compute(30.0)
            event = link.compute_event()
            assert not event.done()
            link.timeline.compute(-30.0)
        assert link.compute_event().done()

    def test_only_samples_move_and_all_is_counted(self, link, ends):
        target, source = ends
        link.wait(link.copy(target, source, kind="weights"))
        assert target[:SAMPLE_BYTES].all()
        assert not target[SAMPLE_BYTES:].any()
        assert link.counters.bytes.total() == self.NBYTES
        other = torch.zeros_like(target)
        link.move(other, source)
        assert other.sum() == SAMPLE_BYTES


def far(tmp_path, made=None, **changes):
    return paced_config(tmp_path / "record.json", made or record(), **changes)


@contextmanager
def serving(config):
    engine, info = build_engine(config)
    try:
        yield engine, info
    finally:
        engine.close()


def request(name: str, tokens: int = 8, length: int = 40, **rules) -> Request:
    prompt = (sum(map(ord, name)), *range(length - 1))  # no two begin alike
    return Request(name, prompt, SamplingParams(max_tokens=tokens, **rules))


class TestEngine:
    def test_memory_blocks_and_link_bytes_are_the_records(self, tmp_path):
        made = record()
        config = far(tmp_path, made, host_kv="64KiB")
        plan = make_plan(plan_inputs(config, made))
        with serving(config) as (engine, info):
            heard = Heard(engine)
            for name in "abc":
                engine.submit(request(name))
            heard.run()
            stats = engine.stats()
        assert 0 < info.k == plan.k
        assert info.kv_tokens == plan.kv_tokens == stats.kv_tokens
        assert info.device_bytes == config.device_memory
        assert info.host_bytes == plan.mirrors * UNIT_BYTES + config.host_kv
        assert stats.link_bytes_by["h2d", "weights"] % UNIT_BYTES == 0
        assert stats.streamed_units == stats.iterations * plan.k
        assert [heard.finish(name) for name in "abc"] == [FinishReason.LENGTH] * 3
        assert all(len(heard.tokens(name)) == 8 for name in "abc")

    @pytest.mark.parametrize("caches", [True, False])
    def test_a_prefix_is_computed_once_unless_the_configuration_says_no(self, tmp_path, caches):
        with serving(far(tmp_path, prefix_caching=caches)) as (engine, _):
            heard = Heard(engine)
            for name in "ab":
                engine.submit(replace(request("a"), id=name))
                heard.run()
            stats = engine.stats()
        assert stats.prefix_hit_tokens == (32 if caches else 0)
        assert heard.outputs["b"][0].cached_tokens == stats.prefix_hit_tokens
        assert (stats.kv_cached_tokens > 0) == caches

    def test_everybody_is_told_that_it_is_paced(self, tmp_path):
        with serving(far(tmp_path)) as (_, info):
            assert info.compute_kind == "paced"
            assert "compute is paced by a record of a device far away" in info.plan_line

    def test_any_token_of_any_vocabulary_may_be_in_a_prompt(self, tmp_path):
        with serving(far(tmp_path)) as (engine, _):
            heard = Heard(engine)
            engine.submit(Request("a", (VOCAB_SIZE, 200_000), SamplingParams(max_tokens=2)))
            heard.run()
        assert heard.finish("a") is FinishReason.LENGTH

    def test_a_hot_request_runs_to_its_end_too(self, tmp_path):
        with serving(far(tmp_path)) as (engine, _):
            heard = Heard(engine)
            engine.submit(request("a", tokens=5, temperature=2.0, top_p=0.9, seed=1))
            heard.run()
        assert len(heard.tokens("a")) == 5

    def test_requests_survive_turns_preemptions_and_leases(self, tmp_path):
        made = record()
        config = far(tmp_path, made, device_memory="576KiB", host_kv="64KiB")
        with serving(config) as (engine, _):
            heard, executor = Heard(engine), engine.executor
            names = [f"r{number}" for number in range(8)]
            for name in names:
                engine.submit(request(name, tokens=100, length=60))
            for _ in range(5):
                heard.step()
            assert len(engine.scheduler.running) > 1
            most = min(executor.m, executor.cap)
            assert most > executor.layout.k_min
            engine.turn(most)
            heard.step()
            engine.turn(executor.layout.k_min)
            heard.step()
            assert engine.executor.k == executor.layout.k_min
            floor = executor.memory.mirrored_bytes(executor.layout.k_min)
            engine.lease.revoke("back", executor.lease_bytes - floor, 30.0)
            answers = [answer for _ in range(20) for answer in _stepped(heard).leases]
            assert [(answer.id, answer.error) for answer in answers] == [("back", None)]
            assert executor.host_bytes == floor
            engine.lease.offer("more", 2 * UNIT_BYTES)
            heard.run(5000)
            stats = engine.stats()
            assert executor.blocks.free_blocks == executor.blocks.blocks
        assert stats.swaps + stats.recomputes > 0
        assert all(len(heard.tokens(name)) == 100 for name in names)

    def test_an_arena_of_gigabytes_takes_none(self, tmp_path):
        gib = 1 << 30
        made = record(16, unit_bytes=64 << 20, transfer_s=1e-4, kv_bytes_per_token=1 << 16)
        config = far(
            tmp_path,
            made,
            device_memory=gib,
            host_memory=2 * gib,
            host_kv=gib // 2,
            slots=3,
        )
        before = psutil.Process().memory_info().rss
        with serving(config) as (engine, info):
            heard = Heard(engine)
            for name in "abcd":
                engine.submit(request(name, tokens=20, length=200))
            for _ in range(6):
                heard.step()
            engine.turn(min(engine.executor.m, engine.executor.cap))
            heard.step()
            engine.turn(engine.executor.layout.k_min)
            heard.run()
            grown = psutil.Process().memory_info().rss - before
        assert info.host_bytes > gib // 2
        assert grown < 64 << 20

    def test_from_k_0_to_more_and_back_with_its_kv_full_it_preempts_nobody(self, tmp_path):
        workload = {"prompt_tokens": 64, "output_tokens": 32, "rate": 1.0}
        config = far(tmp_path, device_memory="704KiB", workload=workload)
        with serving(config) as (engine, info):
            heard, executor = Heard(engine), engine.executor
            assert (info.k, executor.layout.k_min) == (0, 0)
            most = min(executor.m, executor.cap)
            names = [f"r{number}" for number in range(4)]
            for name in names:
                engine.submit(request(name, tokens=200, length=60))
            for k in (most, 0, most, 0):
                for _ in range(10):
                    heard.step()
                assert len(engine.scheduler.running) > 1
                ring = executor.layout.lattice_blocks - executor.layout.ring_id
                owned = executor.blocks.blocks - executor.blocks.free_blocks
                free = len(executor.layout.kv_ids(0)) - ring  # neither in a home nor in the ring
                assert owned > free
                engine.turn(k)
                assert executor.blocks.ids == executor.layout.kv_ids(k)
                assert engine.stats().recomputes == engine.stats().swaps == 0
            heard.run(5000)
        assert all(len(heard.tokens(name)) == 200 for name in names)


class TestFailedBuild:
    """What was taken before it failed."""

    @pytest.mark.parametrize("failing", ["_placed", "HostBlocks", "Scheduler", "Engine", "_info"])
    def test_it_leaves_no_seat_on_the_bus_no_thread_and_no_mirror(
        self, tmp_path, monkeypatch, failing
    ):
        made = record()
        link = {"kind": "emulated", "bandwidth": made.link_bytes_per_s, "bus": {"name": "failed"}}
        config = far(tmp_path, made, link=link)

        def fails(*_: object, **__: object) -> None:
            raise EngineError("no further")

        monkeypatch.setattr(build, failing, fails)
        with Member("failed", made.link_bytes_per_s) as first:
            threads = set(threading.enumerate())
            files = psutil.Process().num_fds()  # mirrors and seats hold some
            with pytest.raises(EngineError, match="no further"):
                build_engine(config)
            assert first.members == 1
            assert set(threading.enumerate()) == threads
            assert psutil.Process().num_fds() == files


def _stepped(heard: Heard):
    report = heard.engine.step()
    heard.hear(report)
    return report


class TestBadRecords:
    def test_a_missing_one_is_named(self, tmp_path):
        config = far(tmp_path)
        (tmp_path / "record.json").unlink()
        with pytest.raises(ConfigError, match=r"^compute\.record: cannot read .*record\.json"):
            build_engine(config)

    @pytest.mark.parametrize("broken", ["", "{}", "[1]", "not json"])
    def test_a_broken_one_is_named(self, tmp_path, broken):
        config = far(tmp_path)
        (tmp_path / "record.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"^compute\.record: .* is not a performance record"):
            build_engine(config)

    def test_one_whose_time_is_no_time_names_the_field(self, tmp_path):
        config = far(tmp_path)
        path = tmp_path / "record.json"
        path.write_text(path.read_text().replace('"outside_s": 0.0001', '"outside_s": -1'))
        with pytest.raises(ConfigError, match=r"streaming\.outside_s"):
            build_engine(config)

    def test_one_of_other_weights_says_what_to_write(self, tmp_path):
        with pytest.raises(ConfigError, match="write dtype: bfloat16 instead of float32"):
            build_engine(far(tmp_path, dtype="float32"))
        with pytest.raises(ConfigError, match="write units: layer instead of half"):
            build_engine(far(tmp_path, units="half"))

    def test_one_of_no_layout_names_the_sizes(self, tmp_path):
        with pytest.raises(InputError, match="unit_bytes of the record must be multiples of 256"):
            build_engine(far(tmp_path, record(unit_bytes=UNIT_BYTES + 8)))


class TestProcess:
    async def test_an_engine_in_a_process_of_its_own_serves_at_the_records_pace(self, tmp_path):
        made = record(10, unit_s=1e-3, outside_s=2e-3, transfer_s=3e-3)
        client = ProcessClient(far(tmp_path, made, device_memory="768KiB"))
        times_s = []
        try:
            info = await client.start()
            async with aclosing(client.generate(request("a", tokens=40))) as answer:
                async for output in answer:
                    times_s += [time.perf_counter()] * len(output.tokens)
        finally:
            await client.close()
        expected_s = iteration_s(10, info.k, 2, 1e-3, 2e-3, 3e-3)
        assert info.k > 0
        assert output.finish is FinishReason.LENGTH
        assert len(times_s) == 40
        # Slower it may be, on a machine that is busy with something else.
        assert times_s[-1] - times_s[4] > 0.95 * 35 * expected_s
