"""The latency model while serving: as recorded, corrected by what is seen, at the granted link.

What is seen of compute corrects the model. What is seen of the link corrects it too while a
replica has the link to itself; beside others on a bus it goes to the bus's one estimate of its
capacity, and the model takes the share that was granted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from select_n_core.decisions.bus import Grant
from select_n_core.decisions.correction import Correction, Seen
from select_n_core.decisions.grant import Ration, streamed_bytes, within_grant
from select_n_core.decisions.latency import LatencyModel

_IN_TIME = 0.9  # of the promise that a step may take, for the share of a bus that it asks for


class Bus(Protocol):
    """A replica's seat on a bus; `links.board.Member` is one."""

    @property
    def grant(self) -> Grant:
        """What this member may count on, as of its last tick."""
        ...

    @property
    def members(self) -> int:
        """Living members, this one among them."""
        ...

    def tick(
        self,
        demand_bytes_per_s: float,
        *,
        seen_bytes_per_s: float | None = None,
        copying_share: float | None = None,
    ) -> float:
        """Say what is wanted and what copies saw; the granted share, in bytes/s."""
        ...

    def leave(self) -> None:
        """Give the share and the place back."""
        ...


class OnlineModel:
    """The latency model that decisions take, iteration by iteration.

    Args:
        recorded: of the offline stage. unit_bytes: of the largest unit.
        bus: None where the link is the replica's own.
        tpot_s: the promise; on a bus nobody asks for more than to keep it.
        corrected: False keeps to the record, whatever is seen.
    """

    def __init__(
        self,
        recorded: LatencyModel,
        slots: int,
        unit_bytes: int,
        bus: Bus | None = None,
        *,
        tpot_s: float,
        corrected: bool = True,
    ) -> None:
        self.correction = Correction()
        self._recorded = recorded
        self._granted = recorded  # what the bus leaves of it
        self._slots = slots
        self._unit_bytes = unit_bytes
        self._bus = bus
        self._step_s = _IN_TIME * tpot_s
        self._ration = Ration()
        self._corrected = corrected
        self._shares = False  # the bus, with somebody
        self._seen: Seen | None = None  # since the last tick

    @property
    def latency(self) -> LatencyModel:
        """The model as it is now."""
        return self.correction.applied(self._granted)

    @property
    def reserve(self) -> float:
        """Share by which a step may take longer than predicted."""
        return self.correction.error

    def rest_s(self, now_s: float) -> float:
        """Seconds to wait before the next iteration: the others on the bus need them more."""
        return self._ration.rest_s(now_s) if self._shares else 0.0

    def begins(self, k: int, now_s: float) -> None:
        """An iteration that streams `k` units begins."""
        if self._bus is not None and self._shares:
            moved = streamed_bytes(self._recorded, k, self._unit_bytes)
            self._ration.moved(moved, now_s, self._bus.grant)

    def saw(self, seen: Seen) -> None:
        """An iteration has ended."""
        self._seen = seen
        if not self._corrected:
            return
        if self._shares:
            seen = replace(seen, transfer_s=None)
        self.correction = self.correction.after(seen, self._granted, self._slots)

    def tick(self, k: int) -> None:
        """Take part in sharing the bus, before every step's decision.

        Args:
            k: units that would be streamed were there no others; 0 if there is no step to come.
        """
        if self._bus is None:
            return
        demand_bytes_per_s = streamed_bytes(self._recorded, k, self._unit_bytes) / self._step_s
        seen, self._seen = self._seen, None
        if seen is None or not seen.transfer_s or not seen.seconds > 0:
            self._bus.tick(demand_bytes_per_s)
        else:
            self._bus.tick(
                demand_bytes_per_s,
                seen_bytes_per_s=self._unit_bytes / seen.transfer_s,
                copying_share=min(1.0, seen.copied_s / seen.seconds),
            )
        if not self._corrected:
            return
        self._shares = self._bus.members > 1
        if self._shares:
            self.correction = replace(self.correction, transfer=1.0)
            self._granted = within_grant(self._recorded, self._unit_bytes, self._bus.grant)
        else:
            self._granted = self._recorded

    def close(self) -> None:
        """Leave the bus. Idempotent."""
        if self._bus is not None:
            self._bus.leave()
