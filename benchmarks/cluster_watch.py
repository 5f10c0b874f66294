"""Watches a cluster from beside it: what its controller says of every replica, and what the kernel
has mapped. It watches as an ingress does, so that what it sees is as old as what they decide on."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import psutil

from benchmarks.cluster_nodes import Cluster
from benchmarks.cluster_score import Point
from deployments.control.cache import SnapshotCache
from deployments.control.messages import ReplicaReport
from deployments.control.remote import RemoteController
from select_n_core.memory.audit import mapped_files

MAX_CPU = 0.8  # of the machine: beyond it paced engines are late for reasons of their own
_LOOK_S = 0.05
_MAPS_EVERY = 4  # looks


class Look(NamedTuple):
    """A replica as the controller's snapshot has it, at a moment since the watch's begin.

    Attributes:
        age_s: of the facts: since the replica measured them.
    """

    at_s: float
    replica: str
    model: str
    node: str
    k: int
    lease_bytes: int
    mirrored_bytes: int
    admitted: int
    running: int
    waiting: int
    age_s: float


class Mapped(NamedTuple):
    """What the engines of a deployment have mapped on a node; what they share counts once."""

    at_s: float
    node: str
    deployment: str
    nbytes: int


@dataclass(slots=True)
class Watched:
    """Everything that a watch has seen; `cpu` is the share of the machine in each second."""

    looks: list[Look] = field(default_factory=list)
    mapped: list[Mapped] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def points(self, value: str, model: str) -> list[Point]:
        """One field of the looks at a model with one replica."""
        return [
            Point(each.at_s, getattr(each, value)) for each in self.looks if each.model == model
        ]

    def mapped_points(self, deployment: str) -> list[Point]:
        """What one deployment had mapped, of all nodes."""
        sums: dict[float, int] = {}
        for each in self.mapped:
            if each.deployment == deployment:
                sums[each.at_s] = sums.get(each.at_s, 0) + each.nbytes
        return [Point(at_s, nbytes) for at_s, nbytes in sums.items()]

    @property
    def mean_cpu(self) -> float:
        """Of the whole machine, whoever used it."""
        return fmean(self.cpu or [0.0])

    @property
    def void(self) -> str | None:
        """Why what was measured counts for nothing; None where it counts."""
        busy = self.mean_cpu > MAX_CPU
        return f"the machine was {self.mean_cpu:.0%} busy" if busy else None


class Watch:
    """Watches while it is entered.

    Args:
        maps: whether the kernel is asked too, which costs time of a core.

    Attributes:
        watched: so far, in times since it began.
    """

    watched: Watched
    _origin_s: float

    def __init__(self, cluster: Cluster, *, maps: bool = False) -> None:
        self.begin(time.perf_counter())
        self._cluster = cluster
        self._maps = maps
        self._cache = SnapshotCache(RemoteController())
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Watch:
        runs = (self._cache.run(), self._look(), self._watch_cpu())
        self._tasks = [asyncio.create_task(run) for run in runs]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    def replicas(self, model: str | None = None) -> list[ReplicaReport]:
        """Those that the controller knows now, of one model or all."""
        snapshot = self._cache.snapshot
        known = [] if snapshot is None else list(snapshot.replicas.values())
        return [each for each in known if model in (None, each.model)]

    @property
    def epoch(self) -> int:
        """Of the controller that was heard last; 0 is none."""
        return 0 if self._cache.snapshot is None else self._cache.snapshot.epoch

    async def until(self, holds: Callable[[Watch], bool], timeout_s: float = 120.0) -> float:
        """Wait until something holds; seconds that it took. Raises TimeoutError."""
        began_s = time.perf_counter()
        async with asyncio.timeout(timeout_s):
            while True:
                if holds(self):
                    return time.perf_counter() - began_s
                await asyncio.sleep(0.02)

    def begin(self, origin_s: float) -> None:
        """Forget what was seen so far; times are since `origin_s` of `time.perf_counter` now."""
        self._origin_s = origin_s
        self.watched = Watched()

    async def _look(self) -> None:
        for number in itertools.count():
            at_s, now_s = round(time.perf_counter() - self._origin_s, 3), time.time()
            self.watched.looks += [_look(each, at_s, now_s) for each in self.replicas()]
            if self._maps and number % _MAPS_EVERY == 0:
                mapped = await asyncio.to_thread(mapped_by, self._cluster, at_s)
                self.watched.mapped += mapped
            await asyncio.sleep(_LOOK_S)

    async def _watch_cpu(self) -> None:
        psutil.cpu_percent()
        while True:
            await asyncio.sleep(1.0)
            self.watched.cpu.append(psutil.cpu_percent() / 100)


def _look(report: ReplicaReport, at_s: float, now_s: float) -> Look:
    return Look(
        at_s=at_s,
        replica=report.replica,
        model=report.model,
        node=report.node,
        k=report.k,
        lease_bytes=report.lease_bytes,
        mirrored_bytes=report.mirrored_bytes,
        admitted=report.admitted,
        running=report.running,
        waiting=report.waiting,
        age_s=max(0.0, now_s - report.measured_at_s),
    )


def mapped_by(cluster: Cluster, at_s: float = 0.0) -> list[Mapped]:
    """What the kernel has mapped for every deployment on every node, now."""
    found = []
    for node in list(cluster.nodes):  # others may come and go meanwhile
        files: dict[tuple[str, str], int] = {}
        for engine in node.engines():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                for file, mapped in mapped_files(engine.engine).items():
                    files[engine.deployment, file] = mapped.nbytes
        sums: dict[str, int] = {}
        for (deployment, _), nbytes in files.items():
            sums[deployment] = sums.get(deployment, 0) + nbytes
        found += [Mapped(at_s, node.id, name, nbytes) for name, nbytes in sums.items()]
    return found


def most_mapped(mapped: Sequence[Mapped]) -> int:
    """The most that was mapped on any node at one look."""
    sums: dict[tuple[float, str], int] = {}
    for each in mapped:
        sums[each.at_s, each.node] = sums.get((each.at_s, each.node), 0) + each.nbytes
    return max(sums.values(), default=0)


def admitted_between(looks: Sequence[Look], begin_s: float, end_s: float) -> dict[str, int]:
    """Requests that each replica let in between two moments, by its name."""
    found = {}
    for replica in {each.replica for each in looks}:
        own = [each for each in looks if each.replica == replica]
        before = [each.admitted for each in own if each.at_s <= begin_s]
        until_end = [each.admitted for each in own if each.at_s <= end_s]
        if before and until_end:
            found[replica] = until_end[-1] - before[-1]
    return found
