"""The controller's end of the lending of host memory: from replicas' reports to orders.

Replicas that share their mirrors in a domain are one holder of the book: what they hold is counted
once, each brings what it would gain, and an order is answered when all have answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from deployments.control.memory import DomainFacts, HolderFacts, LedgerReading, Lent, ReplicaMemory
from select_n_core.decisions.budget import Account, Book, Rules
from select_n_core.decisions.loans import Holder, Rung
from select_n_core.decisions.orders import Pool, Report

_DECIDE_S = 0.1  # between two decisions; what changes meanwhile counts in the next one
_REVIEW_S = 0.5  # the same, where nothing changes: loans have rested, grants have ended


@dataclass(frozen=True, slots=True)
class _Member:
    """A replica of a group. mirrored: units with a copy in host memory."""

    replica: str
    model: str
    node: str
    mirrored: int
    memory: ReplicaMemory


class Lending:
    """Who is lent what, as one controller decides.

    Args:
        epoch: of the controller.
        clock: seconds that only grow.
    """

    def __init__(self, epoch: int, clock: Callable[[], float], rules: Rules | None = None) -> None:
        self._clock = clock
        self._book = Book(epoch, clock(), rules or Rules())
        self._groups: dict[str, dict[str, _Member]] = {}  # by the book's ids, then by replica
        self._group_of: dict[str, str] = {}
        self._readings: dict[str, LedgerReading] = {}
        self._budget_bytes: int | None = None
        self._decided_s = -math.inf
        self._changed = False

    def set_budget(self, nbytes: int | None) -> None:
        """What may be pinned in each domain; None is what it has."""
        if nbytes != self._budget_bytes:
            self._budget_bytes, self._changed = nbytes, True
            for reading in self._readings.values():
                self._book = self._book.read(self._pool(reading))

    def heard(
        self, replica: str, model: str, node: str, mirrored: int, memory: ReplicaMemory
    ) -> None:
        """Note what a replica reports; what follows from it is decided now and then."""
        now_s, reading = self._clock(), memory.ledger
        group = _id(reading.domain, memory.group)
        if self._group_of.get(replica, group) != group:
            self.gone(replica)  # it moved to another limit
        self._group_of[replica] = group
        members = self._groups.setdefault(group, {})
        members[replica] = _Member(replica, model, node, mirrored, memory)
        before = self._readings.get(reading.domain)
        if before is None or reading.read_s > before.read_s:
            self._readings[reading.domain] = reading
        account = self._book.accounts.get(group)
        self._book = self._book.heard(self._report(group), now_s).read(
            self._pool(self._readings[reading.domain])
        )
        self._changed |= _told(account) != _told(self._book.accounts.get(group))
        self._changed |= before is None or before.held_bytes != reading.held_bytes
        if now_s - self._decided_s >= (_DECIDE_S if self._changed else _REVIEW_S):
            self._book = self._book.decided(now_s)
            self._decided_s, self._changed = now_s, False

    def gone(self, replica: str) -> None:
        """A replica has left: those that shared with it go on; a domain without any is lost."""
        group = self._group_of.pop(replica, None)
        if group is None:
            return
        members = self._groups[group]
        domain = members.pop(replica).memory.ledger.domain
        self._changed = True
        if not members:
            del self._groups[group]
        if not any(_domain(each) == domain for each in self._groups.values()):
            self._book = self._book.lost(domain)
            del self._readings[domain]

    def lent(self, replica: str) -> Lent | None:
        """What a replica is to be told; None for who reported no memory."""
        group = self._group_of.get(replica)
        if group is None:
            return None
        members = self._groups[group]
        account = self._book.accounts.get(group)
        writes = replica == min(members)
        if account is None or account.order is None:
            return Lent(None, max(each.mirrored for each in members.values()), writes)
        k_min = max(each.memory.k_min for each in members.values())
        return Lent(account.order, k_min + account.order.rungs, writes)

    def facts(self) -> tuple[DomainFacts, ...]:
        """Every domain, for people."""
        late = {order.holder for order in self._book.late(self._clock())}
        return tuple(self._facts_of(each, late) for each in self._readings.values())

    def _facts_of(self, reading: LedgerReading, late: Collection[str]) -> DomainFacts:
        pool = self._pool(reading)
        accounts = [
            each
            for each in self._book.accounts.values()
            if each.report.domain == reading.domain and each.holder.id in self._groups
        ]
        reporting = {each.holder.id for each in accounts}
        holders = [self._holder(each, each.holder.id in late) for each in accounts]
        for each in reading.holders:
            if _id(reading.domain, each.group) not in reporting:
                facts = (each.floor_bytes, each.held_bytes, 0, 0, None)
                holders.append(HolderFacts(each.name, (), None, *facts, is_late=False))
        members = [each for group in reporting for each in self._groups[group].values()]
        return DomainFacts(
            domain=reading.domain,
            nodes=tuple(sorted({each.node for each in members})),
            capacity_bytes=pool.capacity_bytes,
            held_bytes=sum(reading.held_bytes.values()),
            free_bytes=max(0, pool.capacity_bytes - self._book.committed_bytes(pool)),
            holders=tuple(holders),
        )

    def _holder(self, account: Account, is_late: bool) -> HolderFacts:
        holder = account.holder
        members = self._groups[holder.id]
        taken_bytes = max(holder.floor_bytes, holder.held_bytes)
        return HolderFacts(
            name=", ".join(sorted({each.model for each in members.values()})),
            replicas=tuple(sorted(members)),
            priority=holder.priority,
            floor_bytes=holder.floor_bytes,
            held_bytes=holder.held_bytes,
            granted_bytes=account.committed_bytes - taken_bytes,
            revoked_bytes=account.revoked_bytes,
            wanted_bytes=holder.bytes_of(holder.needed),
            is_late=is_late,
        )

    def _pool(self, reading: LedgerReading) -> Pool:
        limits = [reading.limit_bytes, self._budget_bytes]
        return Pool(
            id=reading.domain,
            capacity_bytes=min(each for each in limits if each is not None),
            read_s=reading.read_s,
            held_bytes={
                _id(reading.domain, group): reading.claimed_bytes(group)
                for group in reading.held_bytes
            },
        )

    def _report(self, group: str) -> Report:
        """What a group says of itself, as one."""
        members = [each.memory for each in self._groups[group].values()]
        latest = max((each.ledger for each in members), key=lambda each: each.read_s)
        k_min = max(each.k_min for each in members)
        mirrors_bytes = max(
            each.floor_bytes - each.host_kv_bytes for each in members if each.k_min == k_min
        )
        name = members[0].group
        holder = Holder(
            id=group,
            priority=max(each.priority for each in members),
            floor_bytes=mirrors_bytes
            + sum(each.host_kv_bytes for each in members)
            + latest.waiting_bytes(name),
            held_bytes=latest.held_bytes.get(name, 0),
            rungs=_added([each.rungs[k_min - each.k_min :] for each in members]),
        )
        # As of what all of them have heard and answered.
        epoch = min(each.epoch for each in members)
        return Report(
            holder=holder,
            domain=latest.domain,
            epoch=epoch,
            answered=min(each.answered for each in members if each.epoch == epoch),
            sent_s=min(each.ledger.read_s for each in members),
        )


def _id(domain: str, group: str) -> str:
    return f"{domain}/{group}"


def _domain(members: Mapping[str, _Member]) -> str:
    return next(iter(members.values())).memory.ledger.domain


def _added(ladders: Iterable[tuple[Rung, ...]]) -> tuple[Rung, ...]:
    """What each rung gains all of them together; the longest ladder has the last rungs alone."""
    added: list[Rung] = []
    for ladder in ladders:
        for at, rung in enumerate(ladder):
            if at < len(added):
                gain_per_s = added[at].gain_per_s + rung.gain_per_s
                added[at] = Rung(rung.nbytes, gain_per_s, added[at].spare and rung.spare)
            else:
                added.append(rung)
    return tuple(added)


def _told(account: Account | None) -> Account | None:
    """An account without its times, to see whether anything else changed."""
    if account is None:
        return None
    report = replace(account.report, sent_s=0.0)
    return replace(account, report=report, heard_s=0.0, moved_s=0.0)
