"""What controller and holders tell each other about host memory: reports, orders, and the fence.

A holder follows each order once, the later one last, and no controller before the latest that it
has heard of. Ends of grants are told on the clock of the holder's machine, so that nothing depends
on how the controller's runs: reports and readings of the domain's file carry its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from select_n_core.decisions.loans import Holder


@dataclass(frozen=True, slots=True)
class Pool:
    """What the controller read in a domain's file.

    Attributes:
        capacity_bytes: that may be pinned; the smaller of the domain's and the budget's.
        read_s: by the machine's clock.
        held_bytes: of every living holder, those that report to no or another controller among
            them.
    """

    id: str
    capacity_bytes: int
    read_s: float
    held_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """What a holder says of itself.

    Attributes:
        epoch: the highest that it has seen of a controller. answered: the last order of that
            epoch that it is done with: taken, refused, void, or given back, however late.
        sent_s: by its machine's clock.
    """

    holder: Holder
    domain: str
    epoch: int
    answered: int
    sent_s: float


@dataclass(frozen=True, slots=True)
class Order:
    """A grant of `nbytes` more, or, below zero, a revocation. Sent again until it is answered.

    Attributes:
        epoch, number: a controller's, and of the order to this holder; larger is later.
        rungs: that it may have, or is to keep; the same as `nbytes` more or less than it had.
        within_s: revoked bytes are to be given back so long after the order is first read.
        valid_until_s: by the holder's machine's clock; a grant is void from then on.
    """

    holder: str
    epoch: int
    number: int
    nbytes: int
    rungs: int
    within_s: float
    valid_until_s: float


@dataclass(frozen=True, slots=True)
class Fence:
    """A holder's side: which orders it follows, each once and in order.

    Attributes:
        epoch: the highest seen. taken: the last order of it that was begun.
    """

    epoch: int = 0
    taken: int = 0

    def seen(self, epoch: int) -> Fence:
        """After a controller was heard of: no earlier one is listened to any more."""
        return Fence(epoch) if epoch > self.epoch else self

    def admits(self, order: Order) -> bool:
        """Whether it is to be followed now: not a former controller's, and not yet begun."""
        return order.epoch > self.epoch or (order.epoch == self.epoch and order.number > self.taken)

    def after(self, order: Order) -> Fence:
        """After it was begun."""
        return Fence(order.epoch, order.number)


def is_void(order: Order, now_s: float) -> bool:
    """Whether a grant came too late to be taken; `now_s` is by its machine's clock.

    It is answered nevertheless, so that another may follow.
    """
    return order.nbytes > 0 and now_s >= order.valid_until_s
