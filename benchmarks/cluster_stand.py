"""The conditions that the cluster benchmark's sections share: record, models, load of one."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.cluster_load import Source
from benchmarks.cluster_nodes import Cluster, cluster
from benchmarks.cluster_serve import PacedModel, deploy, scaled
from benchmarks.cluster_watch import Watch
from benchmarks.slo_cache import digest_of
from benchmarks.slo_load import Phase, Schedule, make_schedule
from benchmarks.slo_machine import quiet
from benchmarks.slo_stand import TARGETS
from select_n_core.decisions.candidate import evaluate
from select_n_core.record import PerformanceRecord, load_record
from select_n_core.slo import SLO

MIB = 1 << 20
_SETTLE_S = 3.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stand:
    """What every section is given.

    Attributes:
        record_path: of the record that is scaled. scratch: a folder for scaled ones.
        seed: of every load.
        brief: divides how long everything lasts, for a trial; 1 is a measurement.
    """

    record_path: Path
    scratch: Path
    seed: int = 0
    brief: int = 1

    @property
    def record(self) -> PerformanceRecord:
        """The record, not scaled."""
        return load_record(self.record_path)

    def model(self, name: str, factor: int, device_mib: int, **facts: Any) -> PacedModel:
        """A model paced by the record scaled by `factor`.

        Args:
            device_mib: for a factor of 1; bytes and times that the record knows are scaled alike.
            facts: see `PacedModel`.
        """
        record = scaled(self.record, factor)
        # Models of one record are one model, whose mirrors are shared.
        own = record.fingerprint.model_copy(update={"model_hash": name})
        record = record.model_copy(update={"fingerprint": own})
        path = self.scratch / f"{name}-{factor}.json"
        if not path.exists():
            record.save(path)
        targets = SLO(tpot_s=TARGETS.tpot_s * factor, ttft_s=TARGETS.ttft_s * factor)
        given = {
            "source": record.fingerprint.model,
            "host_bytes": 1024 * MIB * factor,
            "targets": targets,
        } | facts
        return PacedModel(name, record_path=path, record=record,
                          device_bytes=device_mib * MIB * factor, **given)  # fmt: skip

    def setup(self, **facts: Any) -> dict[str, Any]:
        """What a result depends on, for the store."""
        record = digest_of(self.record.model_dump(mode="json"))
        return {"record": record, "seed": self.seed, "brief": self.brief} | facts

    def schedule(
        self, index: int, rate_per_s: float, phase_s: float, phases: Sequence[Phase]
    ) -> Schedule:
        """Of the source number `index`; each has draws of its own."""
        return make_schedule(1000 * self.seed + index, rate_per_s, phase_s / self.brief, phases)


def best(model: PacedModel) -> tuple[int, float]:
    """(k, requests per second) of the k that serves the most typical requests."""
    rates = capacities(model)
    k = max(range(len(rates)), key=rates.__getitem__)
    return k, rates[k]


def capacities(model: PacedModel) -> list[float]:
    """Typical requests per second that one replica serves at every k, by the planner."""
    inputs = replace(model.inputs(), forced_k=None, rate_per_s=None)
    return [evaluate(inputs, k).requests_per_s for k in range(inputs.memory.units + 1)]


def source(model: PacedModel, schedule: Schedule, **facts: Any) -> Source:
    """Requests for `model` under its own targets; see `Source`."""
    given = {
        "name": model.name,
        "ttft_s": model.targets.ttft_s,
        "tpot_s": model.targets.tpot_s,
    } | facts
    return Source(model=model.name, schedule=schedule, **given)


def run_served(
    nodes: int,
    config: dict[str, Any],
    replicas: int,
    run: Callable[[Cluster, Watch, float], Awaitable[T]],
    *,
    maps: bool = False,
) -> T:
    """Serve `config` on so many nodes, and run something beside it.

    Args:
        replicas: that the controller must know before it begins; 0 without one.
        run: gets the cluster, a watch, and when both begin, by `time.perf_counter`.
        maps: see `Watch`.
    """

    async def begin(made: Cluster) -> T:
        await quiet()
        # As engines do: a full collection would stop the clock for a third of a second.
        gc.collect()
        gc.freeze()
        try:
            async with Watch(made, maps=maps) as watch:
                await watch.until(lambda seen: len(seen.replicas()) >= replicas)
                origin_s = time.perf_counter() + _SETTLE_S
                watch.begin(origin_s)
                return await run(made, watch, origin_s)
        finally:
            gc.unfreeze()

    with cluster(nodes) as made:
        deploy(config)
        return asyncio.run(begin(made))
