"""The budget moves memory: one node, two models, 60% of what both want, and load that moves.

The same load is offered with the controller and that budget, and without one to a static split in
two halves. What each model wants are the mirrors of the k that serves the most requests. Beside
goodput: seconds until k, the lease, and the bytes that the kernel has mapped follow the load.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.cluster_load import Load, Seen, Source
from benchmarks.cluster_nodes import Cluster
from benchmarks.cluster_score import by_second, follows_s, score, spread, tokens_of
from benchmarks.cluster_serve import PacedModel, document
from benchmarks.cluster_stand import Stand, best, capacities, run_served, source
from benchmarks.cluster_store import Store
from benchmarks.cluster_watch import Watch, Watched
from benchmarks.slo_load import Phase

BUDGET = 0.6
GOAL, FOLLOW_GOAL_S = 1.2, 3.0
_FACTOR = 2
_DEVICE_MIB = 272
_PHASE_S, _PHASES = 60.0, 6
_LOADED, _QUIET = 1.0, 0.1  # of what one replica serves at best


def measure(stand: Stand, store: Store) -> dict[str, Any] | None:
    """Both runs, and what follows from them."""
    models = [stand.model(name, _FACTOR, _DEVICE_MIB) for name in ("alpha", "beta")]
    k, rate_per_s = best(models[0])
    memory = models[0].inputs().memory
    wanted = memory.mirrored_bytes(k)
    budget = round(BUDGET * wanted * len(models))
    sources = _sources(stand, models, rate_per_s)
    lent = [model.with_host(wanted) for model in models]
    split = [model.with_host(budget // len(models)) for model in models]
    setup = stand.setup(
        budget=budget, wanted=wanted, phase_s=_PHASE_S, rate_per_s=rate_per_s, phases=_PHASES
    )
    policy = {"budgets": {"host_memory": budget}}
    ours = store.part("budget-lent", setup, lambda: _run(lent, policy, sources, budget))
    theirs = store.part("budget-split", setup, lambda: _run(split, {}, sources, budget))
    if ours is None or theirs is None:
        return None
    rates = capacities(models[0])
    halves = rates[memory.host_cap(budget // len(models))]
    return {
        "budget_bytes": budget,
        "wanted_bytes_each": wanted,
        "wanted_k_each": k,
        "planner_best_per_s": rate_per_s,
        "planner_half_per_s": halves,
        "lent": ours,
        "split": theirs,
        "goodput_ratio": _ratio(ours["score"]["goodput_per_s"], theirs["score"]["goodput_per_s"]),
        "void": ours["void"] or theirs["void"],
    }


def _sources(stand: Stand, models: list[PacedModel], rate_per_s: float) -> list[Source]:
    """The first model is loaded in even phases, the second one in odd ones."""
    return [
        source(
            model,
            stand.schedule(
                index,
                rate_per_s,
                _PHASE_S,
                [
                    Phase(f"{number}", load=_LOADED if number % 2 == index else _QUIET)
                    for number in range(_PHASES)
                ],
            ),
        )
        for index, model in enumerate(models)
    ]


def _run(
    models: list[PacedModel], policy: dict[str, Any], sources: list[Source], budget: int
) -> dict[str, Any]:
    async def run(_: Cluster, watch: Watch, origin_s: float) -> dict[str, Any]:
        seen = await Load(sources, origin_s).run()
        return _document(models, sources, seen, watch.watched, budget)

    return run_served(1, document(models, policy), len(models), run, maps=True)


def _document(
    models: list[PacedModel], sources: list[Source], seen: Seen, watched: Watched, budget: int
) -> dict[str, Any]:
    phase_s = sources[0].schedule.phase_s
    seconds = phase_s * _PHASES
    follow: dict[str, list[float | None]] = {"k": [], "lease_bytes": [], "mapped_bytes": []}
    for number in range(1, _PHASES):  # the load moves at the begin of each
        model = models[number % 2]
        points = {
            "k": watched.points("k", model.name),
            "lease_bytes": watched.points("lease_bytes", model.name),
            "mapped_bytes": watched.mapped_points(model.deployment),
        }
        for name, each in points.items():
            follow[name].append(follows_s(each, number * phase_s, (number + 1) * phase_s))
    mapped = {at.at_s: 0 for at in watched.mapped}
    for each in watched.mapped:
        mapped[each.at_s] += each.nbytes
    tokens = tokens_of(seen, [each.name for each in sources])
    total = score(sources, seen.outcomes, seconds, tokens)
    return {
        "score": total.document(),
        "line": total.line("both models"),
        "follow_s": follow,
        "most_mapped_bytes": max(mapped.values(), default=0),
        "over_budget": sum(nbytes > budget for nbytes in mapped.values()),
        "looks": len(mapped),
        "phase_s": phase_s,
        "phases": _PHASES,
        "mapped_by_second": {
            model.name: by_second(watched.mapped_points(model.deployment), seconds)
            for model in models
        },
        "median_k": {
            model.name: [
                median(
                    [p.value for p in watched.points("k", model.name)
                     if number * phase_s <= p.at_s < (number + 1) * phase_s] or [0]
                )
                for number in range(_PHASES)
            ]
            for model in models
        },
        "cpu": watched.mean_cpu,
        "void": watched.void,
        "lag_s": seen.lag_s,
    }  # fmt: skip


def _ratio(ours: float, theirs: float) -> float | None:
    return ours / theirs if theirs else None


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    ratio = found["goodput_ratio"]
    shown = "-" if ratio is None else f"{ratio:.2f}x"
    said = [
        f"budget: one node, two models that want {found['wanted_bytes_each'] / 1e6:.0f} MB of "
        f"mirrors each (k = {found['wanted_k_each']}), {BUDGET:.0%} of it for both; the planner "
        f"expects {found['planner_best_per_s']:.2f} requests/s of one that has all it wants and "
        f"{found['planner_half_per_s']:.2f} of one with half the budget",
        f"  lent:  {found['lent']['line']}; CPU {found['lent']['cpu']:.0%}",
        f"  split: {found['split']['line']}; CPU {found['split']['cpu']:.0%}",
        f"  goodput {shown} of the equal split's (goal {GOAL}x)",
    ]
    for name, each in found["lent"]["follow_s"].items():
        moved = [value for value in each if value is not None]
        told = spread(moved)
        said.append(
            f"  {name} followed the load {told['count']} of {len(each)} times, "
            f"p50 {_s(told['p50'])}, at most {_s(told['max'])} (goal {FOLLOW_GOAL_S:g} s)"
        )
    said.append(
        f"  mapped at most {found['lent']['most_mapped_bytes'] / 1e6:.0f} MB of "
        f"{found['budget_bytes'] / 1e6:.0f} MB, above it in {found['lent']['over_budget']} of "
        f"{found['lent']['looks']} looks (goal 0)"
    )
    return said


def _s(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
