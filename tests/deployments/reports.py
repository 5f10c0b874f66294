"""Reports of replicas that do not exist."""

from dataclasses import replace

from deployments.control.messages import ReplicaReport

BASE = ReplicaReport(
    replica="a",
    model="tiny",
    node="node-1",
    bus=None,
    sequence=0,
    measured_at_s=0.0,
    units=30,
    k_min=2,
    k=8,
    k_most=10,
    mirrored=10,
    mirrored_bytes=700,
    lease_bytes=1000,
    compute_kind="real",
    link_kind="emulated",
    link_bytes_per_s=1e9,
    running=1,
    waiting=0,
    kv_free_tokens=500,
    kv_tokens=1000,
    admitted=3,
    returned={"kv": 2},
    tpot_s=0.1,
    ttft_s=2.0,
    tpot_headroom=0.25,
    ttft_headroom=None,
)


def report(replica: str = "a", sequence: int = 0, **facts: object) -> ReplicaReport:
    return replace(BASE, replica=replica, sequence=sequence, **facts)
