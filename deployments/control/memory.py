"""What replicas and the controller tell each other about host memory: frozen dataclasses.

Times are by the replica's machine's monotonic clock, which all processes of a domain share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from select_n_core.decisions.loans import Rung
from select_n_core.decisions.orders import Order


@dataclass(frozen=True, slots=True)
class HolderReading:
    """A holder as it stands in a domain's ledger; see `select_n_core.memory.ledger.Holder`."""

    name: str
    group: str
    floor_bytes: int
    held_bytes: int
    waiting_bytes: int


@dataclass(frozen=True, slots=True)
class LedgerReading:
    """A domain's ledger as a replica read it.

    Attributes:
        read_s: all that was written before stands in it.
        limit_bytes: that may be pinned.
        held_bytes: of every group, each file once; see `Ledger.held_bytes_by_group`.
        holders: who holds, or waits to hold, anything.
    """

    domain: str
    read_s: float
    limit_bytes: int
    held_bytes: Mapping[str, int]
    holders: tuple[HolderReading, ...]

    def claimed_bytes(self, group: str) -> int:
        """What a group that says nothing of itself holds, or is about to: a floor is waited for."""
        mine = [each for each in self.holders if each.group == group]
        waited = self.held_bytes.get(group, 0) + self.waiting_bytes(group)
        return max([waited, *(each.floor_bytes for each in mine)])

    def waiting_bytes(self, group: str) -> int:
        """What a group's members wait for, beyond what they hold."""
        return sum(each.waiting_bytes for each in self.holders if each.group == group)


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """A replica's host memory, and what more of it would be worth.

    Attributes:
        group: of the replicas that share its mirrors in the domain; they are lent to as one.
        priority: of the class that would be served by more.
        k_min: mirrors that it cannot serve without.
        floor_bytes: what those and its host KV take. host_kv_bytes: of them, the KV's.
        rungs: every mirror beyond `k_min`, at the load it sees.
        reserved_bytes: written down for it alone, shared or not.
        epoch, answered: see `select_n_core.decisions.orders.Report`; as of `ledger.read_s`.
        ledger: of its domain.
    """

    group: str
    priority: int
    k_min: int
    floor_bytes: int
    host_kv_bytes: int
    rungs: tuple[Rung, ...]
    reserved_bytes: int
    epoch: int
    answered: int
    ledger: LedgerReading

    @property
    def decided(self) -> tuple[object, ...]:
        """What the controller must hear of at once when it changes."""
        return (self.epoch, self.answered)


@dataclass(frozen=True, slots=True)
class Lent:
    """What the controller tells one replica about the host memory of its group.

    Attributes:
        order: to the group, until all of it have answered.
        mirrors: that it may have by the order, or is to keep. Without an order, those that
            somebody in the group has: they cost the others nothing.
        writes: whether it writes those that nobody in the group has; the others take over what
            one of them wrote.
    """

    order: Order | None
    mirrors: int
    writes: bool


@dataclass(frozen=True, slots=True)
class HolderFacts:
    """Who holds host memory in a domain, for people.

    Attributes:
        name: of the model, or as it stands in the ledger. replicas: that report; they share.
        priority: of its class; None for who does not report.
        granted_bytes: that it may pin and has not. revoked_bytes: that it is to give back.
        wanted_bytes: that it has a use for at its load, in all; None for who does not report.
        is_late: whether it should have given back what was revoked.
    """

    name: str
    replicas: tuple[str, ...]
    priority: int | None
    floor_bytes: int
    held_bytes: int
    granted_bytes: int
    revoked_bytes: int
    wanted_bytes: int | None
    is_late: bool


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """A domain's host memory as the controller knows it, for people.

    Attributes:
        nodes: on which its replicas run; one, unless containers are taken for nodes.
        capacity_bytes: that may be pinned, the budget's or the domain's.
        free_bytes: that nobody holds, is granted or waits for.
    """

    domain: str
    nodes: tuple[str, ...]
    capacity_bytes: int
    held_bytes: int
    free_bytes: int
    holders: tuple[HolderFacts, ...]
