"""Metrics over OpenTelemetry: what requests and replicas export, and when anything is exported."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from collector import collecting
from opentelemetry import metrics as api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric
from standins import MODEL, Client, ScriptedEngine, replica, serving

from deployments.telemetry import Telemetry, open_meter_provider
from select_n_core.errors import ConfigError, OverloadedError

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
CHAT = {
    "gen_ai.provider.name": "select_n",
    "gen_ai.request.model": MODEL,
    "gen_ai.operation.name": "chat",
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


class Exported:
    """A telemetry whose exports a test reads back."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.telemetry = Telemetry(MeterProvider([self._reader], shutdown_on_exit=False))

    def metrics(self) -> dict[str, Metric]:
        data = self._reader.get_metrics_data()
        [resource] = data.resource_metrics
        [scope] = resource.scope_metrics
        return {metric.name: metric for metric in scope.metrics}

    def values(self, name: str) -> list[tuple[dict, float]]:
        """A counter's or gauge's points: attributes and value."""
        points = self.metrics()[name].data.data_points
        return [(dict(point.attributes), point.value) for point in points]

    def observed(self, name: str) -> list[tuple[dict, int]]:
        """A histogram's points: attributes and how many observations."""
        points = self.metrics()[name].data.data_points
        return [(dict(point.attributes), point.count) for point in points]


@pytest.fixture
def exported() -> Exported:
    return Exported()


@contextmanager
def says(text, exported: Exported, *script, **engine) -> Iterator[Client]:
    standin = ScriptedEngine(text, *script, **engine)
    with serving(standin, text, sinks=exported.telemetry.sinks()) as url:
        client = Client(url, standin)
        yield client
        client.http.close()


def test_a_request_is_timed_under_the_genai_names(text, exported):
    with says(text, exported, "abc") as client:
        started_s = time.monotonic()
        client.chat()
        took_s = time.monotonic() - started_s
    for name in ("time_to_first_token", "time_per_output_token", "request.duration"):
        metric = exported.metrics()[f"gen_ai.server.{name}"]
        assert metric.unit == "s"
        assert metric.description
        [point] = metric.data.data_points
        assert (dict(point.attributes), point.count) == (CHAT, 1)
        assert 0 < point.sum < took_s
    assert point.explicit_bounds[:2] == (0.01, 0.02)
    assert exported.values("select_n.admission.decisions") == [
        ({"model": MODEL, "outcome": "admitted"}, 1)
    ]


def test_a_refusal_is_counted_with_its_reason_and_ends_the_request(text, exported):
    refusal = OverloadedError("full", reason="kv", retry_after_s=1)
    with says(text, exported, refusal=refusal) as client:
        client.chat()
    assert exported.values("select_n.admission.decisions") == [
        ({"model": MODEL, "outcome": "refused", "reason": "overloaded_kv"}, 1)
    ]
    assert exported.observed("gen_ai.server.request.duration") == [
        (CHAT | {"error.type": "overloaded_kv"}, 1)
    ]
    assert "gen_ai.server.time_to_first_token" not in exported.metrics()


def test_prometheus_and_opentelemetry_count_the_same(text, exported):
    with says(text, exported, "abc") as client:
        client.complete(n=3)
        page = client.http.get("/metrics").text
    who = CHAT | {"gen_ai.operation.name": "text_completion"}
    assert exported.observed("gen_ai.server.time_per_output_token") == [(who, 3)]
    assert (
        "gen_ai_server_time_per_output_token_seconds_count{"
        'gen_ai_operation_name="text_completion",gen_ai_provider_name="select_n",'
        f'gen_ai_request_model="{MODEL}"}} 3.0'
    ) in page


def test_a_replica_exports_its_units_link_and_queue(text, exported):
    engine = ScriptedEngine(text)
    exported.telemetry.observe(replica(engine, text).report)
    engine.now = replace(
        engine.now,
        running=3,
        waiting=2,
        kv_free_tokens=40,
        kv_cached_tokens=30,
        prefix_queried_tokens=500,
        prefix_hit_tokens=320,
        stall_s=1.5,
        link_bytes_by={("h2d", "weights"): 1 << 40, ("d2h", "kv"): 5},
        swaps=6,
        admitted=9,
        returned={"kv": 2, "ttft": 1},
    )
    assert exported.values("select_n.interval") == [({}, 3.0)]
    assert exported.values("select_n.units") == [
        ({"state": "streamed"}, 10),
        ({"state": "home"}, 20),
        ({"state": "mirrored"}, 12),
    ]
    assert exported.values("select_n.link.bytes") == [
        ({"kind": "weights", "direction": "h2d"}, 1 << 40),
        ({"kind": "kv", "direction": "d2h"}, 5),
    ]
    assert exported.values("select_n.interval.changes") == [({"cause": "tpot"}, 4)]
    assert exported.values("select_n.preemptions") == [
        ({"way": "swap"}, 6),
        ({"way": "recompute"}, 0),
    ]
    assert exported.values("select_n.engine.admissions") == [
        ({"outcome": "admitted", "reason": ""}, 9),
        ({"outcome": "refused", "reason": "kv"}, 2),
        ({"outcome": "refused", "reason": "ttft"}, 1),
    ]
    assert exported.values("select_n.link.bandwidth") == [({}, 1e9)]
    assert exported.values("select_n.copy_stall.duration") == [({}, 1.5)]
    assert exported.values("select_n.host.lease.bytes") == [({}, 2)]
    assert exported.values("select_n.host.pinned.bytes") == [({}, 1)]
    assert exported.values("select_n.running_requests") == [({}, 3)]
    assert exported.values("select_n.waiting_requests") == [({}, 2)]
    assert exported.values("select_n.kv.free_tokens") == [({}, 40)]
    assert exported.values("select_n.kv.cached_tokens") == [({}, 30)]
    assert exported.values("select_n.kv.tokens") == [({}, 1000)]
    assert exported.values("select_n.prefix_cache.queried_tokens") == [({}, 500)]
    assert exported.values("select_n.prefix_cache.hit_tokens") == [({}, 320)]


def test_a_replicas_series_have_units_and_what_only_grows_is_a_counter(text, exported):
    exported.telemetry.observe(replica(ScriptedEngine(text), text).report)
    metrics = exported.metrics()
    assert all(metric.description for metric in metrics.values())
    assert {name: metric.unit for name, metric in metrics.items()} == {
        "select_n.interval": "{layer}",
        "select_n.units": "{unit}",
        "select_n.link.bytes": "By",
        "select_n.link.bandwidth": "By/s",
        "select_n.copy_stall.duration": "s",
        "select_n.interval.changes": "{change}",
        "select_n.preemptions": "{preemption}",
        "select_n.engine.admissions": "{sequence}",
        "select_n.host.lease.bytes": "By",
        "select_n.host.pinned.bytes": "By",
        "select_n.running_requests": "{request}",
        "select_n.waiting_requests": "{request}",
        "select_n.kv.free_tokens": "{token}",
        "select_n.kv.cached_tokens": "{token}",
        "select_n.kv.tokens": "{token}",
        "select_n.prefix_cache.queried_tokens": "{token}",
        "select_n.prefix_cache.hit_tokens": "{token}",
        "select_n.iterations": "{iteration}",
        "select_n.iteration": "s",
        "select_n.predicted_iteration": "s",
    }
    assert {name for name, metric in metrics.items() if hasattr(metric.data, "is_monotonic")} == {
        "select_n.link.bytes",
        "select_n.copy_stall.duration",
        "select_n.interval.changes",
        "select_n.iterations",
        "select_n.engine.admissions",
        "select_n.preemptions",
        "select_n.prefix_cache.queried_tokens",
        "select_n.prefix_cache.hit_tokens",
    }


def test_a_replica_that_streams_nothing_has_no_interval(text, exported):
    engine = ScriptedEngine(text)
    exported.telemetry.observe(replica(engine, text).report)
    engine.now = replace(engine.now, k=0, interval=None)
    assert "select_n.interval" not in exported.metrics()
    assert exported.values("select_n.units") == [
        ({"state": "streamed"}, 0),
        ({"state": "home"}, 30),
        ({"state": "mirrored"}, 12),
    ]


def opened(**attributes: str) -> MeterProvider | None:
    return open_meter_provider(component="replica", attributes=attributes)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_METRICS_EXPORTER": "none"},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"},
    ],
)
async def test_nothing_is_exported_unless_asked_for(monkeypatch, environment, text):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert opened() is None
    telemetry = Telemetry.open("replica")
    telemetry.observe(replica(ScriptedEngine(text), text).report)
    assert telemetry.sinks() == ()
    await telemetry.close()


def test_the_sdk_is_not_imported_unless_asked_for():
    script = (
        "import sys, deployments.http.api\n"
        "from deployments.telemetry import Telemetry\n"
        "Telemetry.open('ingress').sinks()\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')]\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != ENDPOINT}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=60)


@pytest.mark.parametrize("variable", [ENDPOINT, "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"])
def test_an_endpoint_without_the_exporter_is_an_error_that_says_what_to_install(
    monkeypatch, variable
):
    monkeypatch.setenv(variable, "http://127.0.0.1:4318")
    exporter = "opentelemetry.exporter.otlp.proto.http.metric_exporter"
    monkeypatch.setitem(sys.modules, exporter, None)  # as if it were not there
    with pytest.raises(ConfigError, match="pip install 'opentelemetry-exporter-otlp") as caught:
        opened()
    assert caught.value.field == variable
    assert "\n" not in str(caught.value)


def test_another_protocol_is_an_error_that_names_the_variable(monkeypatch):
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        opened()


def test_a_broken_variable_is_a_configuration_error(monkeypatch):
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "-1")
    with pytest.raises(ConfigError, match="OTEL_"):
        opened()


@pytest.mark.parametrize(
    ("environment", "service"),
    [
        ({}, "select-n"),
        ({"OTEL_SERVICE_NAME": "chat"}, "chat"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=prod"}, "prod"),
    ],
)
def test_an_export_arrives_with_its_resource(monkeypatch, text, environment, service):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with collecting() as collector:
        monkeypatch.setenv(ENDPOINT, collector.url)
        provider = opened(**{"select_n.model": MODEL})
        Telemetry(provider).observe(replica(ScriptedEngine(text), text).report)
        provider.force_flush()
        [export] = collector.exports
        provider.shutdown()
    assert export.resource["service.name"] == service
    assert export.resource["select_n.component"] == "replica"
    assert export.resource["select_n.model"] == MODEL
    [link] = export.metrics["select_n.link.bytes"].sum.data_points
    assert link.as_int == 7
    # Ray's own metrics go through the global provider.
    assert api.get_meter_provider() is not provider


async def test_closing_exports_what_is_left_and_a_second_time_does_nothing(monkeypatch, text):
    with collecting() as collector:
        monkeypatch.setenv(ENDPOINT, collector.url)
        telemetry = Telemetry.open("replica")
        telemetry.observe(replica(ScriptedEngine(text), text).report)
        assert not collector.exports
        await telemetry.close()
        await telemetry.close()
    assert len(collector.exports) == 1


async def test_a_collector_that_does_not_answer_holds_up_nothing(monkeypatch, text):
    class Silent(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read()  # until the exporter gives up

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        server.daemon_threads = True
        serving_it = asyncio.create_task(asyncio.to_thread(server.serve_forever, 0.05))
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")
        telemetry = Telemetry.open("replica")
        telemetry.observe(replica(ScriptedEngine(text), text).report)
        async with asyncio.timeout(2):
            await telemetry.close()
        server.shutdown()
        await serving_it
