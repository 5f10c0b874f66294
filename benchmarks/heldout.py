"""The fitted latency model on steps that the fit never saw: prompt, decode and mixed, at several k.

    python -m benchmarks.heldout --json

Makes the record as `select-n profile` does. Held out are whole shapes: no batch, context or chunk
of theirs is in the fit. An error is |predicted / median of the repeats - 1|; the noise is by how
much medians of two halves of the same repeats differ, taken at random; the drift is by how much
medians of the earlier and of the later half differ. The goal is a P95 of the errors of at most
5%, or 1.5 times the P95 of the noise where that is more.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.decoding import DEMO, load, record_here
from benchmarks.environment import Provenance, note, publish
from select_n_core.profiling.heldout import goal, p95
from select_n_core.profiling.measure import Effort
from select_n_core.record import HeldOutSample, PerformanceRecord


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=DEMO)
    parser.add_argument("--links", type=float, nargs="+", default=[1e9], help="bytes/s")
    parser.add_argument("--sweeps", type=int, default=Effort.full().sweeps, help="2 repeats each")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    provenance = Provenance()
    directory, model = load(arguments.source, "bfloat16")
    effort = replace(Effort.full(), sweeps=arguments.sweeps)
    found = []
    for rate in arguments.links:
        record = record_here(arguments.source, directory, model, "bfloat16", rate, effort)
        found.append(summary(rate, record))
        note(f"record at {rate / 1e9:g} GB/s: {record.seconds:.0f} s")
    document = {
        "model": arguments.source,
        "dtype": "bfloat16",
        "repeats": effort.sweeps * effort.repeats,
        "links": found,
        "provenance": provenance.document(),
    }
    publish("heldout", document, as_json=arguments.json, lines=lines(found))


def summary(rate: float, record: PerformanceRecord) -> dict[str, Any]:
    """P95 of errors and noise, over all steps and by class."""
    return {
        "link_bytes_per_s": rate,
        "record_s": record.seconds,
        "machine_noise": record.streaming.noise,
        "fit_error": record.streaming.fit_error,
        "compute_slowdown": record.latency_model().streaming.copy_slowdown,
        "all": _class(record.held_out),
        "by_k": _by(record.held_out, lambda sample: _k_class(sample, record)),
        "by_shape": _by(record.held_out, _shape_class),
        "steps": [_step(sample) for sample in record.held_out],
        "record": record.model_dump(mode="json", exclude={"held_out"}),
    }


def _by(
    samples: tuple[HeldOutSample, ...], kind: Callable[[HeldOutSample], str]
) -> dict[str, dict[str, Any]]:
    kinds = sorted({kind(sample) for sample in samples})
    return {
        name: _class(tuple(sample for sample in samples if kind(sample) == name)) for name in kinds
    }


def _class(samples: tuple[HeldOutSample, ...]) -> dict[str, Any]:
    errors, noises = [s.error for s in samples], [s.noise for s in samples]
    noise = p95(noises) or 0.0
    return {
        "steps": len(samples),
        "error_p50": statistics.median(errors),
        "error_p95": p95(errors),
        "bias": statistics.median(s.predicted_s / s.typical_s - 1 for s in samples),
        "noise_p95": noise,
        "drift_p95": p95([_drift(s.seconds) for s in samples]),
        "goal": goal(noise),
        "met": (p95(errors) or 0.0) <= goal(noise),
    }


def _drift(seconds: Sequence[float]) -> float:
    half = len(seconds) // 2
    return abs(statistics.median(seconds[:half]) / statistics.median(seconds[-half:]) - 1)


def _k_class(sample: HeldOutSample, record: PerformanceRecord) -> str:
    """By what makes the iteration: compute alone, compute beside copies, or the copies."""
    if not sample.k:
        return "k = 0"
    copies_s = record.latency_model().copies_s(sample.k)
    alone_s = record.latency_model().iteration_s(sample.shape(), 0, sample.slots, rows=sample.rows)
    share = copies_s / alone_s
    return "copies hide" if share < 0.8 else "copies balance" if share < 1.2 else "copies bind"


def _shape_class(sample: HeldOutSample) -> str:
    if not sample.prefill_tokens:
        return "decode"
    return "mixed" if sample.decode_rows else "prompt"


def _step(sample: HeldOutSample) -> dict[str, Any]:
    return {
        **sample.model_dump(mode="json", exclude={"seconds"}),
        "median_s": sample.typical_s,
        "drift": _drift(sample.seconds),
        "error": sample.error,
        "ratio": sample.predicted_s / sample.typical_s,
    }


def lines(found: list[dict[str, Any]]) -> list[str]:
    """One line per link and class."""
    return [
        f"{each['link_bytes_per_s'] / 1e9:g} GB/s, {name} ({facts['steps']} steps): P95 of the "
        f"error {facts['error_p95']:.1%}, of the noise {facts['noise_p95']:.1%}, of the drift "
        f"{facts['drift_p95']:.1%}, bias {facts['bias']:+.1%}, goal {facts['goal']:.1%}"
        f"{'' if facts['met'] else ': MISSED'}"
        for each in found
        for name, facts in [("all", each["all"]), *each["by_shape"].items(), *each["by_k"].items()]
    ]


if __name__ == "__main__":
    main()
