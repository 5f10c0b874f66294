"""What happens when something breaks: each fault many times, under load, and what clients see.

The controller is kept down for half a minute, every restart of it killed; a replica is killed; a
machine is lost, and another one comes. Whatever breaks, every request has to end in tokens, in an
error or in a reason; and what is mapped never exceeds the budget.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cluster_break import keep_controller_down, kill_replica
from benchmarks.cluster_load import UNSAID, Load, Seen, Source
from benchmarks.cluster_nodes import Cluster, Node
from benchmarks.cluster_score import spread
from benchmarks.cluster_serve import PacedModel, document
from benchmarks.cluster_stand import MIB, Stand, best, run_served, source
from benchmarks.cluster_store import Store
from benchmarks.cluster_watch import Watch, most_mapped
from benchmarks.environment import note
from benchmarks.slo_load import Phase
from benchmarks.slo_machine import until

TIMES = 20
STREAM_GOAL_S, LEASE_GOAL_S = 0.1, 3.0
DOWN_S = 30.0
_FACTOR = 2
_DEVICE_MIB = 256
_LOAD = 0.4
_BEFORE_S, _AFTER_S = 8.0, 12.0
_BACK_S = 120.0
_BUDGET = 512 * MIB
_NODES = 3


def expendable(cluster: Cluster, model: PacedModel) -> Node:
    """A node with a replica of the model that may be lost: not the head."""
    return next(node for node in cluster.nodes[1:] if node.replicas_of(model.deployment))


def measure(stand: Stand, store: Store) -> dict[str, Any] | None:
    """Every fault as often as it is not there yet."""
    model = stand.model("alpha", _FACTOR, _DEVICE_MIB, replicas=2)
    rate_per_s = model.replicas * _LOAD * best(model)[1]
    times = max(1, TIMES // stand.brief)
    setups = [stand.setup(rate_per_s=rate_per_s, number=number) for number in range(times)]
    missing = [
        (fault, setup)
        for fault in FAULTS
        for setup in setups
        if store.load(f"fault-{fault}", setup) is None
    ]
    if missing and store.measures:
        policy = {"budgets": {"host_memory": _BUDGET}}

        async def run(cluster: Cluster, watch: Watch, _: float) -> None:
            for fault, setup in missing:
                note(f"{fault} {setup['number'] + 1} of {times} ...")
                sources = _sources(stand, model, fault, rate_per_s)
                found = await _once(FAULTS[fault], cluster, watch, model, sources)
                store.save(f"fault-{fault}", setup, found)

        run_served(_NODES, document([model], policy), model.replicas, run, maps=True)
    found = {
        fault: [f for setup in setups if (f := store.load(f"fault-{fault}", setup)) is not None]
        for fault in FAULTS
    }
    return {fault: _summary(each) for fault, each in found.items() if each} or None


@dataclass(frozen=True, slots=True)
class Broken:
    """What a fault did.

    Attributes:
        at_s: when, by `time.perf_counter`.
        is_back: whether all is as it was before.
        facts: for the result.
    """

    at_s: float
    is_back: Callable[[Watch], bool]
    facts: dict[str, float] = field(default_factory=dict)


async def controller_down(_: Cluster, watch: Watch, model: PacedModel) -> Broken:
    """The controller is kept down."""
    before, at_s = watch.epoch, time.perf_counter()
    kills = await keep_controller_down(DOWN_S)
    return Broken(
        at_s,
        lambda seen: seen.epoch > before and len(seen.replicas(model.name)) == model.replicas,
        {"kills": kills},
    )


async def replica_killed(cluster: Cluster, watch: Watch, model: PacedModel) -> Broken:
    """A replica's process is killed."""
    node = expendable(cluster, model)
    lost = _names_on(watch, node)
    at_s = time.perf_counter()
    kill_replica(node.replicas_of(model.deployment)[0])
    return Broken(at_s, lambda seen: _is_whole(seen, model, lost))


async def node_lost(cluster: Cluster, watch: Watch, model: PacedModel) -> Broken:
    """A machine with a replica loses its power; another machine joins when that was noticed."""
    node = expendable(cluster, model)
    lost = _names_on(watch, node)
    at_s = time.perf_counter()
    await asyncio.to_thread(cluster.kill, node)
    free_s = await watch.until(lambda seen: not lost & _names(seen, model), _BACK_S)
    await asyncio.to_thread(cluster.add)
    return Broken(at_s, lambda seen: _is_whole(seen, model, lost), {"leases_free_s": free_s})


Fault = Callable[[Cluster, Watch, PacedModel], Awaitable[Broken]]
FAULTS: dict[str, Fault] = {
    "controller-down": controller_down,
    "replica-killed": replica_killed,
    "node-lost": node_lost,
}


def _sources(stand: Stand, model: PacedModel, fault: str, rate_per_s: float) -> list[Source]:
    """A steady load around the fault."""
    seconds = _BEFORE_S + _AFTER_S + (DOWN_S if fault == "controller-down" else 0.0)
    schedule = stand.schedule(0, rate_per_s, seconds * stand.brief, [Phase("steady")])
    return [source(model, schedule)]


async def _once(
    fault: Fault,
    cluster: Cluster,
    watch: Watch,
    model: PacedModel,
    sources: Sequence[Source],
) -> dict[str, Any]:
    """One fault amid a load, and the way back."""
    origin_s = time.perf_counter() + 0.5
    mapped = len(watch.watched.mapped)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(Load(sources, origin_s).run())
        await until(origin_s + _BEFORE_S)
        broken = await fault(cluster, watch, model)
        await watch.until(broken.is_back, _BACK_S)
        back_s = time.perf_counter() - broken.at_s
    told = _told(running.result(), broken.at_s - origin_s)
    most = most_mapped(watch.watched.mapped[mapped:])
    return broken.facts | told | {"back_s": back_s, "most_mapped_bytes": most}


def _told(seen: Seen, at_s: float) -> dict[str, Any]:
    """How requests ended, those apart that the fault broke off."""
    failed = [each for each in seen.outcomes if each.admitted and each.ended != "length"]
    broken_off = [each for each in failed if each.at_s < at_s <= each.ended_s]
    return {
        "offered": len(seen.outcomes),
        "refused": sum(not each.admitted for each in seen.outcomes),
        "failed": len(failed),
        "broken_off_s": [each.ended_s - at_s for each in broken_off],
        "unsaid": sum(each.ended in UNSAID for each in seen.outcomes),
        "ended": Counter(each.ended for each in seen.outcomes),
    }


def _summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all repetitions of one fault."""
    return {
        "times": len(found),
        "offered": sum(each["offered"] for each in found),
        "refused": sum(each["refused"] for each in found),
        "failed": sum(each["failed"] for each in found),
        "unsaid": sum(each["unsaid"] for each in found),
        "broken_off_s": spread([s for each in found for s in each["broken_off_s"]]),
        "back_s": spread([each["back_s"] for each in found]),
        "leases_free_s": spread([e["leases_free_s"] for e in found if "leases_free_s" in e]),
        "kills": sum(each.get("kills", 0) for each in found),
        "most_mapped_bytes": max(each["most_mapped_bytes"] for each in found),
        "budget_bytes": _BUDGET,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    said = []
    for fault, each in found.items():
        said.append(
            f"{fault}, {each['times']} times: {each['offered']} requests, {each['refused']} "
            f"refused, {each['failed']} let in and failed, {each['unsaid']} without a word (goal "
            f"0); mapped at most {each['most_mapped_bytes'] / MIB:.0f} of "
            f"{each['budget_bytes'] / MIB:.0f} MiB on a node"
        )
        spans = {
            f"broken streams ended (goal {STREAM_GOAL_S * 1e3:.0f} ms)": each["broken_off_s"],
            f"leases free (goal {LEASE_GOAL_S:g} s)": each["leases_free_s"],
            "all as before": each["back_s"],
        }
        told = [
            f"{what}: p50 {span['p50']:.2f} s, max {span['max']:.2f} s"
            for what, span in spans.items()
            if span["count"]
        ]
        said.append(f"  {'; '.join(told)}")
    return said


def _names(watch: Watch, model: PacedModel) -> set[str]:
    return {each.replica for each in watch.replicas(model.name)}


def _names_on(watch: Watch, node: Node) -> set[str]:
    return {each.replica for each in watch.replicas() if each.node == node.id}


def _is_whole(watch: Watch, model: PacedModel, lost: set[str]) -> bool:
    names = _names(watch, model)
    return len(names) == model.replicas and not names & lost
