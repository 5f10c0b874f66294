"""The cluster benchmark without a cluster: its load over HTTP, its arithmetic, what it keeps."""

import asyncio
import json
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from reports import report
from standins import HANG, MODEL

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import (
    cluster,
    cluster_admission,
    cluster_budget,
    cluster_faults,
    cluster_feedback,
    cluster_tenants,
)
from benchmarks.cluster_load import Load, Outcome, Seen, Source
from benchmarks.cluster_nodes import deployment_of
from benchmarks.cluster_score import (
    Point,
    by_second,
    follows_s,
    mean_curve,
    quantile,
    score,
    spread,
    window_shares,
)
from benchmarks.cluster_serve import document, scaled
from benchmarks.cluster_stand import Stand, best, capacities
from benchmarks.cluster_store import Store
from benchmarks.cluster_watch import Look, Mapped, Watched, admitted_between, most_mapped
from benchmarks.slo_load import Arrival, Phase, Schedule
from deployments import ray_compat
from select_n_core.config import parse_config
from select_n_core.errors import EngineError, OverloadedError
from select_n_core.record import load_record


def a_source(
    name: str = "acme", *arrivals: Arrival, seconds: float = 0.5, weight: float = 1.0
) -> Source:
    schedule = Schedule(0, 1.0, seconds, (Phase("only"),), arrivals)
    return Source(name, MODEL, schedule, ttft_s=2.0, tpot_s=0.1, weight=weight)


def at(*times_s: float, output_tokens: int = 3) -> list[Arrival]:
    return [Arrival(at_s, 0, 0, 4, output_tokens) for at_s in times_s]


async def seen_of(url: str, source: Source) -> Seen:
    return await Load([source], time.perf_counter(), url).run()


# The load


async def test_every_token_is_timed_and_counted(says):
    client = says("abcdef")
    seen = await seen_of(client.url, a_source("acme", *at(0.0, 0.05)))
    assert len(seen.outcomes) == 2
    for outcome in seen.outcomes:
        assert (outcome.ended, outcome.tokens, outcome.admitted) == ("length", 3, True)
        assert outcome.ttft_s >= 0
        assert outcome.tpot_s >= 0
    assert sum(seen.tokens.values()) == 6
    first, second = (request.prompt for request in client.engine.requests)
    assert len(first) == len(second) == 4
    assert first[0] != second[0]  # what one computed of its prompt is of no use to the other


async def test_a_refusal_an_error_and_a_cut_are_told_apart(says):
    refusal = OverloadedError("too many", reason="kv", retry_after_s=1.0)
    seen = await seen_of(says("a", refusal=refusal).url, a_source("acme", *at(0.0)))
    [refused] = seen.outcomes
    assert (refused.admitted, refused.ended, refused.tokens) == (False, "overloaded_kv", 0)
    assert refused.ttft_s is None
    broken = says("ab", EngineError("it fell over"))
    seen = await seen_of(broken.url, a_source("acme", *at(0.0, output_tokens=9)))
    [failed] = seen.outcomes
    assert (failed.admitted, failed.ended, failed.tokens) == (True, "engine_error", 2)
    assert failed.tpot_s is None
    async with hanging_up() as url:
        seen = await seen_of(url, a_source("acme", *at(0.0)))
    [cut] = seen.outcomes
    assert (cut.admitted, cut.ended) == (True, "cut")


@asynccontextmanager
async def hanging_up():
    """A server that begins to answer and closes the connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\ndata: ")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_who_waits_for_a_first_token_is_seen_to_wait(says):
    client = says(HANG, stream_timeout="1s")
    seen = await seen_of(client.url, a_source("acme", *at(0.0), seconds=2.0))
    waited = [waiting.get("acme", 0) for _, waiting in seen.waiting]
    assert waited[1] == 1
    assert waited[-1] == 0
    assert seen.outcomes[0].ended == "stream_timeout"


# What is made of it


def outcome(source: str = "acme", **facts: object) -> Outcome:
    good = Outcome(source, 0, 1.0, True, "length", 0.5, 0.05, 10, 2.0)
    return good._replace(**facts)


def test_a_score_holds_admitted_requests_to_their_targets_and_counts_all_that_were_offered():
    outcomes = [
        outcome(),
        outcome(ttft_s=3.0),
        outcome(tpot_s=None, ended="unavailable"),
        outcome(admitted=False, ended="overloaded_kv", ttft_s=None, tpot_s=None),
        outcome(ended="cut", tpot_s=None),
        outcome("somebody else"),
    ]
    found = score([a_source("acme")], outcomes, 10.0, 50)
    assert (found.offered, found.admitted, found.unsaid) == (5, 4, 1)
    assert (found.ttft.met, found.ttft.of) == (3, 4)
    assert (found.tpot.met, found.tpot.of) == (2, 4)
    assert (found.good.met, found.good.of) == (1, 5)
    assert (found.goodput_per_s, found.tokens_per_s) == (0.1, 5.0)
    assert found.ended == {"unavailable": 1, "overloaded_kv": 1, "cut": 1}
    assert json.loads(json.dumps(found.document()))["good"]["share"] == 0.2
    assert found.document()["ended"] == found.ended


def test_shares_are_of_those_who_were_backlogged_all_through_a_window():
    sources = [a_source("acme", weight=3.0), a_source("bolt", weight=1.0), a_source("cora")]
    seen = Seen()
    for look in range(31):  # 15 s; cora asks for little, bolt for nothing in the last second
        waiting = {"acme": 5, "bolt": 4 if look < 29 else 0, "cora": 1}
        seen.waiting.append((look / 2, waiting))
    for bucket in range(150):
        seen.tokens["acme", bucket] = 3
        seen.tokens["bolt", bucket] = 1
        seen.tokens["cora", bucket] = 7
    found = window_shares(sources, seen)
    assert {each.begin_s for each in found} == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert {(each.source, each.share, each.fair) for each in found} == {
        ("acme", 0.75, 0.75),
        ("bolt", 0.25, 0.25),
    }
    assert {each.error for each in found} == {0.0}
    seen.tokens["bolt", 0] += 100  # as many as in a whole window
    [worst, *_] = sorted(window_shares(sources, seen), key=lambda each: -each.error)
    assert (worst.begin_s, worst.source, worst.share) == (0.0, "bolt", 0.4)
    assert worst.error == pytest.approx(0.6)


def test_what_follows_has_gone_nine_tenths_of_the_way():
    points = [Point(second, 100.0) for second in range(11)]
    points += [Point(11, 150.0), Point(12, 195.0), *(Point(each, 200.0) for each in range(13, 21))]
    assert follows_s(points, 10, 20) == 2
    assert follows_s(points, 13, 20) is None  # it did not move
    assert follows_s([], 10, 20) is None
    falling = [Point(at_s, 300.0 - value) for at_s, value in points]
    assert follows_s(falling, 10, 20) == 2


def test_what_held_at_each_second_is_the_last_that_was_seen():
    assert by_second([Point(0.5, 3.0), Point(1.0, 4.0), Point(1.9, 5.0)], 4.0) == [0, 4, 5, 5]


def test_quantiles_are_values_that_were_seen():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert quantile([], 0.5) is None
    assert spread([]) == {"count": 0, "p50": None, "p95": None, "max": None}


def test_a_curve_is_the_mean_over_all_moments_of_what_was_seen():
    found = mean_curve(
        [10.0, 20.0], lambda begin, end: begin if begin < 21 else None, [-1.0, 0.0, 1.0, 2.0]
    )
    assert found == [(0.0, 14.0), (1.0, 15.0), (2.0, 11.0)]


def test_a_share_has_fallen_when_half_of_the_way_is_done():
    curve = [(-1.0, 0.5), (0.0, 0.5), (0.5, None), (1.0, 0.45), (1.5, 0.3), (3.0, 0.1), (4.0, 0.3)]
    assert cluster_feedback.falls_s(curve) == 1.5
    assert cluster_feedback.falls_s([(at_s, 0.5) for at_s, _ in curve]) is None


def test_admissions_are_counted_between_two_moments():
    def look(at_s: float, replica: str, admitted: int) -> Look:
        return Look(at_s, replica, "alpha", "node", 1, 1, 1, admitted, 0, 0, 0.1)

    looks = [look(0.0, "a", 5), look(0.0, "b", 1), look(1.0, "a", 9), look(2.0, "b", 2)]
    assert admitted_between(looks, 0.0, 1.5) == {"a": 4, "b": 0}
    assert admitted_between(looks, 0.5, 2.0) == {"a": 4, "b": 1}


def test_the_most_that_was_mapped_is_of_one_node_at_one_look():
    mapped = [
        Mapped(0.0, "a", "model-alpha", 3),
        Mapped(0.0, "a", "model-beta", 4),
        Mapped(0.0, "b", "model-beta", 5),
        Mapped(1.0, "a", "model-beta", 6),
    ]
    assert most_mapped(mapped) == 7
    assert most_mapped([]) == 0
    assert [p.value for p in Watched(mapped=mapped).mapped_points("model-beta")] == [9, 6]


def test_a_machine_that_was_too_busy_makes_a_part_void():
    assert Watched(cpu=[0.9, 0.5]).void is None
    assert Watched(cpu=[0.9, 0.8]).void == "the machine was 85% busy"


# What is served


@pytest.fixture
def stand(tmp_path):
    return Stand(cluster.RECORD, tmp_path)


def test_a_scaled_record_serves_as_many_requests_in_as_much_more_time(stand):
    small, large = stand.model("one", 1, 256), stand.model("two", 4, 256)
    assert load_record(large.record_path) == large.record
    assert large.record.link_bytes_per_s == pytest.approx(small.record.link_bytes_per_s)
    for one, other in zip(capacities(small), capacities(large), strict=True):
        assert one == pytest.approx(4 * other, rel=0.02)
    assert best(small)[0] == best(large)[0]
    assert scaled(stand.record, 1).latency_model() == stand.record.latency_model()


def test_the_configuration_is_one_that_the_product_takes(stand):
    models = [stand.model(name, 2, 256, replicas=2) for name in ("alpha", "beta")]
    config = document(models, {"budgets": {"host_memory": 1 << 30}}, stream_timeout="3s")
    ray_compat.check_document(config)
    parsed = parse_config(config)
    assert [model.name for model in parsed.serve.models] == ["alpha", "beta"]
    assert parsed.live.budgets.host_memory == 1 << 30
    assert parsed.serve.stream_timeout == 3.0
    assert parse_config(document(models)).live is None
    one, other = (model.record.fingerprint.model_hash for model in models)
    assert one != other  # else they were one model, whose mirrors are shared


def test_a_replicas_title_tells_its_deployment():
    assert deployment_of("ray::ServeReplica:serve:model-alpha") == "model-alpha"
    assert deployment_of("ray::ServeReplica:serve:model-alpha.generate()") == "model-alpha"
    assert deployment_of("ray::ProxyActor") == ""


# What is kept


def test_a_part_is_measured_once_for_its_setup_and_again_where_it_was_void(tmp_path):
    store = Store(tmp_path)
    asked: list[str | None] = []

    def measure(void: str | None = None) -> dict:
        asked.append(void)
        return {"figure": len(asked), "void": void}

    assert store.part("a", {"seed": 0}, measure)["figure"] == 1
    assert store.part("a", {"seed": 0}, measure)["figure"] == 1
    assert store.part("a", {"seed": 1}, lambda: measure("busy"))["figure"] == 2
    again = Store(tmp_path, again=True)
    assert again.part("a", {"seed": 1}, measure)["void"] == "busy"
    assert again.part("a", {"seed": 2}, measure) is None
    assert Store(tmp_path).part("a", {"seed": 1}, measure)["figure"] == 3


def test_nothing_is_published_of_sections_that_were_never_measured(stand, tmp_path):
    again = Store(tmp_path / "parts", again=True)
    for section in (
        cluster_admission,
        cluster_budget,
        cluster_feedback,
        cluster_tenants,
        cluster_faults,
    ):
        assert section.measure(stand, again) is None


def test_every_decision_is_timed_over_sixteen_replicas(stand):
    model = stand.model("alpha", 1, 256)
    reports = [report(name, model=model.name, measured_at_s=5.0) for name in "ab"]
    took = cluster_admission.decisions(model, reports, cluster_admission.UNDER_WAY + 50)
    assert len(took) == 50
    assert min(each.core_s for each in took) > 0
