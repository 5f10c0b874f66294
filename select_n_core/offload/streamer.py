"""The weight streamer: makes each unit's bytes present while it computes.

Streaming is a context around the forward (`with streamer.iteration(streamed): model(...)`).
Hooks on the layers acquire before and release after; acquire makes compute wait, release lets
the slot be refilled with the unit d tickets ahead, cyclically across iterations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
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

    Args:
        units: in call order, with the module that carries each.
        homes: unit -> its permanent device buffer.
        mirrors: unit -> its host buffer, registered with `link`.
        slots: the staging buffers.
        poison: fill every released slot with NaN, to prove that nobody reads it.
    """

    def __init__(
        self,
        units: Sequence[tuple[FlatUnit, nn.Module]],
        homes: Mapping[int, Tensor],
        mirrors: Mapping[int, Tensor],
        slots: Sequence[Tensor],
        link: Link,
        *,
        poison: bool = False,
    ) -> None:
        self._units = [unit for unit, _ in units]
        self._homes = dict(homes)
        self._mirrors = dict(mirrors)
        self._slots = list(slots)
        self._slot_free: list[Event | None] = [None] * len(self._slots)
        self._link = link
        self._poison = poison
        self._ring = Ring(len(self._slots)) if self._slots else None
        self._copies: dict[int, Copy] = {}  # by ticket number
        self._streamed: tuple[int, ...] = ()
        self._streamed_set: frozenset[int] = frozenset()
        self._cursor = 0  # place in `_streamed` of the next ticket to issue
        self._active = False
        self.span = Span()
        self.streamed_units = 0
        for index, home in self._homes.items():
            self._units[index].bind(home)
        for index, unit in enumerate(self._units):
            if index not in self._homes:
                unit.unbind()
        self._handles = [
            handle
            for index, (_, module) in enumerate(units)
            for handle in (
                module.register_forward_pre_hook(self._before(index)),
                module.register_forward_hook(self._after(index)),
            )
        ]

    @contextmanager
    def iteration(self, streamed: tuple[int, ...]) -> Iterator[None]:
        """One forward with `streamed` units (in call order) taken through the ring.

        A forward that raises drains the ring; the next iteration starts cold.
        """
        if self._active:
            raise StreamingError("an iteration is running already; iterations do not nest")
        self._check(streamed)
        if streamed != self._streamed:
            self._restart(streamed)
        self.span = Span()
        self._active = True
        try:
            if streamed and self._ring is not None and self._ring.in_flight == 0:
                for _ in range(self._ring.slots):
                    self._issue()
            yield
        except BaseException:
            self._restart(streamed)
            raise
        finally:
            self._active = False

    def acquire(self, unit: int) -> None:
        """Make `unit`'s bytes present: compute waits for its copy, the host does not."""
        if unit not in self._streamed_set or self._ring is None:
            return
        ticket = self._ring.acquire(unit)
        self._link.wait(self._copies.pop(ticket.number))
        self._units[unit].bind(self._slots[ticket.slot])

    def release(self, unit: int) -> None:
        """Let `unit`'s slot be refilled once the compute issued so far has read it."""
        if unit not in self._streamed_set or self._ring is None:
            return
        ticket = self._ring.release(unit)
        self._units[unit].unbind()
        if self._poison:
            self._slots[ticket.slot].fill_(_POISON)
        self._slot_free[ticket.slot] = self._link.compute_event()
        self.streamed_units += 1
        self._issue()

    def close(self) -> None:
        """Drain the ring and take the hooks off."""
        self._restart(())
        for handle in self._handles:
            handle.remove()
        self._homes.clear()
        self._mirrors.clear()
        self._slots.clear()

    def _issue(self) -> None:
        assert self._ring is not None
        unit = self._streamed[self._cursor]
        self._cursor = (self._cursor + 1) % len(self._streamed)
        ticket = self._ring.issue(unit)
        free = self._slot_free[ticket.slot]
        nbytes = self._units[unit].nbytes
        self._copies[ticket.number] = self._link.copy(
            self._slots[ticket.slot][:nbytes],
            self._mirrors[unit][:nbytes],
            kind=WEIGHTS,
            after=() if free is None else (free,),
        )

    def _restart(self, streamed: tuple[int, ...]) -> None:
        """Drain the ring and start cold with another set of streamed units."""
        self._link.drain()
        if self._ring is not None:
            self._ring.abandon()
        self._copies.clear()
        # Compute that was issued so far may still read a slot: a forward that raised released
        # nothing, and a fresh arena may be memory that its last owner's compute still uses.
        now = self._link.compute_event()
        self._slot_free = [now] * len(self._slots)
        for unit in self._streamed:
            if unit in self._homes:
                self._units[unit].bind(self._homes[unit])
            else:
                self._units[unit].unbind()
        self._streamed = streamed
        self._streamed_set = frozenset(streamed)
        self._cursor = 0

    def _check(self, streamed: tuple[int, ...]) -> None:
        if streamed == self._streamed:
            return
        if list(streamed) != sorted(set(streamed)):
            raise StreamingError(f"streamed units must be in call order, got {streamed}")
        if streamed and self._ring is None:
            raise StreamingError("nothing can be streamed: the arena has no staging ring")
        if missing := [unit for unit in streamed if unit not in self._mirrors]:
            raise StreamingError(f"units {missing} have no mirror to stream from")
        streaming = set(streamed)
        homeless = [
            unit
            for unit in range(len(self._units))
            if unit not in self._homes and unit not in streaming
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
