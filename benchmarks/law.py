"""The iteration-time law, predicted and measured: every k, every ring size, two links.

    python -m benchmarks.law --json
    python -m benchmarks.law --again --json         (predict anew what the last run measured)
    python -m benchmarks.law --executor --json      (see benchmarks/balance.py)

Predicted is the recurrence on a record made before the run; nothing is fitted to the run. The
records of both links are made alternately, several of each, and the one in the middle counts. All
points are visited in rounds, there and back, so that drift and bursts of the machine spread over
all of them. A point is the lower quartile over its rounds, as every sample in a record is: on a
shared machine neighbours only ever add time. The median stands beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.balance import executor_document, executor_lines
from benchmarks.decoding import DEMO, load, place, record_here
from benchmarks.environment import RESULTS, Provenance, note, publish
from select_n_core.decisions.latency import StepShape
from select_n_core.links.emulated import EmulatedLink
from select_n_core.models.load import LoadedModel
from select_n_core.offload.placement import StepRow
from select_n_core.profiling.measure import Effort
from select_n_core.record import PerformanceRecord

BATCH = 8
CONTEXT = 160
SLOTS = (1, 2, 3)
WARM_UP = 3
SHAPE = StepShape(decode_rows=BATCH, context_tokens=BATCH * CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=DEMO)
    parser.add_argument("--again", action="store_true", help="the last run's records and times")
    parser.add_argument("--executor", action="store_true", help="against max(L*c + g, k*t)")
    parser.add_argument("--links", type=float, nargs="+", help="bytes/s")
    parser.add_argument("--records", type=int, default=3, help="made for each link, alternately")
    parser.add_argument("--rounds", type=int, default=5, help="over all points")
    parser.add_argument("--repeats", type=int, default=4, help="iterations per point and round")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    if arguments.executor:
        _executor(arguments)
    elif arguments.again:
        _again(arguments)
    else:
        _law(arguments)


def _executor(arguments: argparse.Namespace) -> None:
    _, model = load(arguments.source, "bfloat16")
    rates = arguments.links or [1e9, 2e9, 4e9]
    document = executor_document(
        arguments.source, model, rates, arguments.rounds, arguments.repeats, BATCH
    )
    lines = executor_lines(document["summary"])
    publish("executor", document, as_json=arguments.json, lines=lines)


def _again(arguments: argparse.Namespace) -> None:
    """The same records and the same measured times under the law as it is now."""
    document = json.loads((RESULTS / "law.json").read_text(encoding="utf-8"))
    records = {
        record.fingerprint.link_bytes_per_s: record
        for record in map(PerformanceRecord.model_validate, document["records"])
    }
    for point in document["points"]:
        record = records[point["link_bytes_per_s"]]
        predicted_s = record.latency_model().iteration_s(SHAPE, point["k"], point["d"])
        point["predicted_iteration_s"] = predicted_s
        point["ratio"] = point["measured_iteration_s"] / predicted_s
    unit_bytes = max(nbytes for record in records.values() for nbytes in record.unit_bytes)
    document["summary"] = _summary(document["points"], unit_bytes)
    document["predicted_again"] = Provenance().document()
    publish("law", document, as_json=arguments.json, lines=_lines(document["summary"]))


def _law(arguments: argparse.Namespace) -> None:
    provenance = Provenance()
    rates = arguments.links or [1e9, 4e9]
    directory, model = load(arguments.source, "bfloat16")
    effort = Effort(batches=(1, 4, BATCH), contexts=(64, 256), chunks=(32,))
    made: dict[float, list[PerformanceRecord]] = {rate: [] for rate in rates}
    for number in range(arguments.records):
        for rate, own in made.items():
            own.append(record_here(arguments.source, directory, model, "bfloat16", rate, effort))
            note(f"record {number + 1} of {arguments.records} at {rate / 1e9:g} GB/s")
    records = {rate: _middle(own) for rate, own in made.items()}
    keys = [
        (rate, slots, k) for rate in rates for k in range(len(model.units) + 1) for slots in SLOTS
    ]
    times_s: dict[tuple[float, int, int], list[float]] = {key: [] for key in keys}
    for number in range(arguments.rounds):
        for rate, slots, k in keys if number % 2 == 0 else keys[::-1]:
            times_s[rate, slots, k] += _iterations(model, rate, slots, k, arguments.repeats)
        note(f"round {number + 1} of {arguments.rounds}")
    points = [_point(records[key[0]], *key, times_s[key]) for key in keys]
    document = {
        "model": arguments.source,
        "dtype": "bfloat16",
        "batch": BATCH,
        "context_tokens": CONTEXT,
        "records_made": arguments.records,
        "rounds": arguments.rounds,
        "repeats": arguments.repeats,
        "points": points,
        "summary": _summary(points, max(unit.nbytes for unit in model.units)),
        "records": [record.model_dump(mode="json") for record in records.values()],
        "provenance": provenance.document(),
    }
    publish("law", document, as_json=arguments.json, lines=_lines(document["summary"]))


def _middle(records: list[PerformanceRecord]) -> PerformanceRecord:
    """The record whose layers are neither the fastest nor the slowest."""
    return sorted(records, key=lambda each: each.latency_model().iteration_s(SHAPE, 1, 2))[
        len(records) // 2
    ]


def _iterations(
    model: LoadedModel, link_bytes_per_s: float, slots: int, k: int, repeats: int
) -> list[float]:
    """Seconds of decode iterations of the batch in steady state."""
    link = EmulatedLink(link_bytes_per_s)
    executor = place(model, link, k=k, slots=slots, requests=BATCH, tokens=CONTEXT + 1)
    rows = []
    for index in range(BATCH):
        executor.blocks.reserve(str(index), CONTEXT + 1)
        rows.append(StepRow(executor.blocks.table(str(index)), CONTEXT, [1]))
    times_s = []
    for _ in range(WARM_UP + repeats):
        begun_s = time.perf_counter()
        executor.step(rows).argmax(-1).tolist()
        times_s.append(time.perf_counter() - begun_s)
    executor.close()
    link.close()
    return times_s[WARM_UP:]


def _point(
    record: PerformanceRecord,
    link_bytes_per_s: float,
    slots: int,
    k: int,
    times_s: list[float],
) -> dict[str, Any]:
    measured_s = float(np.percentile(times_s, 25))
    predicted_s = record.latency_model().iteration_s(SHAPE, k, slots)
    return {
        "link_bytes_per_s": link_bytes_per_s,
        "d": slots,
        "k": k,
        "measured_iteration_s": measured_s,
        "predicted_iteration_s": predicted_s,
        "ratio": measured_s / predicted_s,
        "p10_s": float(np.percentile(times_s, 10)),
        "median_s": statistics.median(times_s),
        "p90_s": float(np.percentile(times_s, 90)),
    }


def _summary(points: list[dict[str, Any]], unit_bytes: int) -> list[dict[str, Any]]:
    rows = []
    for link_bytes_per_s, slots in sorted({(p["link_bytes_per_s"], p["d"]) for p in points}):
        own = [p for p in points if (p["link_bytes_per_s"], p["d"]) == (link_bytes_per_s, slots)]
        ratios = [point["ratio"] for point in own]
        rows.append(
            {
                "link_bytes_per_s": link_bytes_per_s,
                "d": slots,
                "points": len(own),
                "within_10_percent": sum(0.9 <= r <= 1.1 for r in ratios) / len(ratios),
                "worst_high": max(ratios),
                "worst_low": min(ratios),
                "copy_bound": _slope(own, unit_bytes / link_bytes_per_s) if slots > 1 else None,
            }
        )
    return rows


def _slope(points: list[dict[str, Any]], transfer_s: float) -> dict[str, float] | None:
    """Slope of T over k where the copies alone make the iteration: the prediction is k*t."""
    bound = [
        point
        for point in points
        if point["k"] and point["predicted_iteration_s"] < 1.01 * point["k"] * transfer_s
    ]
    if len(bound) < 4:
        return None
    slope = np.polyfit([p["k"] for p in bound], [p["measured_iteration_s"] for p in bound], 1)[0]
    return {
        "points": len(bound),
        "slope_s": float(slope),
        "unit_transfer_s": transfer_s,
        "ratio": float(slope) / transfer_s,
    }


def _lines(summary: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in summary:
        slope = row["copy_bound"]
        shown = "" if slope is None else f", slope / (unit bytes / bandwidth) {slope['ratio']:.3f}"
        lines.append(
            f"{row['link_bytes_per_s'] / 1e9:g} GB/s, d = {row['d']}: "
            f"{row['within_10_percent']:.0%} of {row['points']} points within 10%, "
            f"worst {row['worst_low']:.3f} and {row['worst_high']:.3f}{shown}"
        )
    return lines


if __name__ == "__main__":
    main()
