"""What an ingress' decision costs beside the routing call itself, over sixteen replicas.

The snapshot is a real one, of two replicas under load, with each of them eight times in it under
names of their own; as many calls are under way as sixteen replicas hold. Only the decision is
timed, in this process, on a machine that has nothing else to do; beside it stands the time of the
core that it takes, in which nobody else's work is.
"""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.cluster_load import Load
from benchmarks.cluster_nodes import Cluster
from benchmarks.cluster_score import quantile
from benchmarks.cluster_serve import PacedModel, document
from benchmarks.cluster_stand import Stand, best, run_served, source
from benchmarks.cluster_store import Store
from benchmarks.cluster_watch import Watch
from benchmarks.slo_load import OUTPUT, PROMPT, Phase
from deployments.calls import Call, Route
from deployments.control.cache import SnapshotCache
from deployments.control.messages import Changes, ReplicaReport
from deployments.control.remote import RemoteController
from deployments.routing.pilot import Pilot

REPLICAS = 16
GOAL_S = 2e-3
_FACTOR = 1
_DEVICE_MIB = 256
UNDER_WAY = 8 * REPLICAS
_CALLS = 20_000
_LOAD_S = 20.0


def measure(stand: Stand, store: Store) -> dict[str, Any] | None:
    """Time the decision, if that was not done."""
    model = stand.model("alpha", _FACTOR, _DEVICE_MIB, replicas=2, spread=False)
    setup = stand.setup(replicas=REPLICAS, under_way=UNDER_WAY)
    return store.part("admission", setup, lambda: _run(stand, model))


def _run(stand: Stand, model: PacedModel) -> dict[str, Any]:
    rate_per_s = model.replicas * 0.7 * best(model)[1]
    schedule = stand.schedule(0, rate_per_s, _LOAD_S * stand.brief, [Phase("steady")])

    async def run(_: Cluster, watch: Watch, origin_s: float) -> list[ReplicaReport]:
        load = asyncio.create_task(Load([source(model, schedule)], origin_s).run())
        await asyncio.sleep(_LOAD_S / 2)
        reports = watch.replicas(model.name)
        await load
        return reports

    reports = run_served(1, document([model], {}), model.replicas, run)
    took = decisions(model, reports, _CALLS // stand.brief)
    wall_s, core_s = [each.wall_s for each in took], [each.core_s for each in took]
    return {
        "replicas": REPLICAS,
        "under_way": UNDER_WAY,
        "calls": len(took),
        "p50_s": quantile(wall_s, 0.5),
        "p99_s": quantile(wall_s, 0.99),
        "max_s": max(wall_s),
        "core_p99_s": quantile(core_s, 0.99),
        "void": None,
    }


class Took(NamedTuple):
    """Seconds of one decision: as they passed, and those of the core that computed it."""

    wall_s: float
    core_s: float


def decisions(model: PacedModel, reports: list[ReplicaReport], calls: int) -> list[Took]:
    """What each decision over so many replicas took."""
    many = tuple(
        replace(reports[number % len(reports)], replica=f"{number}") for number in range(REPLICAS)
    )
    cache = SnapshotCache(RemoteController())
    now_s = max(each.measured_at_s for each in many)
    pilot = Pilot("benchmark", model.name, model.targets, cache, time_of_day=lambda: now_s)
    call = Call("0", (1,) * PROMPT.mean, max_tokens=OUTPUT.mean)
    took = []
    gc.collect()
    gc.disable()
    try:
        with ExitStack() as under_way:
            for number in range(calls):
                # As often as snapshots come: each is looked at anew.
                if number % 10 == 0:
                    cache.take(Changes(1, number + 1, True, True, 0, reports=many))
                began_s, core_s = time.perf_counter(), time.thread_time()
                route = pilot.choose(call)
                core_s = time.thread_time() - core_s
                took.append(Took(time.perf_counter() - began_s, core_s))
                if number < UNDER_WAY and isinstance(route, Route):
                    under_way.enter_context(pilot.sending(call, route))
    finally:
        gc.enable()
    return took[UNDER_WAY:]


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    return [
        f"admission: an ingress' decision over {found['replicas']} replicas with "
        f"{found['under_way']} calls under way takes p50 {1e3 * found['p50_s']:.2f} ms, "
        f"p99 {1e3 * found['p99_s']:.2f} ms (goal {1e3 * GOAL_S:g} ms) beside the routing call, "
        f"at most {1e3 * found['max_s']:.2f} ms of {found['calls']}; p99 "
        f"{1e3 * found['core_p99_s']:.2f} ms of a core"
    ]
