"""The executor: a placed model. It owns the arena, the mirrors, the KV cache and the streamer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from select_n_core.decisions.layout import DeviceLayout, ModelMemory, device_layout
from select_n_core.decisions.order import offload_order, streamed_units
from select_n_core.errors import DeviceMemoryError
from select_n_core.kv.attention import PagedAttention, Row
from select_n_core.kv.blocks import BlockTable
from select_n_core.kv.cache import KVCache, block_bytes
from select_n_core.links.base import Link
from select_n_core.memory.arena import Arena
from select_n_core.memory.host import HostMap
from select_n_core.models.load import LoadedModel
from select_n_core.offload.streamer import WeightStreamer


def model_memory(model: LoadedModel, block_tokens: int) -> ModelMemory:
    """The sizes that layouts and plans are made from."""
    return ModelMemory(
        static_bytes=model.static.nbytes,
        unit_bytes=tuple(unit.nbytes for unit in model.units),
        kv_block_bytes=block_bytes(model.kv, block_tokens, model.dtype),
        block_tokens=block_tokens,
    )


def compute_threads(k: int) -> int:
    """Torch threads on a CPU: one beside a link worker, all cores when nothing is streamed."""
    return 1 if k else len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model is to be put.

    Attributes:
        arena_bytes: the whole device budget for weights, KV and ring, exactly.
        k: units streamed. slots: of the ring.
        mirrors: units mirrored (m), at least k.
        threads: torch threads on a CPU device; None follows `compute_threads`.
        poison: fill released slots with NaN.
    """

    arena_bytes: int
    k: int
    slots: int = 2
    mirrors: int | None = None
    block_tokens: int = 32
    threads: int | None = None
    poison: bool = False


@dataclass(frozen=True, slots=True)
class StepRow:
    """One request's part of a step: its KV blocks, what is cached, and the new tokens.

    Attributes:
        logits: whether the logits after its last new token are wanted.
    """

    blocks: Sequence[int]
    context: int
    tokens: Sequence[int]
    logits: bool = True


class Executor:
    """Runs steps of a model that was placed into an arena with k units in host memory.

    The link is the caller's and must outlive the executor.

    Raises:
        DeviceMemoryError: the placement does not fit the arena.
    """

    def __init__(
        self, model: LoadedModel, placement: Placement, link: Link, device: torch.device
    ) -> None:
        self.model = model
        self.placement = placement
        self.link = link
        self.device = device
        self.memory = model_memory(model, placement.block_tokens)
        self.k = placement.k
        self.streamed = streamed_units(self.memory.units, placement.k)
        self._closed = False
        layout = device_layout(self.memory, placement.arena_bytes, placement.k, placement.slots)
        if layout is None:
            raise DeviceMemoryError(
                f"{placement.k} of {self.memory.units} units streamed do not fit an arena of "
                f"{placement.arena_bytes} bytes; raise device_memory or stream more"
            )
        self.layout: DeviceLayout = layout
        self.arena = Arena(placement.arena_bytes, device)
        self._mirrors = self._fill_mirrors()
        self._streamer = WeightStreamer(
            list(zip(model.units, model.layers, strict=True)),
            self._fill_homes(),
            {unit: host.bytes for unit, host in self._mirrors.items()},
            [self.arena.region(offset, self.memory.slot_bytes) for offset in self.layout.slots],
            link,
            poison=placement.poison,
        )
        self.cache = KVCache(
            self.arena.region(
                self.layout.kv_offset, self.layout.kv_blocks * self.memory.kv_block_bytes
            ),
            model.kv,
            placement.block_tokens,
            model.dtype,
        )
        self.blocks = BlockTable(self.layout.kv_blocks, placement.block_tokens)

    @property
    def host_bytes(self) -> int:
        """Bytes of all mirrors, exactly."""
        return sum(host.nbytes for host in self._mirrors.values())

    @property
    def streamer(self) -> WeightStreamer:
        """The weight streamer, for its counters and its span."""
        return self._streamer

    @property
    def mirrors(self) -> dict[int, Tensor]:
        """Unit -> its host bytes."""
        return {unit: host.bytes for unit, host in self._mirrors.items()}

    def step(self, rows: Sequence[StepRow]) -> Tensor:
        """One forward over the rows' new tokens, packed.

        Returns:
            [rows that want logits, vocab]: after each one's last new token, in order.
        """
        attention = PagedAttention(
            self.cache,
            [Row(row.blocks, row.context, len(row.tokens)) for row in rows],
            self.device,
        )
        tokens = [token for row in rows for token in row.tokens]
        last, ends = -1, []
        for row in rows:
            last += len(row.tokens)
            if row.logits:
                ends.append(last)
        self._set_threads()
        with torch.inference_mode(), self._streamer.iteration(self.streamed):
            logits: Tensor = self.model.module(
                input_ids=torch.tensor(tokens, device=self.device)[None],
                position_ids=attention.positions[None],
                use_cache=False,
                logits_to_keep=torch.tensor(ends, dtype=torch.long, device=self.device),
                select_n=attention,
            ).logits[0]
        return logits

    def close(self) -> None:
        """Give arena and mirrors back; the model is left without tensors. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._streamer.close()
        self.link.drain()
        for host in self._mirrors.values():
            self.link.unregister(host.bytes)
        for unit in [*self.model.units, self.model.static]:
            unit.forget_views()
            unit.unbind()
        del self.cache
        for host in self._mirrors.values():
            host.close()
        self._mirrors.clear()
        self.arena.close()

    def _fill_mirrors(self) -> dict[int, HostMap]:
        count = self.placement.mirrors if self.placement.mirrors is not None else self.k
        mirrors: dict[int, HostMap] = {}
        for unit in offload_order(self.memory.units)[: max(count, self.k)]:
            host = HostMap(self.model.units[unit].nbytes)
            self.model.units[unit].fill(host.bytes)
            self.model.units[unit].forget_views()
            self.link.register(host.bytes)
            mirrors[unit] = host
        return mirrors

    def _fill_homes(self) -> dict[int, Tensor]:
        static = self.arena.region(0, self.model.static.nbytes)
        self.model.static.fill(static)
        self.model.static.bind(static)
        homes: dict[int, Tensor] = {}
        for unit, offset in self.layout.homes.items():
            home = self.arena.region(offset, self.model.units[unit].nbytes)
            self.model.units[unit].fill(home)
            homes[unit] = home
        return homes

    def _set_threads(self) -> None:
        if self.device.type != "cpu":
            return
        threads = self.placement.threads or compute_threads(self.k)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
