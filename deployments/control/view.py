"""The cluster as people and tools read it: one JSON object of plain facts, units in the names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from deployments.control.memory import DomainFacts
from deployments.control.messages import ReplicaReport, Report, Snapshot


def cluster_document(snapshot: Snapshot, *, age_s: float | None, now_s: float) -> dict[str, Any]:
    """What `/cluster` answers.

    Args:
        snapshot: of the controller, or made of the replicas' own reports.
        age_s: since the controller was last heard; None where there is none.
        now_s: time of day.
    """
    controller = None
    if age_s is not None:
        controller = {
            "epoch": snapshot.epoch,
            "version": snapshot.version,
            "policy_version": snapshot.policy_version,
            "age_s": round(age_s, 3),
        }
    replicas = sorted(
        snapshot.replicas.values(), key=lambda each: (each.model, each.node, each.replica)
    )
    budget = None if snapshot.policy is None else snapshot.policy.budgets.host_memory
    return {
        "controller": controller,
        "nodes": [
            _node(node, [each for each in replicas if each.node == node], budget)
            for node in sorted({each.node for each in replicas})
        ],
        "domains": [_domain(each) for each in snapshot.memory],
        "replicas": [_replica(each, now_s) for each in replicas],
        "ingresses": [
            {"ingress": each.ingress, "feedback_age_s": _age_s(each, now_s)}
            for each in snapshot.ingresses.values()
        ],
    }


def _node(node: str, replicas: list[ReplicaReport], budget: int | None) -> dict[str, Any]:
    return {
        "node": node,
        "replicas": len(replicas),
        "budget_bytes": budget,
        "lease_bytes": sum(each.lease_bytes for each in replicas),
        "mirrored_bytes": _shared_bytes(replicas),
    }


def _domain(facts: DomainFacts) -> dict[str, Any]:
    """Who holds the host memory under one limit: a control group's or a node's."""
    late = sum(each.is_late for each in facts.holders)
    return asdict(facts) | {"late_revocations": late}


def _shared_bytes(replicas: Iterable[ReplicaReport]) -> int:
    """What the mirrors of a node take: replicas of a model share them, in one order."""
    most: dict[str, int] = {}
    for each in replicas:
        most[each.model] = max(most.get(each.model, 0), each.mirrored_bytes)
    return sum(most.values())


def _replica(report: ReplicaReport, now_s: float) -> dict[str, Any]:
    return {
        "replica": report.replica,
        "model": report.model,
        "node": report.node,
        "bus": report.bus,
        "interval": report.interval,
        "k": report.k,
        "k_min": report.k_min,
        "k_most": report.k_most,
        "units": report.units,
        "mirrored": report.mirrored,
        "mirrored_bytes": report.mirrored_bytes,
        "lease_bytes": report.lease_bytes,
        "reserved_bytes": None if report.memory is None else report.memory.reserved_bytes,
        "compute_kind": report.compute_kind,
        "link_kind": report.link_kind,
        "link_bytes_per_s": report.link_bytes_per_s,
        "running": report.running,
        "waiting": report.waiting,
        "draining": report.service.draining,
        "kv_free_tokens": report.kv_free_tokens,
        "kv_tokens": report.kv_tokens,
        "ttft_p95_s": report.seen_ttft_s,
        "ttft_target_s": report.ttft_s,
        "tpot_p95_s": report.seen_tpot_s,
        "tpot_target_s": report.tpot_s,
        "admitted": report.admitted,
        "returned": dict(report.returned),
        "feedback_age_s": _age_s(report, now_s),
    }


def _age_s(report: Report, now_s: float) -> float:
    return round(max(0.0, now_s - report.measured_at_s), 3)
