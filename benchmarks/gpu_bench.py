"""What the sections of `benchmarks.gpu` share: the device, its link, a budget, a decoding batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from select_n_core.config import BusConfig, LinkConfig
from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.kv.pick import AttentionKind
from select_n_core.links.base import Direction, Link
from select_n_core.links.open import open_link
from select_n_core.memory.host import HostMap
from select_n_core.models.load import LoadedModel
from select_n_core.offload.capture import GraphRuntime
from select_n_core.offload.executor import Executor
from select_n_core.offload.graphs import Graphs
from select_n_core.offload.placement import Placement, StepRow, model_memory

BLOCK_TOKENS = 32
WARM_UP = 3


class Budget:
    """Wall time that a run may take in all."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self._end_s - time.monotonic()


@dataclass(frozen=True, slots=True)
class Rig:
    """The device under test.

    Attributes:
        iterations: measured per point, at most. budget: of the whole run.
        graphs: captures on a device without graphs of its own (tests); None is the device's.
    """

    link: Link
    device: torch.device
    iterations: int
    budget: Budget
    graphs: Callable[[], GraphRuntime] | None = None

    @property
    def modes(self) -> tuple[Graphs, ...]:
        """The ways to run a decode step that exist here."""
        if self.device.type == "cuda" or self.graphs is not None:
            return (Graphs.OFF, Graphs.ALL)
        return (Graphs.OFF,)

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def open_rig(
    kind: str,
    bandwidth: float,
    budget: Budget,
    iterations: int,
    graphs: Callable[[], GraphRuntime] | None = None,
    bus: BusConfig | None = None,
) -> Iterator[Rig]:
    """The rig for a link of this kind; `bandwidth` in bytes/s is an emulated link's."""
    config = (
        LinkConfig(kind="cuda", bus=bus)
        if kind == "cuda"
        else LinkConfig(kind="emulated", bandwidth=bandwidth, bus=bus)
    )
    link, device = open_link(config)
    try:
        yield Rig(link, device, iterations, budget, graphs)
    finally:
        link.close()


class Batch:
    """A decoding batch of a placed model in which k may turn from 0 to all units.

    The arena is capped to the weights, the ring and the batch's KV: what k frees holds more KV.
    """

    def __init__(
        self,
        rig: Rig,
        model: LoadedModel,
        *,
        slots: int,
        graphs: Graphs = Graphs.OFF,
        requests: int = 8,
        context: int = 512,
        mirrors: int | None = None,
        attention: AttentionKind | None = None,
    ) -> None:
        memory = model_memory(model, BLOCK_TOKENS)
        blocks = requests * memory.blocks_of(context + 1)
        every = memory.units
        placement = Placement(
            arena_bytes=arena_bytes_for(memory, 0, slots, blocks + 1) + slots * memory.slot_bytes,
            k=0,
            k_min=0,
            k_max=every,
            mirrors=every if mirrors is None else mirrors,
            lease_bytes=memory.mirrored_bytes(every if mirrors is None else mirrors),
            slots=slots,
            block_tokens=BLOCK_TOKENS,
            threads=1,
            attention=attention,
            graphs=graphs,
        )
        runtime = rig.graphs() if rig.graphs is not None and graphs is not Graphs.OFF else None
        self.executor = Executor(model, placement, rig.link, rig.device, graphs=runtime)
        self.units = every
        self.context = context
        self._rig = rig
        self._names = [str(index) for index in range(requests)]
        for name in self._names:
            self.executor.blocks.reserve(name, context + 1)

    def iteration(self, k: int, before: Callable[[], None] = lambda: None) -> float:
        """Seconds of one decode iteration with k turned to `k`, to the tokens on the host.

        `before` runs first and is timed too.
        """
        begun_s = time.perf_counter()
        before()
        self.executor.turn(k)
        self.logits()
        return time.perf_counter() - begun_s

    def logits(self) -> Tensor:
        """One decode step at the present k."""
        blocks = self.executor.blocks
        rows = [StepRow(blocks.table(name), self.context, [1]) for name in self._names]
        logits = self.executor.step(rows)
        logits.argmax(-1).tolist()
        return logits

    def iterations(self, k: int, *, warm_up: int = WARM_UP, most_s: float = 10.0) -> list[float]:
        """Seconds of the rig's number of iterations, fewer where they would take too long."""
        for _ in range(warm_up):
            last_s = self.iteration(k)
        count = max(2, min(self._rig.iterations, int(most_s / last_s)))
        return [self.iteration(k) for _ in range(count)]

    def close(self) -> None:
        """Give the arena and the mirrors back."""
        self.executor.close()


@contextmanager
def batch(rig: Rig, model: LoadedModel, **options: Any) -> Iterator[Batch]:
    """A `Batch` for a while."""
    made = Batch(rig, model, **options)
    try:
        yield made
    finally:
        made.close()


class UnitClock:
    """Times all units of a forward together, on the device's own clock."""

    def __init__(self, rig: Rig, model: LoadedModel) -> None:
        self._rig = rig
        self._marks: list[Any] = []
        self._handles = [
            model.runs[0].first.register_forward_pre_hook(self._mark),
            model.runs[-1].last.register_forward_hook(self._mark),
        ]

    def _mark(self, *_: Any) -> None:
        if self._rig.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each forward since the last call: from the first unit's start to the last's end."""
        self._rig.synchronize()
        marks, self._marks = self._marks, []
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if self._rig.device.type == "cuda":
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def copy_seconds(
    rig: Rig, nbytes: int, direction: Direction, count: int, link: Link | None = None
) -> list[float]:
    """Seconds of `count` copies of registered memory, one after another, by the link's clock."""
    link = rig.link if link is None else link
    host = HostMap(nbytes)
    host.bytes.fill_(1)
    target = torch.zeros(nbytes, dtype=torch.uint8, device=rig.device)
    link.register(host.bytes)
    ends = (target, host.bytes) if direction is Direction.TO_DEVICE else (host.bytes, target)
    rig.synchronize()
    copies = [link.copy(*ends, kind="benchmark", direction=direction) for _ in range(count + 2)]
    link.drain()
    link.unregister(host.bytes)
    host.close()
    return [copy.duration_s() for copy in copies[2:]]


def spread(seconds: list[float]) -> dict[str, float]:
    """Quantiles of some times."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    return {"p10_s": at(0.1), "p50_s": at(0.5), "p90_s": at(0.9), "max_s": ordered[-1]}
