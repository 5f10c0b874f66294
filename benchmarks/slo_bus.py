"""Two replicas on one bus: even load, four to one, and more than the bus can carry.

    python -m benchmarks.slo --bus --seed 0

Ours with the board that shares the bus out, and ours without it; two `flexgen` each fitted to half
the bus, once confined to it and once free to use what the other leaves; two fitted as if each were
alone. The load is named in what one replica with half the bus can serve at best (the planner's
word): 1 and 1, 1.6 and 0.4, 2.5 and 2.5. Both replicas must keep their targets; goodput is of both
together.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from benchmarks.environment import Provenance, note, publish
from benchmarks.slo_cache import Cache, Key, Result, digest_of, engine_digest
from benchmarks.slo_load import Phase, Schedule, make_schedule
from benchmarks.slo_run import Entry, run_together
from benchmarks.slo_score import PhaseScore, score_phases, table
from benchmarks.slo_stand import TARGETS, Stand, calibrate
from select_n_core.decisions.candidate import evaluate
from select_n_core.decisions.policy import Policy, forced_k
from select_n_core.errors import InputError
from select_n_core.models.cache import cache_directory
from select_n_core.quantities import format_bytes, parse_bytes
from select_n_core.record import load_record

PHASES = (
    Phase("even", load=1.0, second_load=1.0),
    Phase("four-to-one", load=1.6, second_load=0.4),
    Phase("saturated", load=2.5, second_load=2.5),
)
OURS = "select_n"
ALONE = "select_n, no board"
HALVES = "flexgen, half each"
FREE = "flexgen, half each, not confined"
UNCOORDINATED = "flexgen, uncoordinated"
MEMORY = "256MiB"
PAPER = 2.9  # Select-N against uncoordinated FlexGen on one bus
GOALS = {"even": 1.0, "four-to-one": 1.3}
_SPLITS = [share / 100 for share in range(5, 100, 5)]  # of the bus, for the first replica


def measure_bus(arguments: argparse.Namespace, engine: str) -> None:
    """Run the pairs that are not kept yet, side by side, and publish."""
    provenance = Provenance()
    folder = arguments.cache or cache_directory("slo")
    kept = Cache(folder)
    path = arguments.record.resolve()
    record = load_record(path)
    memory = arguments.memory or [MEMORY]
    if len(memory) > 1:
        raise InputError("--bus takes one --memory")
    memory_bytes = parse_bytes(memory[0])
    whole = Stand(path, record, memory_bytes, engine=engine)
    half = replace(whole, link_share=0.5)
    rate_per_s = calibrate(half).capacity_per_s
    alone_per_s = calibrate(whole).capacity_per_s
    phase_s = arguments.phase_seconds or arguments.requests / (2 * rate_per_s)
    schedule = make_schedule(arguments.seed, rate_per_s, phase_s, PHASES)
    stands = {
        OURS: ("select_n", replace(whole, rate_per_s=rate_per_s)),
        ALONE: ("select_n", replace(whole, rate_per_s=rate_per_s, board=False)),
        HALVES: ("flexgen", replace(half, rate_per_s=rate_per_s, board=False)),
        FREE: (_fitted(replace(half, rate_per_s=rate_per_s)), replace(whole, board=False)),
        UNCOORDINATED: ("flexgen", replace(whole, rate_per_s=alone_per_s, board=False)),
    }
    key = Key(
        schedule=schedule.digest(),
        record=digest_of(record.model_dump(mode="json")),
        setup=digest_of({label: stand.facts() for label, (_, stand) in stands.items()}),
        engine=engine_digest(),
    )
    results = {label: kept.load(key, arguments.seed, memory_bytes, label) for label in stands}
    missing = [label for label, result in results.items() if result is None]
    if missing and not arguments.again:
        note(f"{len(missing)} pairs side by side for {schedule.seconds / 60:.0f} minutes")
        entries = [Entry(label, *stands[label]) for label in missing]
        for result in asyncio.run(run_together(entries, schedule, key)):
            kept.save(result)
            results[result.policy] = result
    found = {label: result for label, result in results.items() if result is not None}
    document = {
        "compute": "paced",
        "device": record.fingerprint.device,
        "memory_bytes": memory_bytes,
        "bus_bytes_per_s": record.link_bytes_per_s,
        "seed": arguments.seed,
        "half_bus_per_s": rate_per_s,
        "whole_bus_per_s": alone_per_s,
        "phase_s": phase_s,
        "pairs": [_pair(result, schedule) for result in found.values()],
        "ratios": _ratios({label: _scores(r, schedule) for label, r in found.items()}),
        "ceilings": [asdict(each) for each in ceilings(whole, rate_per_s)],
        "saturation": _saturation(found.get(OURS), schedule, whole),
        "provenance": provenance.document(),
    }
    publish("slo_bus", document, as_json=arguments.json, lines=_lines(document, found, schedule))
    if void := [result.void for result in found.values() if result.void]:
        raise SystemExit(f"{len(void)} pairs are void: {void[0]}; run again when it is idle")


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the planner expects of one phase, were every request typical and every queue endless.

    Attributes:
        share: of the bus for the first replica, at the best split. best_per_s: requests per second
            that both serve then, each at the k that is best with its share.
        halves_per_s: the same of two `flexgen` with half the bus each.
    """

    phase: str
    offered_per_s: float
    share: float
    best_per_s: float
    halves_per_s: float


def ceilings(whole: Stand, rate_per_s: float) -> tuple[Ceiling, ...]:
    """A bound for any way to share the bus, phase by phase; `rate_per_s` is one load."""
    inputs = whole.inputs()

    def served_per_s(share: float, k: int) -> float:
        transfer_s = inputs.latency.transfer_s / share
        latency = replace(inputs.latency, transfer_s=transfer_s)
        there = replace(inputs, latency=latency, forced_k=k, rate_per_s=None)
        return evaluate(there, k).requests_per_s

    best_per_s = {
        share: max(served_per_s(share, k) for k in range(inputs.memory.units + 1))
        for share in _SPLITS
    }
    fitted_k = forced_k(
        Policy.parse("flexgen"), replace(whole, link_share=0.5, rate_per_s=rate_per_s).inputs()
    )
    half_per_s = 0.0 if fitted_k is None else served_per_s(0.5, fitted_k)
    found = []
    for phase in PHASES:
        first_per_s, second_per_s = rate_per_s * phase.load, rate_per_s * phase.second_load
        both_per_s = {
            share: min(first_per_s, best_per_s[share]) + min(second_per_s, best_per_s[other])
            for share, other in zip(_SPLITS, reversed(_SPLITS), strict=True)
        }
        share = max(both_per_s, key=both_per_s.__getitem__)
        halves_per_s = min(first_per_s, half_per_s) + min(second_per_s, half_per_s)
        offered_per_s = first_per_s + second_per_s
        found.append(Ceiling(phase.name, offered_per_s, share, both_per_s[share], halves_per_s))
    return tuple(found)


def _fitted(stand: Stand) -> str:
    """The static policy that streams what `flexgen` does where `stand` says."""
    inputs = stand.inputs()
    k = forced_k(Policy.parse("flexgen"), inputs)
    # Rounded down: floor(L / N) must be k again.
    return f"static:{math.floor(1000 * inputs.memory.units / k) / 1000}" if k else "resident"


def _scores(result: Result, schedule: Schedule) -> tuple[PhaseScore, ...]:
    return score_phases(schedule, TARGETS, result.outcomes, result.samples, result.tokens)


def _pair(result: Result, schedule: Schedule) -> dict[str, Any]:
    return {
        "pair": result.policy,
        "plan": result.plan,
        "cannot_start": result.cannot_start,
        "void": result.void,
        "cpu": result.cpu,
        "replica_cores": result.replica_cores,
        "phases": [phase.document() for phase in _scores(result, schedule)],
    }


def _ratios(scores: dict[str, tuple[PhaseScore, ...]]) -> dict[str, dict[str, float | None]]:
    """Goodput of ours over each other pair's, by phase; None where the other served none."""
    if OURS not in scores:
        return {}
    return {
        ours.name: {
            label: ours.good.met / theirs[index].good.met if theirs[index].good.met else None
            for label, theirs in scores.items()
            if label != OURS
        }
        for index, ours in enumerate(scores[OURS])
    }


def _saturation(result: Result | None, schedule: Schedule, whole: Stand) -> dict[str, float] | None:
    """Summed link bytes of the saturated phase against min(bus, sum of k_max * S / T)."""
    if result is None or not result.samples:
        return None
    index = [phase.name for phase in PHASES].index("saturated")
    settled_s = (index + 0.25) * schedule.phase_s  # the queues fill first
    bytes_per_s = 0.0
    own = [s for s in result.samples if settled_s <= s.at_s <= (index + 1) * schedule.phase_s]
    for _, group in groupby(sorted(own, key=lambda s: s.replica), key=lambda s: s.replica):
        samples = list(group)
        span_s = samples[-1].at_s - samples[0].at_s
        bytes_per_s += (samples[-1].link_bytes - samples[0].link_bytes) / span_s
    inputs = whole.inputs()
    candidates = (evaluate(inputs, k) for k in range(inputs.memory.units + 1))
    most = max((c for c in candidates if c.feasible), key=lambda c: c.k)
    each = most.k * max(inputs.memory.unit_bytes) / most.serving.iteration_s
    bound = min(whole.bus_bytes_per_s, 2 * each)
    return {
        "link_bytes_per_s": bytes_per_s,
        "bound_bytes_per_s": bound,
        "k_max": most.k,
        "share": bytes_per_s / bound,
    }


def _lines(document: dict[str, Any], found: dict[str, Result], schedule: Schedule) -> list[str]:
    lines = [
        f"two replicas, paced, on one bus of {document['bus_bytes_per_s'] / 1e9:.3g} GB/s, "
        f"{format_bytes(document['memory_bytes'])} of device memory each; the planner's best with "
        f"half the bus is {document['half_bus_per_s']:.2f} requests/s, with all of it "
        f"{document['whole_bus_per_s']:.2f}/s; phases of {document['phase_s']:.0f} s"
    ]
    for label, result in found.items():
        said = result.plan or f"cannot start: {result.cannot_start}"
        lines += table(label, _scores(result, schedule), said)
    for phase, ratios in document["ratios"].items():
        shown = ", ".join(
            f"{'-' if ratio is None else f'{ratio:.2f}x'} of {label}"
            for label, ratio in ratios.items()
        )
        goal = f" (goal {GOALS[phase]}x of all but the last)" if phase in GOALS else ""
        lines.append(f"goodput, {phase}: {shown}{goal}; the paper: {PAPER}x of uncoordinated")
    bounds = ", ".join(
        f"{each['phase']} {each['best_per_s'] / each['halves_per_s']:.2f}x"
        for each in document["ceilings"]
        if each["halves_per_s"]
    )
    lines.append(f"the planner's ceiling of any way to share the bus, over {HALVES}: {bounds}")
    if (saturation := document["saturation"]) is not None:
        lines.append(
            f"at saturation {saturation['link_bytes_per_s'] / 1e6:.0f} MB/s over the bus, "
            f"{saturation['share']:.1%} of min(bus, sum of k_max*S/T) (goal 95%)"
        )
    return lines
