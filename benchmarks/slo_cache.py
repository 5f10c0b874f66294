"""Partial results of the SLO benchmark: a file per (seed, memory, policy), reused while it holds.

A result holds for the very schedule it was offered, the record it was paced by, the replica's
configuration and the engine's source. Anything else is measured again; so is a void run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.environment import ROOT, note
from benchmarks.slo_score import Outcome, Sample

_ENGINE = ("select_n_core/**/*.py", "benchmarks/slo_run.py")


class Key(BaseModel):
    """What a result is valid for, as digests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schedule: str
    record: str
    setup: str
    engine: str


class Result(BaseModel):
    """One policy's run over a whole schedule, as it was observed.

    Attributes:
        plan: the engine's plan line; None where it could not start, and `cannot_start` says why.
        outcomes: one per arrival. samples: of every replica. tokens: received in each phase.
        cpu: share of the whole machine in each phase, every process on it.
        replica_cores: cores that the first replica used; None in this process.
        lag_s: how late the driver was at worst, in each phase.
        void: why the run counts for nothing; None where it counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Key
    seed: int
    memory_bytes: int
    policy: str
    plan: str | None
    cannot_start: str | None = None
    outcomes: tuple[Outcome, ...] = ()
    samples: tuple[Sample, ...] = ()
    tokens: tuple[int, ...] = ()
    cpu: tuple[float, ...] = ()
    replica_cores: float | None = None
    lag_s: tuple[float, ...] = ()
    void: str | None = None

    def k_by_second(self) -> list[int]:
        """k of the first replica at the begin of every second."""
        seconds: dict[int, int] = {}
        for sample in self.samples:
            if sample.replica == 0:
                seconds.setdefault(int(sample.at_s), sample.k)
        return list(seconds.values())

    def machine_line(self) -> str:
        """How busy the machine and the replica were, for people."""
        busy = ", ".join(f"{share:.0%}" for share in self.cpu)
        replica = self.replica_cores
        cores = "" if replica is None else f"; the replica {replica:.1%} of a core"
        late = f"; driver late by {max(self.lag_s, default=0.0) * 1e3:.0f} ms at worst"
        void = f"; VOID: {self.void}" if self.void else ""
        return f"CPU of the machine by phase {busy}{cores}{late}{void}"


class Cache:
    """The folder of partial results."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def load(self, key: Key, seed: int, memory_bytes: int, policy: str) -> Result | None:
        """The result of this run if there is one that holds and counts."""
        path = self._path(key, seed, memory_bytes, policy)
        result = _read(path) if path.exists() else None
        return result if result is not None and result.key == key and not result.void else None

    def save(self, result: Result) -> None:
        """Keep a result, whole or not at all."""
        path = self._path(result.key, result.seed, result.memory_bytes, result.policy)
        part = path.with_suffix(".part")
        part.write_text(result.model_dump_json(), encoding="utf-8")
        part.replace(path)

    def all(self) -> Iterator[Result]:
        """Every readable result, of whatever schedule, record or engine."""
        for path in sorted(self._directory.glob("*.json")):
            if (result := _read(path)) is not None:
                yield result

    def _path(self, key: Key, seed: int, memory_bytes: int, policy: str) -> Path:
        name = re.sub(r"[^A-Za-z0-9.]+", "_", policy)
        return self._directory / f"{key.schedule}-seed{seed}-{memory_bytes}-{name}.json"


def _read(path: Path) -> Result | None:
    try:
        return Result.model_validate_json(path.read_bytes())
    except ValidationError:
        note(f"{path.name} is not a partial result of this version: it is measured again")
        return None


def digest_of(facts: Mapping[str, Any]) -> str:
    """Names a mapping of plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def engine_digest(root: Path = ROOT) -> str:
    """Names the source that a run depends on, committed or not."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in _ENGINE for path in root.glob(pattern)):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
