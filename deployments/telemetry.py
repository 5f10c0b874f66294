"""Metrics over OTLP, where OpenTelemetry's standard environment asks for them.

Ray has providers of its own, so these are never the global ones. OpenTelemetry's SDK is imported
only when something is exported.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from deployments.calls import Report
from deployments.series import REPLICA_SERIES, REQUEST_SERIES, ReplicaSeries, Series, Sink
from select_n_core.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from opentelemetry.sdk.metrics import MeterProvider

_METER = "select_n"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
# A collector that does not answer must not hold up the end of a replica.
_LAST_EXPORT_S = 1.0


class Telemetry:
    """What one process exports; without effect where nobody asked for it.

    Args:
        provider: brings the instruments, and is shut down by `close`; None exports nothing.
    """

    def __init__(self, provider: MeterProvider | None) -> None:
        self._provider = provider

    @classmethod
    def open(cls, component: str, attributes: Mapping[str, str] | None = None) -> Telemetry:
        """Export as the environment says; see `open_meter_provider`."""
        return cls(open_meter_provider(component=component, attributes=attributes or {}))

    def sinks(self) -> tuple[Sink, ...]:
        """Where requests are recorded."""
        return () if self._provider is None else (_MeterSink(self._provider.get_meter(_METER)),)

    def observe(self, report: Callable[[], Report]) -> None:
        """Export a replica; `report` is called at each export, from a thread of the exporter."""
        if self._provider is not None:
            _observe(self._provider.get_meter(_METER), report)

    async def close(self) -> None:
        """Export once more, waiting a second at most, and stop."""
        provider, self._provider = self._provider, None
        if provider is not None:
            await asyncio.to_thread(provider.shutdown, timeout_millis=1000 * _LAST_EXPORT_S)


def open_meter_provider(*, component: str, attributes: Mapping[str, str]) -> MeterProvider | None:
    """A provider that exports over OTLP/HTTP, or None where the environment does not ask for it.

    It asks by OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_METRICS_ENDPOINT, unless
    OTEL_METRICS_EXPORTER or OTEL_SDK_DISABLED says no. The exporter reads the other variables.

    Args:
        component: of the application, `replica` for example.
        attributes: of the resource; OTEL_RESOURCE_ATTRIBUTES adds to them.

    Raises:
        ConfigError: the exporter is not installed, or a variable has a value it cannot serve.
    """
    asked = _asked_by()
    if asked is None:
        return None
    _check_protocol()
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{asked} is set, but the OTLP exporter is not installed: "
            "pip install 'opentelemetry-exporter-otlp-proto-http>=1.30', or unset it",
            field=asked,
        ) from error
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    own = {"service.name": "select-n", "select_n.component": component, **attributes}
    resource = Resource.create(own).merge(OTELResourceDetector().detect())
    try:
        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    except ValueError as error:
        raise ConfigError(f"a variable OTEL_* is broken: {error}") from error
    # Ray ends its processes without Python's exit handlers; `Telemetry.close` shuts it down.
    return MeterProvider([reader], resource, shutdown_on_exit=False)


def _asked_by() -> str | None:
    """The variable that asks for an export, if one does; an empty one counts as unset."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporters = os.environ.get("OTEL_METRICS_EXPORTER") or "otlp"
    if disabled or "otlp" not in {name.strip() for name in exporters.split(",")}:
        return None
    return next((name for name in _ENDPOINTS if os.environ.get(name)), None)


def _check_protocol() -> None:
    for name in _PROTOCOLS:
        if protocol := os.environ.get(name):
            if protocol != _PROTOCOL:
                raise ConfigError(
                    f"{name} is {protocol!r}, but metrics are exported by {_PROTOCOL!r} only; "
                    "unset it and name the collector's HTTP port (4318 by default)",
                    field=name,
                )
            return  # the metrics' own variable hides the general one


class _MeterSink:
    """Requests as OpenTelemetry's histograms and counters."""

    def __init__(self, meter: Meter) -> None:
        self._histograms = {
            series.name: meter.create_histogram(
                series.name,
                series.unit,
                series.text,
                explicit_bucket_boundaries_advisory=series.buckets,
            )
            for series in REQUEST_SERIES
            if series.buckets
        }
        self._counters = {
            series.name: meter.create_counter(series.name, series.unit, series.text)
            for series in REQUEST_SERIES
            if not series.buckets
        }

    def record(self, series: Series, value: float, attributes: Mapping[str, str]) -> None:
        """See `Sink.record`."""
        if series.buckets:
            self._histograms[series.name].record(value, attributes)
        else:
            self._counters[series.name].add(value, attributes)


def _observe(meter: Meter, report: Callable[[], Report]) -> None:
    from opentelemetry.metrics import Observation

    def callback(series: ReplicaSeries) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _: [Observation(value, at) for at, value in series.read(report())]

    for series in REPLICA_SERIES:
        create = (
            meter.create_observable_counter if series.counter else meter.create_observable_gauge
        )
        create(series.name, [callback(series)], series.unit, series.text)
