"""What is measured, told once for Prometheus and OpenTelemetry: names, units, attributes, values.

Names are OpenTelemetry's (`gen_ai.*`, its GenAI conventions) and ours (`select_n.*`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from deployments.calls import Report

# The buckets that OpenTelemetry's GenAI conventions name.
_DURATION_S = tuple(0.01 * 2**power for power in range(14))
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_WHO = ("gen_ai.provider.name", "gen_ai.request.model", "gen_ai.operation.name")

PROVIDER = "select_n"


@dataclass(frozen=True, slots=True)
class Series:
    """One metric that requests are recorded into.

    Attributes:
        unit: in UCUM; `{...}` counts things.
        attributes: the names that a data point's attributes may have; it may lack some.
        buckets: a histogram's bounds; a counter has none.
    """

    name: str
    unit: str
    text: str
    attributes: tuple[str, ...]
    buckets: tuple[float, ...] = ()


class Sink(Protocol):
    """Where the ingress records what it measured."""

    def record(self, series: Series, value: float, attributes: Mapping[str, str]) -> None:
        """Add `value` to a counter, or one observation to a histogram."""
        ...


TTFT = Series(
    "gen_ai.server.time_to_first_token",
    "s",
    "From the request's arrival to its first token.",
    _WHO,
    _TTFT_S,
)
TPOT = Series(
    "gen_ai.server.time_per_output_token",
    "s",
    "Mean time per output token after the first, of a finished sequence.",
    _WHO,
    _TPOT_S,
)
DURATION = Series(
    "gen_ai.server.request.duration",
    "s",
    "From the request's arrival to its last token, or to the failure that ended it.",
    (*_WHO, "error.type"),
    _DURATION_S,
)
ADMISSIONS = Series(
    "select_n.admission.decisions",
    "{request}",
    "Requests admitted and refused, and their sequences that were sent to a second replica.",
    ("model", "outcome", "reason", "tenant"),
)
VIOLATIONS = Series(
    "select_n.slo.violations",
    "{sequence}",
    "Finished sequences that missed a latency target of their class.",
    ("model", "slo", "class", "tenant"),
)
TOKENS = Series(
    "select_n.tokens",
    "{token}",
    "Tokens of requests that ended, as the quota counts them: a prompt once.",
    ("model", "type", "tenant"),
)
REQUEST_SERIES = (TTFT, TPOT, DURATION, ADMISSIONS, VIOLATIONS, TOKENS)

Point = tuple[Mapping[str, str], float]


@dataclass(frozen=True, slots=True)
class ReplicaSeries:
    """One metric that is read from a replica's report.

    Attributes:
        unit: in UCUM; `{...}` counts things.
        read: its data points, each with its attributes; none where there is nothing to tell.
        attributes: the names of every data point's attributes.
        counter: it only grows; else it is a gauge.
    """

    name: str
    unit: str
    text: str
    read: Callable[[Report], Iterable[Point]]
    attributes: tuple[str, ...] = ()
    counter: bool = False


def _value(read: Callable[[Report], float | None]) -> Callable[[Report], Iterable[Point]]:
    def points(report: Report) -> Iterable[Point]:
        value = read(report)
        return () if value is None else (({}, value),)

    return points


def _units(report: Report) -> Iterable[Point]:
    yield {"state": "streamed"}, report.stats.k
    yield {"state": "home"}, report.info.units - report.stats.k
    yield {"state": "mirrored"}, report.stats.mirrored


def _turns(report: Report) -> Iterable[Point]:
    for cause, count in report.stats.turns.items():
        yield {"cause": cause}, count


def _link(report: Report) -> Iterable[Point]:
    for (direction, kind), nbytes in report.stats.link_bytes_by.items():
        yield {"kind": kind, "direction": direction}, nbytes


def _verdicts(report: Report) -> Iterable[Point]:
    yield {"outcome": "admitted", "reason": ""}, report.stats.admitted
    for reason, count in report.stats.returned.items():
        yield {"outcome": "refused", "reason": reason}, count


def _preemptions(report: Report) -> Iterable[Point]:
    yield {"way": "swap"}, report.stats.swaps
    yield {"way": "recompute"}, report.stats.recomputes


REPLICA_SERIES = (
    ReplicaSeries(
        "select_n.interval",
        "{layer}",
        "Layers per streamed one, N = L/k; absent when none streams.",
        _value(lambda report: report.stats.interval),
    ),
    ReplicaSeries(
        "select_n.units",
        "{unit}",
        "Units by place; mirrored ones are streamed or could be.",
        _units,
        ("state",),
    ),
    ReplicaSeries(
        "select_n.interval.changes",
        "{change}",
        "Turns of k, by cause.",
        _turns,
        ("cause",),
        counter=True,
    ),
    ReplicaSeries(
        "select_n.link.bytes",
        "By",
        "Bytes copied over the link.",
        _link,
        ("kind", "direction"),
        counter=True,
    ),
    ReplicaSeries(
        "select_n.link.bandwidth",
        "By/s",
        "Measured or configured, host to device.",
        _value(lambda report: report.info.link_bytes_per_s),
    ),
    ReplicaSeries(
        "select_n.copy_stall.duration",
        "s",
        "Compute time lost waiting for copies.",
        _value(lambda report: report.stats.stall_s),
        counter=True,
    ),
    ReplicaSeries(
        "select_n.host.lease.bytes",
        "By",
        "Host memory that mirrors may take.",
        _value(lambda report: report.stats.lease_bytes),
    ),
    ReplicaSeries(
        "select_n.host.pinned.bytes",
        "By",
        "Host memory that mirrors take.",
        _value(lambda report: report.stats.host_bytes),
    ),
    ReplicaSeries(
        "select_n.preemptions",
        "{preemption}",
        "Running requests that gave their KV blocks back for a while.",
        _preemptions,
        ("way",),
        counter=True,
    ),
    ReplicaSeries(
        "select_n.engine.admissions",
        "{sequence}",
        "Sequences that the engine let in, and those it returned, by reason.",
        _verdicts,
        ("outcome", "reason"),
        counter=True,
    ),
    ReplicaSeries(
        "select_n.running_requests",
        "{request}",
        "Requests that hold KV memory.",
        _value(lambda report: report.stats.running),
    ),
    ReplicaSeries(
        "select_n.waiting_requests",
        "{request}",
        "Requests in the engine's queue.",
        _value(lambda report: report.stats.waiting),
    ),
    ReplicaSeries(
        "select_n.kv.free_tokens",
        "{token}",
        "KV capacity left.",
        _value(lambda report: report.stats.kv_free_tokens),
    ),
    ReplicaSeries(
        "select_n.kv.cached_tokens",
        "{token}",
        "Of the KV capacity left, that which holds prefixes until somebody needs it.",
        _value(lambda report: report.stats.kv_cached_tokens),
    ),
    ReplicaSeries(
        "select_n.prefix_cache.queried_tokens",
        "{token}",
        "Prompt tokens of the sequences that the engine let in.",
        _value(lambda report: report.stats.prefix_queried_tokens),
        counter=True,
    ),
    ReplicaSeries(
        "select_n.prefix_cache.hit_tokens",
        "{token}",
        "Those of them that it need not compute again.",
        _value(lambda report: report.stats.prefix_hit_tokens),
        counter=True,
    ),
    ReplicaSeries(
        "select_n.kv.tokens",
        "{token}",
        "KV capacity in all.",
        _value(lambda report: report.stats.kv_tokens),
    ),
    ReplicaSeries(
        "select_n.iterations",
        "{iteration}",
        "Engine steps.",
        _value(lambda report: report.stats.iterations),
        counter=True,
    ),
    ReplicaSeries(
        "select_n.iteration",
        "s",
        "Wall time of the last iteration.",
        _value(lambda report: report.stats.iteration_s),
    ),
    ReplicaSeries(
        "select_n.predicted_iteration",
        "s",
        "What the plan says an iteration takes.",
        _value(lambda report: report.info.predicted_iteration_s),
    ),
)
