"""Prometheus metrics: the ingress' own request histograms, and the replicas' reports.

Names are OpenTelemetry's (`gen_ai.*`) and ours (`select_n.*`) in Prometheus spelling.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.calls import Delta, Failure, Report
from select_n_core.slo import SLO

# The buckets that OpenTelemetry's GenAI conventions name.
_DURATION_S = tuple(0.01 * 2**power for power in range(14))
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_WHO = ("gen_ai_request_model", "gen_ai_operation_name")


class IngressMetrics:
    """What this ingress saw of its requests.

    Args:
        slos: each model's targets; a sequence that misses one counts as a violation.
    """

    def __init__(self, slos: Mapping[str, SLO]) -> None:
        self.slos = slos
        self.registry = CollectorRegistry()
        self.ttft = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            _WHO,
            buckets=_TTFT_S,
            registry=self.registry,
        )
        self.tpot = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time per output token after the first, of a finished sequence.",
            _WHO,
            buckets=_TPOT_S,
            registry=self.registry,
        )
        self.duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From the request's arrival to its last token, or to the failure that ended it.",
            (*_WHO, "error_type"),
            buckets=_DURATION_S,
            registry=self.registry,
        )
        self.admissions = Counter(
            "select_n_admission_decisions",
            "Requests admitted and refused.",
            ("model", "outcome", "reason"),
            registry=self.registry,
        )
        self.violations = Counter(
            "select_n_slo_violations",
            "Finished sequences that missed a latency target.",
            ("model", "slo"),
            registry=self.registry,
        )

    def page(self, reports: Mapping[str, Sequence[Report]]) -> bytes:
        """The exposition text: own series and one set of series per reporting replica."""
        replicas = CollectorRegistry()
        replicas.register(_ReplicaCollector(reports))
        return generate_latest(self.registry) + generate_latest(replicas)


class RequestTimer:
    """Times one request, from its construction, and records it when it ends."""

    def __init__(self, metrics: IngressMetrics, model: str, operation: str) -> None:
        self._metrics = metrics
        self._model = model
        self._who = (model, operation)
        self._start_s = time.monotonic()
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._tokens: dict[int, int] = {}
        self._admitted = False
        self._ended = False

    def admitted(self) -> None:
        """Every sequence was accepted."""
        self._admitted = True
        self._metrics.admissions.labels(self._model, "admitted", "").inc()

    def delta(self, index: int, delta: Delta) -> None:
        """Sequence `index` went on."""
        if delta.tokens:
            self._last_s[index] = time.monotonic()
            if index not in self._first_s:
                self._first_s[index] = self._last_s[index]
                self._observe("ttft", self._metrics.ttft, self._first_s[index] - self._start_s)
        self._tokens[index] = self._tokens.get(index, 0) + delta.tokens
        if delta.finish and self._tokens[index] > 1:
            span_s = self._last_s[index] - self._first_s[index]
            self._observe("tpot", self._metrics.tpot, span_s / (self._tokens[index] - 1))

    def done(self) -> None:
        """Every sequence finished."""
        self._end("")

    def failed(self, failure: Failure) -> None:
        """The request was refused, or broke."""
        if not self._admitted:
            self._metrics.admissions.labels(self._model, "refused", failure.code).inc()
        self._end(failure.code)

    def left(self) -> None:
        """Nobody listens any more; without effect on a request that ended before."""
        self._end("cancelled")

    def _end(self, error_type: str) -> None:
        if not self._ended:
            self._ended = True
            duration_s = time.monotonic() - self._start_s
            self._metrics.duration.labels(*self._who, error_type).observe(duration_s)

    def _observe(self, target: str, histogram: Histogram, value_s: float) -> None:
        histogram.labels(*self._who).observe(value_s)
        slo = self._metrics.slos.get(self._model)
        if slo is not None and value_s > getattr(slo, f"{target}_s"):
            self._metrics.violations.labels(self._model, target).inc()


class _ReplicaCollector(Collector):
    """Reports as metric families."""

    def __init__(self, reports: Mapping[str, Sequence[Report]]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "select_n_interval": "Layers per streamed one, N = L/k; absent when none streams.",
            "select_n_link_bandwidth_bytes_per_second": "Measured or configured, host to device.",
            "select_n_host_lease_bytes": "Host memory held for mirrors.",
            "select_n_running_requests": "Requests that hold KV memory.",
            "select_n_waiting_requests": "Requests in the engine's queue.",
            "select_n_kv_free_tokens": "KV capacity left.",
            "select_n_kv_tokens": "KV capacity in all.",
            "select_n_iteration_seconds": "Wall time of the last iteration.",
            "select_n_predicted_iteration_seconds": "What the plan says an iteration takes.",
        }
        counters = {
            "select_n_copy_stall_duration_seconds": "Compute time lost waiting for copies.",
            "select_n_iterations": "Engine steps.",
        }
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, text in gauges.items():
            families[name] = GaugeMetricFamily(name, text, labels=("model", "replica"))
        for name, text in counters.items():
            families[name] = CounterMetricFamily(name, text, labels=("model", "replica"))
        units = GaugeMetricFamily(
            "select_n_units", "Units by place.", labels=("model", "replica", "state")
        )
        link = CounterMetricFamily(
            "select_n_link_bytes",
            "Bytes copied over the link.",
            labels=("model", "replica", "kind", "direction"),
        )
        replicas = GaugeMetricFamily(
            "select_n_replicas", "Replicas that report.", labels=("model",)
        )
        for model, reports in self._reports.items():
            replicas.add_metric((model,), len(reports))
            for report in reports:
                who = (model, report.replica)
                for name, value in _values(report).items():
                    families[name].add_metric(who, value)
                units.add_metric((*who, "streamed"), report.stats.k)
                units.add_metric((*who, "home"), report.info.units - report.stats.k)
                link.add_metric((*who, "weights", "h2d"), report.stats.link_bytes)
        yield from (*families.values(), units, link, replicas)


def _values(report: Report) -> dict[str, float]:
    info, stats = report.info, report.stats
    values = {
        "select_n_link_bandwidth_bytes_per_second": info.link_bytes_per_s,
        "select_n_host_lease_bytes": info.host_bytes,
        "select_n_running_requests": stats.running,
        "select_n_waiting_requests": stats.waiting,
        "select_n_kv_free_tokens": stats.kv_free_tokens,
        "select_n_kv_tokens": stats.kv_tokens,
        "select_n_iteration_seconds": stats.iteration_s,
        "select_n_predicted_iteration_seconds": info.predicted_iteration_s,
        "select_n_copy_stall_duration_seconds": stats.stall_s,
        "select_n_iterations": stats.iterations,
    }
    if stats.interval is not None:
        values["select_n_interval"] = stats.interval
    return values
