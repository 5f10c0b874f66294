"""Times the ingress' requests, and tells Prometheus of them and of the replicas' reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.calls import Call, Delta, Failure, Report, Terms
from deployments.series import (
    ADMISSIONS,
    DURATION,
    PROVIDER,
    REPLICA_SERIES,
    REQUEST_SERIES,
    TOKENS,
    TPOT,
    TTFT,
    VIOLATIONS,
    ReplicaSeries,
    Series,
    Sink,
)
from select_n_core.slo import SLO

_UNITS = {"s": "_seconds", "By": "_bytes", "By/s": "_bytes_per_second"}


class IngressMetrics:
    """What this ingress saw of its requests, for Prometheus and for whoever else listens.

    Args:
        slos: each model's targets; a sequence that misses its own counts as a violation.
        sinks: told of every measurement.
    """

    def __init__(self, slos: Mapping[str, SLO], sinks: Sequence[Sink] = ()) -> None:
        self.slos = slos
        self._registry = CollectorRegistry()
        self._sinks = (_PrometheusSink(self._registry), *sinks)

    def record(self, series: Series, value: float, attributes: Mapping[str, str]) -> None:
        """One measurement."""
        for sink in self._sinks:
            sink.record(series, value, attributes)

    def retried(self, model: str) -> Callable[[Call, Failure], None]:
        """Whom to tell of a sequence of the model that is sent to another replica."""

        def record(call: Call, failure: Failure) -> None:
            who = {"tenant": call.terms.tenant} if call.terms.tenant else {}
            what = {"model": model, "outcome": "sent_elsewhere", "reason": failure.code}
            self.record(ADMISSIONS, 1, what | who)

        return record

    def page(self, reports: Mapping[str, Sequence[Report]]) -> bytes:
        """The exposition text: own series and one set of series per reporting replica."""
        replicas = CollectorRegistry()
        replicas.register(_ReplicaCollector(reports))
        return generate_latest(self._registry) + generate_latest(replicas)


class RequestTimer:
    """Times one request, from its construction, and records it when it ends.

    Args:
        terms: on which it is served.
    """

    def __init__(self, metrics: IngressMetrics, model: str, operation: str, terms: Terms) -> None:
        self._metrics = metrics
        self._slo = terms.slo or metrics.slos.get(model)
        self._class = {"class": terms.slo_class} if terms.slo_class else {}
        # Names that the policy has, never a client's own words: they stay few.
        self._model = {"model": model} | ({"tenant": terms.tenant} if terms.tenant else {})
        self._who = {
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model,
            "gen_ai.operation.name": operation,
        }
        self._start_s = time.monotonic()
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._tokens: dict[int, int] = {}
        self._admitted = False
        self._ended = False

    def admitted(self) -> None:
        """Every sequence was accepted."""
        self._admitted = True
        self._metrics.record(ADMISSIONS, 1, self._model | {"outcome": "admitted"})

    def delta(self, index: int, delta: Delta) -> None:
        """Sequence `index` went on."""
        if delta.tokens:
            self._last_s[index] = time.monotonic()
            if index not in self._first_s:
                self._first_s[index] = self._last_s[index]
                self._observe("ttft", TTFT, self._first_s[index] - self._start_s)
        self._tokens[index] = self._tokens.get(index, 0) + delta.tokens
        if delta.finish and self._tokens[index] > 1:
            span_s = self._last_s[index] - self._first_s[index]
            self._observe("tpot", TPOT, span_s / (self._tokens[index] - 1))

    def used(self, prompt_tokens: int, completion_tokens: int) -> None:
        """So many tokens, when it ended."""
        for kind, tokens in (("input", prompt_tokens), ("output", completion_tokens)):
            self._metrics.record(TOKENS, tokens, self._model | {"type": kind})

    def done(self) -> None:
        """Every sequence finished."""
        self._end(None)

    def failed(self, failure: Failure) -> None:
        """The request was refused, or broke."""
        if not self._admitted:
            refusal = {"outcome": "refused", "reason": failure.code}
            self._metrics.record(ADMISSIONS, 1, self._model | refusal)
        self._end(failure.code)

    def left(self) -> None:
        """Nobody listens any more; without effect on a request that ended before."""
        self._end("cancelled")

    def _end(self, error_type: str | None) -> None:
        if not self._ended:
            self._ended = True
            error = {} if error_type is None else {"error.type": error_type}
            self._metrics.record(DURATION, time.monotonic() - self._start_s, self._who | error)

    def _observe(self, target: str, series: Series, value_s: float) -> None:
        self._metrics.record(series, value_s, self._who)
        if self._slo is not None and value_s > getattr(self._slo, f"{target}_s"):
            self._metrics.record(VIOLATIONS, 1, self._model | self._class | {"slo": target})


class _PrometheusSink:
    """Requests as Prometheus' histograms and counters; an absent attribute is an empty label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._histograms = {
            series.name: Histogram(
                _name(series),
                series.text,
                _labels(series),
                buckets=series.buckets,
                registry=registry,
            )
            for series in REQUEST_SERIES
            if series.buckets
        }
        self._counters = {
            series.name: Counter(_name(series), series.text, _labels(series), registry=registry)
            for series in REQUEST_SERIES
            if not series.buckets
        }

    def record(self, series: Series, value: float, attributes: Mapping[str, str]) -> None:
        """See `Sink.record`."""
        labels = [attributes.get(name, "") for name in series.attributes]
        if series.buckets:
            self._histograms[series.name].labels(*labels).observe(value)
        else:
            self._counters[series.name].labels(*labels).inc(value)


class _ReplicaCollector(Collector):
    """Reports as metric families."""

    def __init__(self, reports: Mapping[str, Sequence[Report]]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        for series in REPLICA_SERIES:
            kind = CounterMetricFamily if series.counter else GaugeMetricFamily
            family = kind(_name(series), series.text, labels=("model", "replica", *_labels(series)))
            for model, reports in self._reports.items():
                for report in reports:
                    for attributes, value in series.read(report):
                        own = (attributes[name] for name in series.attributes)
                        family.add_metric((model, report.replica, *own), value)
            yield family
        replicas = GaugeMetricFamily(
            "select_n_replicas", "Replicas that report.", labels=("model",)
        )
        for model, reports in self._reports.items():
            replicas.add_metric((model,), len(reports))
        yield replicas


def _name(series: Series | ReplicaSeries) -> str:
    """The name as OpenTelemetry translates it for Prometheus, which adds a counter's `_total`."""
    name = _spelled(series.name)
    unit = _UNITS.get(series.unit, "")
    return name if name.endswith(unit) else name + unit


def _labels(series: Series | ReplicaSeries) -> tuple[str, ...]:
    return tuple(_spelled(name) for name in series.attributes)


def _spelled(name: str) -> str:
    return name.replace(".", "_")
