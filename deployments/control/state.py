"""What the controller knows: reports in, snapshots and changes out, on a clock of its caller's.

Nothing here waits or knows Ray: the deployment around it wakes its watchers when the version grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deployments.control.lending import Lending
from deployments.control.messages import (
    Changes,
    Known,
    Receipt,
    ReplicaReport,
    Report,
    ReportBatch,
    Snapshot,
)
from select_n_core.live import LivePolicy

# Who misses several reports in a row is gone: replicas send ten per second, ingresses two.
REPORT_TTL_S = 2.0
_MOST_GONE = 1024  # senders remembered after they left


@dataclass(slots=True)
class _Live:
    report: Report
    heard_s: float
    version: int


@dataclass(frozen=True, slots=True)
class _Gone:
    sequence: int
    version: int


class ClusterState:
    """The cluster as one controller has heard of it.

    Args:
        epoch: of this controller, above every earlier one's.
        clock: seconds that only grow.
        ttl_s: a sender that has been silent for so long is dropped. After so long everybody who
            lives has reported.
    """

    def __init__(
        self, epoch: int, clock: Callable[[], float], *, ttl_s: float = REPORT_TTL_S
    ) -> None:
        self.epoch = epoch
        self._clock = clock
        self._ttl_s = ttl_s
        self._version = 1
        self._settles_s = clock() + ttl_s
        self._settled = False
        self._live: dict[str, _Live] = {}
        self._gone: dict[str, _Gone] = {}  # in the order of their versions
        self._forgotten = 0  # who watched since before that version gets everything
        self._policy: LivePolicy | None = None
        self._policy_version = 0
        self._policy_at = 0
        self._succeeded_by = 0
        self._lending = Lending(epoch, clock)

    @property
    def version(self) -> int:
        """Grows with everything that a watcher must hear of."""
        return self._version

    @property
    def succeeded_by(self) -> int:
        """The epoch of a later controller that a sender has heard of; 0 is none."""
        return self._succeeded_by

    def set_policy(self, policy: LivePolicy) -> None:
        """The policy from now on; the same one again changes nothing."""
        if policy == self._policy:
            return
        self._policy = policy
        self._policy_version += 1
        self._version += 1
        self._policy_at = self._version
        self._lending.set_budget(policy.budgets.host_memory)

    def hear_of(self, epoch: int) -> None:
        """Somebody knows of the controller of that epoch."""
        if epoch > self.epoch:
            self._succeeded_by = max(self._succeeded_by, epoch)

    def take(self, batch: ReportBatch) -> Receipt:
        """Note what a sender reports.

        A sender that knows of a later controller is refused: it must not be told things by two.
        """
        self.hear_of(batch.epoch)
        if batch.epoch > self.epoch:
            return Receipt(self.epoch, tuple(each.name for each in batch.reports))
        refused = tuple(each.name for each in batch.reports if not self._note(each))
        budget = None if self._policy is None else self._policy.budgets.host_memory
        lent = [self._lending.lent(each.name) for each in batch.reports]
        told = tuple(each for each in lent if each is not None)
        return Receipt(self.epoch, refused, budget, told)

    def _note(self, report: Report) -> bool:
        name = report.name
        before = self._live.get(name)
        last = before.report.sequence if before else -1
        if name in self._gone:
            last = self._gone[name].sequence
        if report.sequence <= last:
            return False
        self._gone.pop(name, None)
        self._version += 1
        self._live[name] = _Live(report, self._clock(), self._version)
        if isinstance(report, ReplicaReport) and report.memory is not None:
            self._lending.heard(name, report.model, report.node, report.mirrored, report.memory)
        return True

    def expire(self) -> None:
        """Drop the senders that have been silent for longer than the TTL."""
        now_s = self._clock()
        if not self._settled and now_s >= self._settles_s:
            self._settled = True
            self._version += 1
            self._forgotten = self._version  # everybody gets everything: who is missing is gone
        dead_s = now_s - self._ttl_s
        for name in [name for name, live in self._live.items() if live.heard_s < dead_s]:
            self._version += 1
            self._gone[name] = _Gone(self._live.pop(name).report.sequence, self._version)
            self._lending.gone(name)
        while len(self._gone) > _MOST_GONE:
            oldest = next(iter(self._gone))
            self._forgotten = self._gone.pop(oldest).version

    def changes(self, known: Known) -> Changes:
        """What somebody who has `known` lacks; everything where that cannot be told apart."""
        if known.epoch != self.epoch or not self._forgotten <= known.version <= self._version:
            known = Known()
        since = known.version
        whole = known == Known()
        return Changes(
            epoch=self.epoch,
            version=self._version,
            whole=whole,
            settled=self._settled,
            policy_version=self._policy_version,
            policy=self._policy if whole or self._policy_at > since else None,
            reports=tuple(
                live.report for live in self._live.values() if whole or live.version > since
            ),
            gone=()
            if whole
            else tuple(name for name, gone in self._gone.items() if gone.version > since),
            memory=self._lending.facts(),
        )

    def snapshot(self) -> Snapshot:
        """Everything, as it stands."""
        return Snapshot(0, 0).after(self.changes(Known()))
