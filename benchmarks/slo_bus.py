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
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.environment import Provenance, note, publish
from benchmarks.slo_bus_score import (
    ALONE,
    FREE,
    HALVES,
    OURS,
    PHASES,
    UNCOORDINATED,
    ceilings,
    fitted,
    goal_lines,
    ratios_of,
    saturation_of,
    scores_of,
)
from benchmarks.slo_cache import Cache, Key, Result, digest_of, engine_digest
from benchmarks.slo_load import Schedule, make_schedule
from benchmarks.slo_run import Entry, run_together
from benchmarks.slo_score import table
from benchmarks.slo_stand import Stand, calibrate
from select_n_core.errors import InputError
from select_n_core.models.cache import cache_directory
from select_n_core.quantities import format_bytes, parse_bytes
from select_n_core.record import load_record

MEMORY = "256MiB"


def measure_bus(arguments: argparse.Namespace, engine: str) -> None:
    """Run the pairs of the seed that are not kept yet, side by side; publish every kept seed."""
    provenance = Provenance()
    kept = Cache(arguments.cache or cache_directory("slo"))
    ground = _ground(arguments, engine)
    if not arguments.again:
        ground.run_missing(kept, arguments.seed)
    seeds = sorted({result.seed for result in kept.all()} | {arguments.seed})
    found = {seed: results for seed in seeds if (results := ground.results(kept, seed))}
    if not found:
        raise InputError("there is no partial result of these pairs, this record and this engine")
    document = ground.document(found) | {"provenance": provenance.document()}
    publish("slo_bus", document, as_json=arguments.json, lines=_lines(document, ground, found))
    if void := [each.void for own in found.values() for each in own.values() if each.void]:
        raise SystemExit(f"{len(void)} pairs are void: {void[0]}; run again when it is idle")


@dataclass(frozen=True, slots=True)
class _Ground:
    """What all pairs have in common.

    Attributes:
        stands: by pair, its policy and conditions. whole: the conditions of a replica alone.
        rate_per_s, alone_per_s: what one replica can serve at best with half the bus, with all.
        phase_s: of each phase.
    """

    whole: Stand
    stands: dict[str, tuple[str, Stand]]
    rate_per_s: float
    alone_per_s: float
    phase_s: float

    def schedule(self, seed: int) -> Schedule:
        """What is offered."""
        return make_schedule(seed, self.rate_per_s, self.phase_s, PHASES)

    def key(self, seed: int) -> Key:
        """What a result must carry to be used."""
        return Key(
            schedule=self.schedule(seed).digest(),
            record=digest_of(self.whole.record.model_dump(mode="json")),
            setup=digest_of({label: stand.facts() for label, (_, stand) in self.stands.items()}),
            engine=engine_digest(),
        )

    def results(self, kept: Cache, seed: int) -> dict[str, Result]:
        """What is kept of a seed, by pair."""
        key = self.key(seed)
        found = {result.policy: result for result in kept.all() if result.key == key}
        return {label: found[label] for label in self.stands if label in found}

    def run_missing(self, kept: Cache, seed: int) -> None:
        """Run the pairs whose results are not kept, side by side."""
        key, nbytes = self.key(seed), self.whole.memory_bytes
        missing = [label for label in self.stands if not kept.load(key, seed, nbytes, label)]
        if not missing:
            return
        schedule = self.schedule(seed)
        note(f"{len(missing)} pairs side by side for {schedule.seconds / 60:.0f} minutes")
        entries = [Entry(label, *self.stands[label]) for label in missing]
        for result in asyncio.run(run_together(entries, schedule, key)):
            kept.save(result)

    def document(self, found: dict[int, dict[str, Result]]) -> dict[str, Any]:
        """The result's JSON, provenance left out."""
        whole = self.whole
        return {
            "compute": "paced",
            "device": whole.record.fingerprint.device,
            "memory_bytes": whole.memory_bytes,
            "bus_bytes_per_s": whole.record.link_bytes_per_s,
            "half_bus_per_s": self.rate_per_s,
            "whole_bus_per_s": self.alone_per_s,
            "phase_s": self.phase_s,
            "ceilings": [asdict(each) for each in ceilings(whole, self.rate_per_s)],
            "seeds": [self._seed(seed, results) for seed, results in found.items()],
        }

    def _seed(self, seed: int, results: dict[str, Result]) -> dict[str, Any]:
        schedule = self.schedule(seed)
        return {
            "seed": seed,
            "pairs": [_pair(result, schedule) for result in results.values()],
            "ratios": ratios_of({label: scores_of(r, schedule) for label, r in results.items()}),
            "saturation": saturation_of(results.get(OURS), schedule, self.whole),
        }


def _ground(arguments: argparse.Namespace, engine: str) -> _Ground:
    path = arguments.record.resolve()
    memory = arguments.memory or [MEMORY]
    if len(memory) > 1:
        raise InputError("--bus takes one --memory")
    whole = Stand(path, load_record(path), parse_bytes(memory[0]), engine=engine)
    half = replace(whole, link_share=0.5)
    rate_per_s = calibrate(half).capacity_per_s
    alone_per_s = calibrate(whole).capacity_per_s
    return _Ground(
        whole=whole,
        stands={
            OURS: ("select_n", replace(whole, rate_per_s=rate_per_s)),
            ALONE: ("select_n", replace(whole, rate_per_s=rate_per_s, board=False)),
            HALVES: ("flexgen", replace(half, rate_per_s=rate_per_s, board=False)),
            FREE: (fitted(replace(half, rate_per_s=rate_per_s)), replace(whole, board=False)),
            UNCOORDINATED: ("flexgen", replace(whole, rate_per_s=alone_per_s, board=False)),
        },
        rate_per_s=rate_per_s,
        alone_per_s=alone_per_s,
        phase_s=arguments.phase_seconds or arguments.requests / (2 * rate_per_s),
    )


def _pair(result: Result, schedule: Schedule) -> dict[str, Any]:
    return {
        "pair": result.policy,
        "plan": result.plan,
        "cannot_start": result.cannot_start,
        "void": result.void,
        "cpu": result.cpu,
        "replica_cores": result.replica_cores,
        "phases": [phase.document() for phase in scores_of(result, schedule)],
    }


def _lines(
    document: dict[str, Any], ground: _Ground, found: dict[int, dict[str, Result]]
) -> list[str]:
    lines = [
        f"two replicas, paced, on one bus of {document['bus_bytes_per_s'] / 1e9:.3g} GB/s, "
        f"{format_bytes(document['memory_bytes'])} of device memory each; the planner's best with "
        f"half the bus is {document['half_bus_per_s']:.2f} requests/s, with all of it "
        f"{document['whole_bus_per_s']:.2f}/s; phases of {document['phase_s']:.0f} s"
    ]
    for own in document["seeds"]:
        schedule = ground.schedule(own["seed"])
        lines += ["", f"seed {own['seed']}"]
        for label, result in found[own["seed"]].items():
            said = result.plan or f"cannot start: {result.cannot_start}"
            lines += table(label, scores_of(result, schedule), said)
        lines += goal_lines(own)
    bounds = ", ".join(
        f"{each['phase']} {each['best_per_s'] / each['halves_per_s']:.2f}x"
        for each in document["ceilings"]
        if each["halves_per_s"]
    )
    lines += ["", f"the planner's ceiling of any way to share the bus, over {HALVES}: {bounds}"]
    return lines
