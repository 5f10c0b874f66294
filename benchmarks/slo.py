"""Is the promise kept, and what is it worth? Every policy under one load that changes six times.

    python -m benchmarks.slo --seed 0           (both memory sizes; about half an hour)
    python -m benchmarks.slo --again            (score and draw anew what is there)
    python -m benchmarks.slo --bus              (two replicas on one bus; see benchmarks/slo_bus.py)

Phases of equal length: steady; bursts of 5x for 10 s; long prompts; the link at one half of its
bandwidth; a second replica with as much load on the same bus; steady again. Compute is *paced* by
a committed record. Policies run side by side, each an engine process on a bus of its own, on the
same seed and memory. What is measured is kept per (seed, memory, policy) and used again while
schedule, record, configuration and engine are the same; the result holds every seed that is there.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.environment import ROOT, Provenance, note, publish
from benchmarks.slo_cache import Cache, Key, Result, digest_of, engine_digest
from benchmarks.slo_changes import change_line, changes
from benchmarks.slo_load import PHASES, Schedule, make_schedule, phases_named
from benchmarks.slo_plot import draw
from benchmarks.slo_run import MAX_CPU, Entry, run_together
from benchmarks.slo_score import PhaseScore, goal_lines, goals, score_phases, table
from benchmarks.slo_stand import TARGETS, Calibration, Stand, calibrate, ceiling_line, ceilings
from select_n_core.decisions.policy import Policy
from select_n_core.errors import InputError
from select_n_core.models.cache import cache_directory
from select_n_core.quantities import format_bytes, parse_bytes
from select_n_core.record import load_record

RECORD = ROOT / "benchmarks" / "records" / "smollm2-135m-instruct.json"
POLICIES = (
    "select_n",
    "flexgen",
    "static:2.5",
    "static:3",
    "static:4",
    "static:6",
    "fetch_all",
    "resident",
)
MEMORY = ("320MiB", "256MiB")
REQUESTS = 500  # offered in each phase, at least
LIMIT_S = 40 * 60.0  # all policies of one seed


def main(argv: Sequence[str] | None = None, *, engine: str = "process") -> None:
    """Measure as `argv` says; `engine` is where engines live, see `ModelConfig.engine`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="+", metavar="POLICY", help=" ".join(POLICIES))
    parser.add_argument("--phases", nargs="+", choices=[phase.name for phase in PHASES])
    parser.add_argument("--memory", nargs="+", help=f"of the device: {' '.join(MEMORY)}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--requests", type=int, default=REQUESTS, help="in each phase, at least")
    length.add_argument("--phase-seconds", type=float, help="however many requests that makes")
    parser.add_argument("--together", type=int, help="policies at a time; all of them")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--cache", type=Path, help="of partial results")
    parser.add_argument("--again", action="store_true", help="run nothing, score what is there")
    parser.add_argument("--bus", action="store_true", help="two replicas on one bus")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)

    try:
        if arguments.bus:
            for name in ("policies", "phases", "together"):
                if getattr(arguments, name) is not None:
                    raise InputError(f"--{name} has no effect on --bus; remove one of the two")
            from benchmarks.slo_bus import measure_bus

            measure_bus(arguments, engine)
        else:
            measure(arguments, engine)
    except InputError as error:
        parser.error(str(error))


def measure(arguments: argparse.Namespace, engine: str) -> None:
    """Run what is missing, then score and publish everything that is there."""
    provenance = Provenance()
    plan = Plan(arguments, engine)
    kept = Cache(arguments.cache or cache_directory("slo"))
    if not arguments.again:
        plan.run_missing(kept)
    results = plan.valid(kept)
    if not results:
        raise InputError("there is no partial result of this schedule, record and engine")
    document = plan.document(results) | {"provenance": provenance.document()}
    publish("slo", document, as_json=arguments.json, lines=document_lines(document, plan, results))
    draw(document, environment.RESULTS / "slo.png")
    if void := [run for run in document["runs"] if run["void"]]:
        raise SystemExit(f"{len(void)} runs are void: {void[0]['void']}; run again when it is idle")


class Plan:
    """What is asked for: memory sizes with their loads, schedules, policies."""

    def __init__(self, arguments: argparse.Namespace, engine: str) -> None:
        self.seed: int = arguments.seed
        policies = [str(Policy.parse(text)) for text in arguments.policies or POLICIES]
        self.policies = tuple(dict.fromkeys(policies))
        self.together = len(policies) if arguments.together is None else arguments.together
        if self.together < 1:
            raise InputError(f"--together must be 1 or more, got {self.together}")
        self._phases = PHASES if arguments.phases is None else phases_named(arguments.phases)
        self._requests: int = arguments.requests
        self._phase_s: float | None = arguments.phase_seconds
        self._path: Path = arguments.record.resolve()
        self.record = load_record(self._path)
        self._engine = engine
        self.memory = tuple(dict.fromkeys(map(parse_bytes, arguments.memory or MEMORY)))
        self._engine_digest = engine_digest()
        self._record_digest = digest_of(self.record.model_dump(mode="json"))
        self.load = cache(self._load)

    def _load(self, memory_bytes: int) -> Calibration:
        return calibrate(self._stand(memory_bytes, None))

    def _stand(self, memory_bytes: int, rate_per_s: float | None) -> Stand:
        return Stand(self._path, self.record, memory_bytes, rate_per_s, self._engine)

    def stand(self, memory_bytes: int) -> Stand:
        """The conditions of a memory size, its mean load known."""
        return self._stand(memory_bytes, self.load(memory_bytes).rate_per_s)

    def schedule(self, seed: int, memory_bytes: int) -> Schedule:
        """What is offered."""
        rate_per_s = self.load(memory_bytes).rate_per_s
        phase_s = self._requests / rate_per_s if self._phase_s is None else self._phase_s
        return make_schedule(seed, rate_per_s, phase_s, self._phases)

    def key(self, seed: int, memory_bytes: int) -> Key:
        """What a result must carry to be used."""
        return Key(
            schedule=self.schedule(seed, memory_bytes).digest(),
            record=self._record_digest,
            setup=digest_of(self.stand(memory_bytes).facts()),
            engine=self._engine_digest,
        )

    def run_missing(self, kept: Cache) -> None:
        """Run the policies whose results are not kept, side by side."""
        rounds: list[tuple[int, Sequence[str]]] = []
        for memory_bytes in self.memory:
            key = self.key(self.seed, memory_bytes)
            missing = [
                policy
                for policy in self.policies
                if kept.load(key, self.seed, memory_bytes, policy) is None
            ]
            rounds += [
                (memory_bytes, missing[at : at + self.together])
                for at in range(0, len(missing), self.together)
            ]
            note(self.load(memory_bytes).line(memory_bytes))
        expected_s = sum(self.schedule(self.seed, m).seconds + 60 for m, _ in rounds)
        note(f"{len(rounds)} rounds of policies side by side, about {expected_s / 60:.0f} minutes")
        if expected_s > LIMIT_S:
            note(f"that is more than the {LIMIT_S / 60:.0f} minutes a seed may take")
        for memory_bytes, policies in rounds:
            schedule = self.schedule(self.seed, memory_bytes)
            note(
                f"seed {self.seed}, {format_bytes(memory_bytes)}, {len(schedule.phases)} phases of "
                f"{schedule.phase_s:.0f} s: {', '.join(policies)}"
            )
            stand = self.stand(memory_bytes)
            entries = [Entry(policy, policy, stand) for policy in policies]
            key = self.key(self.seed, memory_bytes)
            for result in asyncio.run(run_together(entries, schedule, key)):
                kept.save(result)

    def valid(self, kept: Cache) -> list[Result]:
        """Every kept result of these phases, record, configuration and engine, of any seed."""
        found = [
            result
            for result in kept.all()
            if result.memory_bytes in self.memory
            and result.policy in self.policies
            and result.key == self.key(result.seed, result.memory_bytes)
        ]
        order = {policy: place for place, policy in enumerate(self.policies)}
        place = {memory_bytes: place for place, memory_bytes in enumerate(self.memory)}
        return sorted(found, key=lambda r: (r.seed, place[r.memory_bytes], order[r.policy]))

    def scores(self, result: Result) -> tuple[PhaseScore, ...]:
        """The phases of one result."""
        schedule = self.schedule(result.seed, result.memory_bytes)
        return score_phases(schedule, TARGETS, result.outcomes, result.samples, result.tokens)

    def document(self, results: Sequence[Result]) -> dict[str, Any]:
        """The result's JSON, provenance left out."""
        return {
            "compute": "paced",
            "record": _shown(self._path),
            "device": self.record.fingerprint.device,
            "bus_bytes_per_s": self.record.link_bytes_per_s,
            "targets": {"ttft_s": TARGETS.ttft_s, "tpot_s": TARGETS.tpot_s},
            "max_cpu": MAX_CPU,
            "loads": [self._load_document(memory_bytes) for memory_bytes in self.memory],
            "runs": [self._run_document(result) for result in results],
            "goals": self._goals(results),
        }

    def _load_document(self, memory_bytes: int) -> dict[str, Any]:
        load = self.load(memory_bytes)
        schedule = self.schedule(self.seed, memory_bytes)
        return {
            "memory_bytes": memory_bytes,
            "best_static_k": load.k,
            "best_static_per_s": load.capacity_per_s,
            "rate_per_s": load.rate_per_s,
            "phase_s": schedule.phase_s,
            "phases": [phase.name for phase in schedule.phases],
            "ceilings": [asdict(each) for each in ceilings(self.stand(memory_bytes), schedule)],
        }

    def load_lines(self, memory_bytes: int) -> list[str]:
        """The load of a memory size and what it can come to, for people."""
        schedule = self.schedule(self.seed, memory_bytes)
        return [
            self.load(memory_bytes).line(memory_bytes),
            ceiling_line(ceilings(self.stand(memory_bytes), schedule)),
        ]

    def _run_document(self, result: Result) -> dict[str, Any]:
        return {
            "seed": result.seed,
            "memory_bytes": result.memory_bytes,
            "policy": result.policy,
            "plan": result.plan,
            "cannot_start": result.cannot_start,
            "void": result.void,
            "cpu": result.cpu,
            "replica_cores": result.replica_cores,
            "lag_s": result.lag_s,
            "phases": [phase.document() for phase in self.scores(result)],
            "changes": [
                asdict(each)
                for each in changes(self.schedule(result.seed, result.memory_bytes), result.samples)
            ],
            "k_by_second": result.k_by_second() if result.policy == "select_n" else [],
        }

    def _goals(self, results: Sequence[Result]) -> list[dict[str, Any]]:
        found = []
        for seed, memory_bytes in dict.fromkeys((r.seed, r.memory_bytes) for r in results):
            scores = {
                r.policy: self.scores(r)
                for r in results
                if (r.seed, r.memory_bytes) == (seed, memory_bytes) and r.void is None
            }
            found.append({"seed": seed, "memory_bytes": memory_bytes} | goals(scores))
        return found


def document_lines(document: dict[str, Any], plan: Plan, results: Sequence[Result]) -> list[str]:
    """Everything for people: loads, every policy's phases, and the goals."""
    lines = [
        f"paced by {document['record']} ({document['device']}), "
        f"bus {document['bus_bytes_per_s'] / 1e9:.3g} GB/s, TTFT {TARGETS.ttft_s:g} s, "
        f"TPOT {TARGETS.tpot_s * 1e3:g} ms; shares with their Wilson lower bounds at 95%; "
        "the joining replica's requests count with the first one's",
        *(line for memory_bytes in plan.memory for line in plan.load_lines(memory_bytes)),
    ]
    for goal in document["goals"]:
        seed, memory_bytes = goal["seed"], goal["memory_bytes"]
        own = [r for r in results if (r.seed, r.memory_bytes) == (seed, memory_bytes)]
        lines += ["", f"seed {seed}, {format_bytes(memory_bytes)}"]
        for result in own:
            said = result.plan or f"cannot start: {result.cannot_start}"
            lines += table(result.policy, plan.scores(result), said)
            if found := changes(plan.schedule(seed, memory_bytes), result.samples):
                lines.append(f"  {change_line(found)}")
            lines.append(f"  {result.machine_line()}")
        lines += goal_lines(goal)
    return lines


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


if __name__ == "__main__":
    main()
