"""The model as it is measured: placed once, in an arena in which k turns between visits.

One placement serves everything, so that shapes, thread modes and k alternate within seconds: what
the machine does to one, it does to all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from select_n_core.decisions.layout import ModelMemory, arena_bytes_for
from select_n_core.errors import DeviceMemoryError, HostMemoryError
from select_n_core.links.base import Link
from select_n_core.memory.available import available_device_bytes, available_host_bytes
from select_n_core.models.load import LoadedModel
from select_n_core.offload.executor import Executor
from select_n_core.offload.graphs import Graphs
from select_n_core.offload.placement import Placement, compute_threads, model_memory
from select_n_core.profiling.clock import DeviceClock, HostClock
from select_n_core.profiling.passes import BLOCK_TOKENS, RING_WARM_UP, Pass, Shape, run_passes
from select_n_core.quantities import format_bytes

_USABLE = 0.8  # of the memory that is free
_KV_SHARE = 0.25  # of the usable device memory that one shape may take
_CAPTURE = 2  # steps before a graph is replayed


@dataclass(frozen=True, slots=True)
class Room:
    """How far k may turn while measuring, and how much KV there is.

    Attributes:
        least: what must be streamed, because the device cannot hold everything. most: what host
            memory can mirror.
        blocks: of KV.
    """

    least: int
    most: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Case:
    """A shape and how it runs.

    Attributes:
        resident: in the thread mode of k = 0; else in that of streaming, also at k = 0.
    """

    shape: Shape
    k: int
    resident: bool = False


class Rig:
    """A placed model on its link.

    Attributes:
        room: see `Room`.
        resident_threads: of the resident mode.
    """

    def __init__(self, executor: Executor, room: Room) -> None:
        self.executor = executor
        self.link = executor.link
        self.device = executor.device
        self.room = room
        self.resident_threads = 1
        cuda = executor.device.type == "cuda"
        self._clock = DeviceClock(executor.model) if cuda else HostClock(executor)

    @property
    def streaming_k(self) -> int:
        """The k at which the streaming mode's compute is measured: as idle a link as can be."""
        return self.room.least

    def run(self, case: Case, repeats: int) -> list[Pass]:
        """`repeats` passes of the case, warmed up."""
        self._mode(case.resident)
        moved = case.k != self.executor.k
        self.executor.turn(case.k)
        warm_up = RING_WARM_UP if case.k or moved else 1
        if case.resident and self.executor.graphs is not None:
            warm_up += _CAPTURE
        return run_passes(self.executor, self._clock, case.shape, repeats, warm_up)

    def run_once(self, case: Case) -> Pass:
        """One pass at once, where the same case has just run."""
        return run_passes(self.executor, self._clock, case.shape, 1, warm_up=0)[0]

    def close(self) -> None:
        """Take the clock's hooks off."""
        self._clock.close()

    def _mode(self, resident: bool) -> None:
        threads = self.resident_threads if resident else compute_threads(1)
        self.executor.placement = replace(
            self.executor.placement, threads=threads, resident_threads=threads
        )
        if self.executor.graphs is not None:
            self.executor.graphs.enabled = resident


@contextmanager
def placed(
    model: LoadedModel, link: Link, device: torch.device, shapes: Sequence[Shape], slots: int
) -> Iterator[Rig]:
    """The model in an arena that holds the first of `shapes`, and the largest if there is room.

    Raises:
        DeviceMemoryError, HostMemoryError: there is not enough for the first shape.
    """
    memory = model_memory(model, BLOCK_TOKENS)
    room = find_room(memory, device, shapes, slots)
    placement = Placement(
        arena_bytes=_arena_bytes(memory, room.least, slots, room.blocks),
        k=room.least,
        k_min=room.least,
        k_max=room.most,
        mirrors=room.most,
        slots=slots,
        block_tokens=BLOCK_TOKENS,
        graphs=Graphs.RESIDENT if device.type == "cuda" else Graphs.OFF,
    )
    executor = Executor(model, placement, link, device)
    rig = Rig(executor, room)
    try:
        yield rig
    finally:
        rig.close()
        executor.close()


def find_room(
    memory: ModelMemory, device: torch.device, shapes: Sequence[Shape], slots: int
) -> Room:
    """The least and the most that may be streamed in the memory that is free now.

    The first of `shapes` must fit; larger ones take no more than their share of the memory.

    Raises:
        DeviceMemoryError, HostMemoryError: there is not enough for the first shape.
    """
    host = int(_USABLE * available_host_bytes())
    free = int(_USABLE * available_device_bytes(device))
    if device.type == "cpu" and sum(memory.unit_bytes) > host // 2:
        host = free = host // 2  # both are the same memory
    most = memory.host_cap(host)
    if not most:
        raise HostMemoryError(
            f"measuring this model needs {format_bytes(memory.slot_bytes)} of host memory for a "
            f"unit, {format_bytes(host)} are free; free memory on this machine"
        )
    wanted = max(shape.blocks() for shape in shapes)
    blocks = max(shapes[0].blocks(), min(wanted, int(_KV_SHARE * free) // memory.kv_block_bytes))
    for least in range(most + 1):
        if _arena_bytes(memory, least, slots, blocks) <= free:
            return Room(least, most, blocks)
    raise DeviceMemoryError(
        f"measuring this model needs {format_bytes(_arena_bytes(memory, most, slots, blocks))} of "
        f"device memory with {most} of {memory.units} units streamed, {format_bytes(free)} are "
        "free; free memory on this machine"
    )


def _arena_bytes(memory: ModelMemory, k: int, slots: int, blocks: int) -> int:
    """For `blocks` KV blocks at k and above, in an arena that has a ring at k = 0 too."""
    ring = 0 if k else slots * memory.slot_bytes
    return arena_bytes_for(memory, k, slots, blocks + 1) + ring
