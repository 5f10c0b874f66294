"""Feedback moves requests, and how old it is when it does.

One model, a replica on each of two nodes, and load that both carry with ease. Again and again the
link of one of them is halved for some seconds: what share of the new requests does it get, second
by second, before and after? All the while the age of the facts that an ingress would decide by is
noted: since the replica measured them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.cluster_link import NodeLink
from benchmarks.cluster_load import Load
from benchmarks.cluster_nodes import Cluster, Node
from benchmarks.cluster_score import mean_curve, score, spread, tokens_of
from benchmarks.cluster_serve import PacedModel, document
from benchmarks.cluster_stand import Stand, best, run_served, source
from benchmarks.cluster_store import Store
from benchmarks.cluster_watch import Look, Watch, admitted_between
from benchmarks.slo_load import Lengths, Phase
from benchmarks.slo_machine import until

AGE_GOAL_S, FALL_GOAL_S = 0.15, 1.0
_FACTOR = 1
_DEVICE_MIB = 256
_LOAD = 0.6  # of what both replicas serve at best
_HALVINGS = 20
_HALVED_S, _WHOLE_S = 6.0, 6.0
_STEPS_S = [-3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0]
_SETTLED_S = 2.0
_SHORT = Lengths(median=64, sigma=0.3, least=16, most=256)


def measure(stand: Stand, store: Store) -> dict[str, Any] | None:
    """Run it, if it is not there."""
    model = stand.model("alpha", _FACTOR, _DEVICE_MIB, replicas=2)
    rate_per_s = 2 * _LOAD * best(model)[1]
    setup = stand.setup(rate_per_s=rate_per_s, halvings=_HALVINGS)
    return store.part("feedback", setup, lambda: _run(stand, model, rate_per_s))


def _run(stand: Stand, model: PacedModel, rate_per_s: float) -> dict[str, Any]:
    halvings = max(1, _HALVINGS // stand.brief)
    seconds = halvings * (_HALVED_S + _WHOLE_S) + _WHOLE_S
    phases = [Phase("even", prompt=_SHORT)]
    schedule = stand.schedule(0, rate_per_s, seconds * stand.brief, phases)
    sources = [source(model, schedule)]
    moments = [_WHOLE_S + number * (_HALVED_S + _WHOLE_S) for number in range(halvings)]

    async def run(cluster: Cluster, watch: Watch, origin_s: float) -> dict[str, Any]:
        slow = cluster.nodes[-1]
        load = Load(sources, origin_s)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(load.run())
            group.create_task(_halve(slow, model, origin_s, moments))
        seen, watched = running.result(), watch.watched
        within = [look for look in watched.looks if 0 <= look.at_s <= seconds]
        names = [each.replica for each in watch.replicas() if each.node == slow.id]
        total = score(sources, seen.outcomes, seconds, tokens_of(seen, [model.name]))
        curve = mean_curve(moments, lambda begin, end: _share(within, names, begin, end), _STEPS_S)
        return {
            "curve": curve,
            "falls_s": falls_s(curve),
            "age_s": spread([look.age_s for look in within]),
            "halvings": halvings,
            "score": total.document(),
            "line": total.line(model.name),
            "cpu": watched.mean_cpu,
            "void": watched.void,
            "lag_s": seen.lag_s,
        }

    return run_served(2, document([model], {}), 2, run)


def falls_s(curve: Sequence[tuple[float, float | None]]) -> float | None:
    """Seconds until the share had gone half of its way down; None where it did not fall.

    It came from its mean before, and settled at the mean of what is seen after `_SETTLED_S`.
    """
    before = [share for end_s, share in curve if share is not None and end_s <= 0]
    settled = [share for end_s, share in curve if share is not None and end_s > _SETTLED_S]
    if not before or not settled or fmean(settled) >= fmean(before):
        return None
    half = (fmean(before) + fmean(settled)) / 2
    return next(e for e, share in curve if e > 0 and share is not None and share <= half)


def _share(looks: Sequence[Look], names: Sequence[str], begin: float, end: float) -> float | None:
    """Of the requests let in between two moments, those that one replica did."""
    admitted = admitted_between(looks, begin, end)
    total = sum(admitted.values())
    return sum(admitted.get(name, 0) for name in names) / total if total else None


async def _halve(node: Node, model: PacedModel, origin_s: float, moments: list[float]) -> None:
    with NodeLink(node, model.bus, model.link_bytes_per_s) as link:
        for moment in moments:
            await until(origin_s + moment)
            link.carry(0.5)
            await until(origin_s + moment + _HALVED_S)
            link.carry(1.0)


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    age = found["age_s"]
    curve = {end_s: share for end_s, share in found["curve"] if share is not None}
    shown = ", ".join(f"{end_s:+.1f} s {share:.0%}" for end_s, share in curve.items())
    return [
        f"feedback: {found['halvings']} times the link of one of two replicas is halved; its "
        f"share of the requests let in, up to so long after: {shown}",
        f"  half of its fall was done after {_s(found['falls_s'])} (goal {FALL_GOAL_S:g} s)",
        f"  {found['line']}; CPU {found['cpu']:.0%}",
        f"age of the facts that an ingress decides by: p50 {_ms(age['p50'])}, "
        f"p95 {_ms(age['p95'])} (goal {_ms(AGE_GOAL_S)}), at most {_ms(age['max'])}, "
        f"{age['count']} looks",
    ]


def _s(seconds: float | None) -> str:
    return "- (it did not fall)" if seconds is None else f"{seconds:.1f} s"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f} ms"
