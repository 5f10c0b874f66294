"""Many tenants: three nodes, two models, four tenants, bursts, and replicas of unequal links.

Every model has a replica with a link of 1 GB/s and one with 0.5 GB/s. Four tenants of different
weights send to both models: steadily, in bursts, more than there is, and steadily again. Offered
alike to this product's router; to Ray Serve's own, which knows queue lengths, with the same
admission; and to that without admission, with the same k, a queue without an end, and targets that
nobody is held to. All are scored by the same targets.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.cluster_link import NodeLink
from benchmarks.cluster_load import Load, Seen, Source
from benchmarks.cluster_nodes import Cluster
from benchmarks.cluster_score import score, spread, tokens_of, window_shares
from benchmarks.cluster_serve import PacedModel, document
from benchmarks.cluster_stand import Stand, best, run_served, source
from benchmarks.cluster_store import Store
from benchmarks.cluster_watch import Watch, Watched
from benchmarks.slo_load import Phase
from deployments.tenants.keys import hash_of, new_key
from select_n_core.decisions.order import interval_of_k

GOALS = {"tpot": 0.99, "ttft": 0.98, "ratio": 1.3, "share": 0.1}
_FACTOR = 3
_DEVICE_MIB = 256
_MODELS = ("alpha", "beta")
_NODES = 3
_REPLICAS = 2
_WEIGHTS = {"acme": 3.0, "bolt": 2.0, "cora": 1.0, "dune": 1.0}
_BURSTING = ("acme", "dune")
_PHASE_S = 120.0
_PHASES = (
    Phase("steady", load=0.75),
    Phase("bursts", load=0.6, burst=4.0),
    Phase("overload", load=1.6),
    Phase("steady-again", load=0.75),
)
_UNBOUNDED = 1024


def measure(stand: Stand, store: Store) -> dict[str, Any] | None:
    """Every router on the same load."""
    models = [
        stand.model(name, _FACTOR, _DEVICE_MIB, replicas=_REPLICAS, changes=_roomy())
        for name in _MODELS
    ]
    slow = [replace(model, link_bytes_per_s=model.link_bytes_per_s / 2) for model in models]
    rate_per_s = best(models[0])[1] + (_REPLICAS - 1) * best(slow[0])[1]
    setup = stand.setup(rate_per_s=rate_per_s, phases=[str(p) for p in _PHASES], phase_s=_PHASE_S)
    routers: dict[str, tuple[list[PacedModel], dict[str, Any]]] = {
        "headroom": (models, {}),
        "power-of-two": (models, {"routing": "power_of_two"}),
        "no-admission": ([_open(each) for each in models], {"routing": "power_of_two"}),
    }
    found = {}
    for name, (served, args) in routers.items():
        run = partial(_run, stand, served, args, models, rate_per_s)
        found[name] = store.part(f"tenants-{name}", setup, run)
    rows = {name: each for name, each in found.items() if each is not None}
    if "headroom" not in rows:
        return None
    ours = rows["headroom"]["total"]["goodput_per_s"]
    return {
        "models": list(_MODELS),
        "nodes": _NODES,
        "rate_per_s": rate_per_s,
        "weights": _WEIGHTS,
        "rows": rows,
        "goodput_over": {
            name: ours / each["total"]["goodput_per_s"]
            if each["total"]["goodput_per_s"]
            else None
            for name, each in rows.items()
            if name != "headroom"
        },
        "void": next((each["void"] for each in rows.values() if each["void"]), None),
    }  # fmt: skip


def _roomy() -> dict[str, Any]:
    return {"max_queue": _UNBOUNDED}


def _open(model: PacedModel) -> PacedModel:
    """Let everybody in: with the k that the targets ask for, and targets that nobody misses."""
    k, units = best(model)[0], len(model.record.unit_bytes)
    lax = {"slo": {"tpot": "1h", "ttft": "1h"}, "interval": interval_of_k(k, units) or "off"}
    return replace(model, changes=model.changes | lax)


def _run(
    stand: Stand,
    served: list[PacedModel],
    args: dict[str, Any],
    models: list[PacedModel],
    rate_per_s: float,
) -> dict[str, Any]:
    keys = {tenant: new_key() for tenant in _WEIGHTS}
    keys_file = stand.scratch / "keys.yaml"
    keys_file.write_text("".join(f"{hash_of(key)}: {tenant}\n" for tenant, key in keys.items()))
    keys_file.chmod(0o600)
    policy = {
        "keys_file": str(keys_file),
        "tenants": [{"name": name, "weight": weight} for name, weight in _WEIGHTS.items()],
    }
    sources = _sources(stand, models, keys, rate_per_s)

    async def run(cluster: Cluster, watch: Watch, origin_s: float) -> dict[str, Any]:
        with ExitStack() as links:
            for model in models:
                slow = sorted(each.node for each in watch.replicas(model.name))[-1]
                node = cluster.node_of(slow)
                link = links.enter_context(NodeLink(node, model.bus, model.link_bytes_per_s))
                link.carry(0.5)
            seen = await Load(sources, origin_s).run()
        return _document(sources, seen, watch.watched)

    return run_served(_NODES, document(served, policy, **args), len(models) * _REPLICAS, run)


def _sources(
    stand: Stand, models: list[PacedModel], keys: dict[str, str], rate_per_s: float
) -> list[Source]:
    """Every tenant asks every model for as much as any other, whatever its weight."""
    each_per_s = rate_per_s / len(_WEIGHTS)
    sources = []
    for number, (tenant, weight) in enumerate(_WEIGHTS.items()):
        calm = [phase if tenant in _BURSTING else replace(phase, burst=1.0) for phase in _PHASES]
        for index, model in enumerate(models):
            schedule = stand.schedule(len(models) * number + index, each_per_s, _PHASE_S, calm)
            sources.append(
                source(
                    model,
                    schedule,
                    name=f"{tenant}/{model.name}",
                    api_key=keys[tenant],
                    weight=weight,
                )
            )
    return sources


def _document(sources: list[Source], seen: Seen, watched: Watched) -> dict[str, Any]:
    phase_s = sources[0].schedule.phase_s
    names = [each.name for each in sources]
    total = score(sources, seen.outcomes, phase_s * len(_PHASES), tokens_of(seen, names))
    phases = {}
    for index, phase in enumerate(_PHASES):
        own = [outcome for outcome in seen.outcomes if outcome.phase == index]
        tokens = sum(outcome.tokens for outcome in own)
        phases[phase.name] = score(sources, own, phase_s, tokens)
    shares = [
        found
        for model in {source.model for source in sources}
        for found in window_shares([s for s in sources if s.model == model], seen)
    ]
    return {
        "total": total.document(),
        "line": total.line("all phases"),
        "phases": {name: each.document() for name, each in phases.items()},
        "phase_lines": [each.line(name) for name, each in phases.items()],
        "share_error": spread([each.error for each in shares]),
        "shares_within_goal": sum(each.error <= GOALS["share"] for each in shares),
        "cpu": watched.mean_cpu,
        "void": watched.void,
        "lag_s": seen.lag_s,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    said = [
        f"tenants: {found['nodes']} nodes, models {', '.join(found['models'])} with a replica at "
        f"1 GB/s and one at 0.5 GB/s each, tenants by weight "
        f"{', '.join(f'{name} {weight:g}' for name, weight in found['weights'].items())}; one load "
        f"is {found['rate_per_s']:.2f} requests/s for each model by the planner"
    ]
    for name, row in found["rows"].items():
        said += [f"  {name}: CPU {row['cpu']:.0%}", f"    {row['line']}"]
        said += [f"    {line}" for line in row["phase_lines"]]
        error = row["share_error"]
        if error["count"]:
            said.append(
                f"    backlogged tenants' shares: {row['shares_within_goal']} of {error['count']} "
                f"windows of 10 s within {GOALS['share']:.0%} of their weights (goal all), off by "
                f"p50 {error['p50']:.1%}, p95 {error['p95']:.1%}, at most {error['max']:.1%}"
            )
    for name, ratio in found["goodput_over"].items():
        said.append(
            f"  goodput {'-' if ratio is None else f'{ratio:.2f}x'} of {name} "
            f"(goal {GOALS['ratio']}x of power-of-two; admitted: TPOT {GOALS['tpot']:.0%}, "
            f"TTFT {GOALS['ttft']:.0%})"
        )
    return said
