"""What travels between replicas, the controller and the ingresses: frozen dataclasses.

Times of day are `time.time()` of the machine that measured, so nodes need a common time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from deployments import calls
from deployments.control.memory import DomainFacts, Lent, ReplicaMemory
from deployments.control.service import UNKNOWN, ServiceReport
from select_n_core.config import ModelConfig
from select_n_core.live import LivePolicy


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica as the cluster sees it, at one moment.

    Attributes:
        replica, model, node, bus: who it is and where; a bus is one of its node's.
        sequence: grows with every report of the replica.
        measured_at_s: time of day at which the facts held.
        units, k_min, k, k_most: of the model; streamed now, and the range in which k may move.
        mirrored, mirrored_bytes: units with a copy in host memory, and what the copies take.
        lease_bytes: what they may take.
        compute_kind: `real`, or `paced` where a record's times stand in for a device.
        link_kind, link_bytes_per_s: the host-device path and what it carries, each direction.
        running, waiting: requests.
        kv_free_tokens, kv_tokens: KV capacity left and in all.
        admitted: requests let in since start. returned: those that were not, by reason.
        tpot_s, ttft_s: the model's targets.
        tpot_headroom, ttft_headroom: 1 - p95 / target over the last seconds; None while nothing
            finished in them.
        service: what it can still give.
        memory: its part in the lending of host memory; None while it takes none.
    """

    replica: str
    model: str
    node: str
    bus: str | None
    sequence: int
    measured_at_s: float
    units: int
    k_min: int
    k: int
    k_most: int
    mirrored: int
    mirrored_bytes: int
    lease_bytes: int
    compute_kind: str
    link_kind: str
    link_bytes_per_s: float
    running: int
    waiting: int
    kv_free_tokens: int
    kv_tokens: int
    admitted: int
    returned: Mapping[str, int]
    tpot_s: float
    ttft_s: float
    tpot_headroom: float | None
    ttft_headroom: float | None
    service: ServiceReport = UNKNOWN
    memory: ReplicaMemory | None = None

    @classmethod
    def of(
        cls,
        report: calls.Report,
        model: ModelConfig,
        sequence: int = 0,
        memory: ReplicaMemory | None = None,
    ) -> ReplicaReport:
        """What the cluster needs of a replica's own report."""
        info, stats = report.info, report.stats
        return cls(
            replica=report.replica,
            model=model.name,
            node=report.node,
            bus=None if model.link.bus is None else model.link.bus.name,
            sequence=sequence,
            measured_at_s=report.measured_at_s,
            units=info.units,
            k_min=info.k_min,
            k=stats.k,
            k_most=max(stats.k, min(stats.mirrored, stats.cap)),
            mirrored=stats.mirrored,
            mirrored_bytes=stats.host_bytes,
            lease_bytes=stats.lease_bytes,
            compute_kind=info.compute_kind,
            link_kind=info.link_kind,
            link_bytes_per_s=info.link_bytes_per_s,
            running=stats.running,
            waiting=stats.waiting,
            kv_free_tokens=stats.kv_free_tokens,
            kv_tokens=stats.kv_tokens,
            admitted=stats.admitted,
            returned=dict(stats.returned),
            tpot_s=model.slo.tpot,
            ttft_s=model.slo.ttft,
            tpot_headroom=stats.tpot_headroom,
            ttft_headroom=stats.ttft_headroom,
            service=ServiceReport.of(report),
            memory=memory,
        )

    @property
    def name(self) -> str:
        """Who reports."""
        return self.replica

    @property
    def interval(self) -> float | None:
        """N: one in every N units is streamed; None when none is."""
        return self.units / self.k if self.k else None

    @property
    def seen_tpot_s(self) -> float | None:
        """p95 of the time per output token lately; None while nothing finished."""
        return None if self.tpot_headroom is None else (1 - self.tpot_headroom) * self.tpot_s

    @property
    def seen_ttft_s(self) -> float | None:
        """p95 of the time to the first token lately; None while nothing finished."""
        return None if self.ttft_headroom is None else (1 - self.ttft_headroom) * self.ttft_s

    @property
    def decided(self) -> tuple[object, ...]:
        """What others must hear of at once when it changes: k, memory, admission, draining."""
        return (
            self.service.draining,
            self.k,
            self.k_most,
            self.mirrored_bytes,
            self.lease_bytes,
            self.admitted,
            sum(self.returned.values()),
            None if self.memory is None else self.memory.decided,
        )


@dataclass(frozen=True, slots=True)
class IngressReport:
    """What one ingress was asked for, so that the others know which part of a quota is theirs.

    Attributes:
        sequence: grows with every report of the ingress.
        measured_at_s: time of day at which it held.
        demands: by tenant, requests and tokens per minute lately, let in or not.
    """

    ingress: str
    sequence: int
    measured_at_s: float
    demands: Mapping[str, tuple[float, float]]

    @property
    def name(self) -> str:
        """Who reports."""
        return self.ingress


Report = ReplicaReport | IngressReport
R = TypeVar("R", ReplicaReport, IngressReport)


@dataclass(frozen=True, slots=True)
class ReportBatch:
    """Reports of one sender.

    Attributes:
        epoch: the highest that the sender has heard of; 0 is none.
    """

    epoch: int
    reports: tuple[Report, ...]


@dataclass(frozen=True, slots=True)
class Receipt:
    """The controller's answer to a batch.

    Attributes:
        refused: the senders whose report was older than the one known; all of a batch that knows of
            a later controller.
        host_memory: that engines may pin on each node together, bytes; None is what it has.
        lent: to the replicas of the batch.
    """

    epoch: int
    refused: tuple[str, ...] = ()
    host_memory: int | None = None
    lent: tuple[Lent, ...] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """What a watcher has: nothing, or a controller's epoch and the version it has seen."""

    epoch: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """From a version that the watcher had to a later one, or everything.

    Attributes:
        whole: they are everything that the controller knows, else what is new of it.
        settled: everybody who lives has had the time to report to this controller: who is not among
            whole changes is gone.
        policy: None where it has not changed, or where there never was one; `policy_version` tells.
        memory: every domain's host memory, changed or not.
    """

    epoch: int
    version: int
    whole: bool
    settled: bool
    policy_version: int
    policy: LivePolicy | None = None
    reports: tuple[Report, ...] = ()
    gone: tuple[str, ...] = ()
    memory: tuple[DomainFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster as the controller knows it.

    Attributes:
        epoch: of the controller; a later one's is higher.
        version: within the epoch.
        policy_version: within the epoch; 0 while there is no policy.
        replicas, ingresses: the last report of every live one, by its name.
        memory: every domain's host memory, as it is lent.
    """

    epoch: int
    version: int
    policy_version: int = 0
    policy: LivePolicy | None = None
    replicas: Mapping[str, ReplicaReport] = field(default_factory=dict)
    ingresses: Mapping[str, IngressReport] = field(default_factory=dict)
    memory: tuple[DomainFacts, ...] = ()

    @property
    def known(self) -> Known:
        """What to watch from."""
        return Known(self.epoch, self.version)

    def after(self, changes: Changes) -> Snapshot:
        """The snapshot that `changes` make of this one; those of an earlier controller make none.

        What an earlier controller said stands until the later one has settled.
        """
        if (changes.epoch, changes.version) < (self.epoch, self.version):
            return self
        kept = Snapshot(0, 0) if changes.whole and changes.settled else self
        policy = kept.policy if changes.policy is None else changes.policy
        return Snapshot(
            changes.epoch,
            changes.version,
            changes.policy_version,
            policy,
            _updated(kept.replicas, ReplicaReport, changes),
            _updated(kept.ingresses, IngressReport, changes),
            changes.memory,
        )


def _updated(before: Mapping[str, R], kind: type[R], changes: Changes) -> Mapping[str, R]:
    kept = {name: report for name, report in before.items() if name not in changes.gone}
    return kept | {each.name: each for each in changes.reports if isinstance(each, kind)}


class Controller(Protocol):
    """The controller as replicas and ingresses see it; each call may raise anything of Ray's."""

    async def report(self, batch: ReportBatch) -> Receipt:
        """Hand over reports."""
        ...

    async def watch(self, known: Known, timeout_s: float) -> Changes:
        """Wait until there is more than `known`, or `timeout_s`; then what is new."""
        ...
