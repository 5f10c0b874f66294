"""The weight streamer: makes each unit's bytes present while it computes.

Streaming is a context around the forward (`with streamer.iteration(streamed): model(...)`).
Hooks on the layers acquire before and release after; acquire makes compute wait, release lets
the slot be refilled with the unit d tickets ahead, cyclically across iterations. Turning k costs
no copy of its own: a demoted unit's bytes are in its mirror already, and a promoted unit's next
copy goes to its home and stays there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from select_n_core.errors import StreamingError
from select_n_core.links.base import Copy, Event, Link
from select_n_core.offload.ring import Ring
from select_n_core.units import FlatUnit

WEIGHTS = "weights"
_POISON = 0xFF  # NaN in every floating type
_MOST_USED = 256  # copies kept to be timed


@dataclass(slots=True)
class Span:
    """Host times of one iteration's units, on the perf_counter clock (CPU compute only).

    Attributes:
        stamps: per unit in call order, (before its acquire, after it).
        end_s: after the last unit's release.
    """

    stamps: list[tuple[float, float]] = field(default_factory=list)
    end_s: float = 0.0

    def waits_s(self) -> list[float]:
        """Seconds each unit's acquire took."""
        return [after - before for before, after in self.stamps]

    def computes_s(self) -> list[float]:
        """Seconds from each unit's acquire to the next unit, without waits."""
        nexts = [before for before, _ in self.stamps[1:]] + [self.end_s]
        return [end - after for (_, after), end in zip(self.stamps, nexts, strict=True)]


class WeightStreamer:
    """Owns the staging ring and points units at homes and slots.

    The bytes of homes and slots belong to the caller, who may use a home for something else once
    its unit has left (`at_home`), and the slots while nothing is streamed.

    Args:
        units: in call order, each with the modules before which and after which it has its turn.
        homes: unit -> its permanent device buffer, filled unless the unit is in `streamed`.
        mirrors: unit -> its host buffer, registered with `link`.
        slots: the staging buffers.
        streamed: the units that start in host memory; by default those without a home.
        poison: fill every released slot with NaN, to prove that nobody reads it.
    """

    def __init__(
        self,
        units: Sequence[tuple[FlatUnit, nn.Module, nn.Module]],
        homes: Mapping[int, Tensor],
        mirrors: Mapping[int, Tensor],
        slots: Sequence[Tensor],
        link: Link,
        *,
        streamed: Iterable[int] | None = None,
        poison: bool = False,
    ) -> None:
        self._units = [unit for unit, _, _ in units]
        self._homes = dict(homes)
        self._mirrors = dict(mirrors)
        self._slots = list(slots)
        self._slot_free: list[Event | None] = [None] * len(self._slots)
        self._homes_free: Event | None = None  # of those to be promoted
        self._link = link
        self._poison = poison
        if streamed is None:
            streamed = set(range(len(self._units))) - self._homes.keys()
        self._ring = Ring(len(self._units), len(self._slots), streamed)
        self._copies: dict[int, Copy] = {}  # by ticket number
        self._used: deque[tuple[Copy, int]] = deque(maxlen=_MOST_USED)  # not timed yet, bytes
        self._bound: set[int] = set()  # units that point at their homes
        self._active = False
        self.span = Span()
        self.streamed_units = 0
        self.promoted_units = 0
        self._point_at_homes()
        self._handles = [
            handle
            for index, (_, first, last) in enumerate(units)
            for handle in (
                first.register_forward_pre_hook(self._before(index)),
                last.register_forward_hook(self._after(index)),
            )
        ]

    @property
    def at_home(self) -> frozenset[int]:
        """Units that keep their homes busy; all others' homes are free to use between iterations.

        After an iteration with other `streamed` units than before, none of these is among them.
        """
        return self._ring.at_home

    def phase(self, streamed: Collection[int]) -> int | None:
        """Which slot the first of `streamed` will have, if the last iteration was one like it.

        None while some unit still moves between its home and the ring: then iterations differ.
        """
        settled = self._bound == self._ring.at_home and self._ring.wanted == frozenset(streamed)
        return self._ring.phase if settled and not self._active else None

    @contextmanager
    def iteration(self, streamed: Collection[int]) -> Iterator[None]:
        """One forward; `streamed` units are taken through the ring as soon as that is possible.

        The homes of units that are not to be streamed any more, and the slots if any are, must
        be free when it begins. A forward that raises drains the ring; the next iteration starts
        cold.
        """
        if self._active:
            raise StreamingError("an iteration is running already; iterations do not nest")
        self._want(frozenset(streamed))
        self.span = Span()
        self._active = True
        try:
            self._issue()
            yield
        except BaseException:
            self._restart()
            raise
        else:
            self._leave_homes()
        finally:
            self._active = False

    def settle(self, streamed: Collection[int]) -> None:
        """What an iteration with `streamed` units would lead to, without one; blocks the host.

        For a replica that has nothing to compute. Costs the bytes of the units it brings home.
        """
        self.restart(streamed)
        away = set(range(len(self._units))) - self._ring.wanted - self._ring.at_home
        copies = {
            unit: self._link.copy(
                self._homes[unit][: self._units[unit].nbytes],
                self._mirrors[unit][: self._units[unit].nbytes],
                kind=WEIGHTS,
                after=() if self._homes_free is None else (self._homes_free,),
            )
            for unit in sorted(away)
        }
        for unit, copy in copies.items():
            self._link.wait(copy)
            self._ring.bring_home(unit)
            self._units[unit].bind(self._homes[unit])
            self._bound.add(unit)

    def restart(
        self, streamed: Collection[int], hand_over: Callable[[], None] | None = None
    ) -> None:
        """Stream `streamed` units from the next iteration on, which starts with an empty ring.

        Args:
            hand_over: called while slots, the homes of `streamed` units and those of units that
                are still to be brought home are all the caller's, who has until it returns to
                issue, as compute, what takes its bytes from one to the other.
        """
        if self._active:
            raise StreamingError("an iteration is running; it settles what is to be streamed")
        self._want(frozenset(streamed))
        self._restart()
        if hand_over is not None:
            hand_over()
            self._free_after_compute()

    def acquire(self, unit: int) -> None:
        """Make `unit`'s bytes present: compute waits for its copy, the host does not."""
        ticket = self._ring.acquire(unit)
        if ticket is not None:
            copy = self._copies.pop(ticket.number)
            self._link.wait(copy)
            self._used.append((copy, self._units[unit].nbytes))
            if ticket.slot is None:
                self._units[unit].bind(self._homes[unit])
                self._bound.add(unit)
            else:
                self._units[unit].bind(self._slots[ticket.slot])
        self._issue()  # with more slots than streamed units, this one's next copy may begin

    def release(self, unit: int) -> None:
        """Let `unit`'s slot be refilled once the compute issued so far has read it."""
        ticket = self._ring.release(unit)
        if ticket is not None:
            self.streamed_units += 1
            if unit not in self._ring.wanted:
                self.promoted_units += 1
            if ticket.slot is not None:
                self._empty(unit, self._slots[ticket.slot])
                self._slot_free[ticket.slot] = self._link.compute_event()
        self._issue()

    def take_used(self) -> list[tuple[int, float]]:
        """Bytes and link seconds of each copy that compute has used, since the last call.

        One that the device has not got to yet is told next time.
        """
        used = []
        while self._used and self._used[0][0].done():
            copy, nbytes = self._used.popleft()
            used.append((nbytes, copy.duration_s()))
        return used

    def add_mirror(self, unit: int, mirror: Tensor) -> None:
        """Let `unit` be streamed from `mirror`, which is filled and registered."""
        self._mirrors[unit] = mirror

    def needs_mirror(self, unit: int) -> bool:
        """Whether `unit` is streamed, or a copy from its mirror is still to be used."""
        return unit not in self._bound or unit in self._ring.wanted

    def drop_mirror(self, unit: int) -> None:
        """Forget `unit`'s mirror.

        Raises:
            StreamingError: it is still needed.
        """
        if self.needs_mirror(unit):
            raise StreamingError(f"unit {unit} still needs its mirror; promote it first")
        self._mirrors.pop(unit, None)

    def close(self) -> None:
        """Drain the ring and take the hooks off."""
        self._restart()
        for handle in self._handles:
            handle.remove()
        self._homes.clear()
        self._mirrors.clear()
        self._slots.clear()

    def _issue(self) -> None:
        """Issue every copy that has a place to go to."""
        while (ticket := self._ring.issue()) is not None:
            unit = self._units[ticket.unit]
            if ticket.slot is None:
                target, free = self._homes[ticket.unit], self._homes_free
            else:
                target, free = self._slots[ticket.slot], self._slot_free[ticket.slot]
                self._unbind_home(ticket.unit)
            self._copies[ticket.number] = self._link.copy(
                target[: unit.nbytes],
                self._mirrors[ticket.unit][: unit.nbytes],
                kind=WEIGHTS,
                after=() if free is None else (free,),
            )

    def _empty(self, unit: int, slot: Tensor) -> None:
        """Leave a slot; a unit that was promoted while it was on its way here goes home."""
        nbytes = self._units[unit].nbytes
        if unit in self._ring.wanted:
            self._units[unit].unbind()
        else:
            self._link.move(self._homes[unit][:nbytes], slot[:nbytes])
            self._units[unit].bind(self._homes[unit])
            self._bound.add(unit)
        if self._poison:
            slot.fill_(_POISON)

    def _want(self, streamed: frozenset[int]) -> None:
        if streamed == self._ring.wanted:
            return
        self._check(streamed)
        self._ring.want(streamed)
        # What held KV until now may be overwritten once the compute issued so far is over.
        self._free_after_compute()
        self._leave_homes()

    def _free_after_compute(self) -> None:
        self._homes_free = self._link.compute_event()
        self._slot_free = [self._homes_free] * len(self._slots)

    def _leave_homes(self) -> None:
        for unit in self._ring.leave_home():
            self._unbind_home(unit)

    def _unbind_home(self, unit: int) -> None:
        if unit in self._bound:
            self._bound.remove(unit)
            self._units[unit].unbind()

    def _restart(self) -> None:
        """Drain the ring; the next iteration starts cold."""
        self._link.drain()
        self._ring.abandon()
        self._copies.clear()
        self._used.clear()  # one that failed is the iteration's error, not a time
        # Compute that was issued so far may still read a slot or a home: a forward that raised
        # released nothing, and a fresh arena may be memory that its last owner's compute uses.
        self._free_after_compute()
        self._point_at_homes()
        self._leave_homes()

    def _point_at_homes(self) -> None:
        self._bound = set(self._ring.at_home)
        for index, unit in enumerate(self._units):
            if index in self._bound:
                unit.bind(self._homes[index])
            else:
                unit.unbind()

    def _check(self, streamed: frozenset[int]) -> None:
        if streamed and not self._slots:
            raise StreamingError("nothing can be streamed: the arena has no staging ring")
        if unknown := [unit for unit in sorted(streamed) if unit not in self._mirrors]:
            raise StreamingError(f"units {unknown} have no mirror to stream from")
        homeless = [
            unit
            for unit in range(len(self._units))
            if unit not in self._homes and unit not in streamed
        ]
        if homeless:
            raise StreamingError(f"units {homeless} have no home and must be streamed")

    def _before(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            if self._active:
                before_s = time.perf_counter()
                self.acquire(index)
                self.span.stamps.append((before_s, time.perf_counter()))

        return hook

    def _after(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
            if self._active:
                self.release(index)
                self.span.end_s = time.perf_counter()

        return hook
