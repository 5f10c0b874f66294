"""The executor: a placed model. It owns the arena, the mirrors, the KV cache and the streamer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from select_n_core.decisions.layout import DeviceLayout, device_layout
from select_n_core.decisions.order import streamed_units
from select_n_core.errors import DeviceMemoryError, HostMemoryError, InputError
from select_n_core.kv.attention import Row
from select_n_core.kv.blocks import BlockTable
from select_n_core.kv.cache import KVCache
from select_n_core.kv.pick import AttentionKind, pick_attention
from select_n_core.kv.upload import upload
from select_n_core.links.base import Link
from select_n_core.memory.arena import Arena
from select_n_core.memory.workspace import keep_workspace
from select_n_core.models.load import LoadedModel
from select_n_core.offload.capture import GraphRuntime
from select_n_core.offload.graphs import DecodeGraphs, DecodeRow, graph_runtime
from select_n_core.offload.mirrors import HostMaps, Mirrors, PrivateMaps
from select_n_core.offload.placement import (
    LinkTime,
    Placement,
    StepRow,
    compute_threads,
    model_memory,
)
from select_n_core.offload.streamer import WeightStreamer
from select_n_core.units import FlatUnit


class Executor:
    """Runs steps of a model that was placed into an arena with k units in host memory.

    Between steps, `turn` changes k and `lease` what host memory may be used, towards which every
    step makes a move. The link is the caller's and must outlive the executor.

    Args:
        maps: where mirrors come from.
        graphs: what captures `placement.graphs`; None is the device's own.

    Raises:
        DeviceMemoryError: the placement does not fit the arena.
    """

    def __init__(
        self,
        model: LoadedModel,
        placement: Placement,
        link: Link,
        device: torch.device,
        maps: HostMaps | None = None,
        graphs: GraphRuntime | None = None,
    ) -> None:
        self.model = model
        self.placement = placement
        self.link = link
        self.device = device
        self.memory = model_memory(model, placement.block_tokens)
        self.k = placement.k
        self._stalled_s = 0.0
        self._closed = False
        graphs = graphs or graph_runtime(placement.graphs, device)
        self.layout = self._layout()
        # Static tensors stay plain: packing takes a tensor's size again for a moment, and an output
        # head can be larger than the units that loading has room for.
        for unit in model.units:
            unit.pack(device)
        self.arena = Arena(placement.arena_bytes, device)
        self._mirrors = self._fill_mirrors(maps or PrivateMaps())
        self._homes = self._fill_homes()
        self._streamer = WeightStreamer(
            [
                (unit, run.first, run.last)
                for unit, run in zip(model.units, model.runs, strict=True)
            ],
            self._homes,
            self.mirrors,
            [self.arena.region(offset, self.memory.slot_bytes) for offset in self.layout.slots],
            link,
            streamed=self.streamed,
            poison=placement.poison,
        )
        self.cache = self._make_cache(
            self.arena.region(
                self.layout.lattice_offset,
                self.layout.lattice_blocks * self.memory.kv_block_bytes,
            )
        )
        self.blocks = BlockTable(
            self.layout.kv_ids(self.k), placement.block_tokens, self.layout.ring_id
        )
        self._attention = pick_attention(
            self.cache, model.kv, model.dtype, device, placement.attention
        )
        self._graphs: DecodeGraphs | None = None
        if graphs is not None:
            self._graphs = DecodeGraphs(
                model.module,
                [(run.first, run.last) for run in model.runs],
                self._streamer,
                self._attention,
                graphs,
                placement.graphs,
            )
        if device.type == "cpu":
            keep_workspace()  # of steps; what loading freed has gone back by now

    @property
    def attention(self) -> AttentionKind:
        """The attention that was picked."""
        return self._attention.kind

    @property
    def graphs(self) -> DecodeGraphs | None:
        """The captured steps, for their counters; None where nothing is captured."""
        return self._graphs

    @property
    def streamed(self) -> tuple[int, ...]:
        """The units that k says are to be streamed, in call order."""
        return streamed_units(self.memory.units, self.k)

    @property
    def m(self) -> int:
        """Units mirrored; k may rise to as many."""
        return self._mirrors.m

    @property
    def cap(self) -> int:
        """The most units that the lease allows to stream, once they are mirrored."""
        return min(self.layout.k_max, self._mirrors.cap)

    @property
    def lease_bytes(self) -> int:
        """Host bytes that mirrors may take."""
        return self._mirrors.lease_bytes

    def shortfall(self, k: int) -> int:
        """KV blocks that must be released before `turn(k)`."""
        if self._ring_changes_hands(k):
            return self.blocks.shortfall(self.layout.kv_ids(k))
        return self.blocks.shortfall(self._kept_ids(k))

    def turn(self, k: int) -> None:
        """Stream pi's first `k` units from the next step on.

        Costs no link bytes: a demoted unit's mirror exists, a promoted unit's next copy goes to
        its home. KV blocks in homes that are needed again move now; the homes and slots that the
        next step frees hold KV after it. From k = 0 or to it, where the KV does not fit what lies
        in neither homes nor ring, the ring is emptied and the KV goes from one to the other at
        once: up to d units' copies that were ahead are lost.

        Raises:
            DeviceMemoryError: `shortfall(k)` blocks are in the way; nothing was changed.
            InputError: k is not between k_min and what is mirrored.
        """
        if k > self.m:
            raise InputError(f"k can be {self.m} at most, as many are mirrored; got {k}", field="k")
        if self._ring_changes_hands(k):
            moves = self.blocks.resize(self.layout.kv_ids(k))
            with torch.inference_mode():
                self._streamer.restart(
                    streamed_units(self.memory.units, k), partial(self.cache.move, moves)
                )
            self.k = k
            return
        moves = self.blocks.resize(self._kept_ids(k))
        with torch.inference_mode():
            self.cache.move(moves)
        self.k = k

    def lease(self, nbytes: int) -> None:
        """Let mirrors take `nbytes` from now on; `tend` makes it true.

        Where k is above the new `cap`, it must be turned down before mirrors can go.

        Raises:
            HostMemoryError: the units without a home need more, or there is no room for as much
                more as that; nothing was changed.
        """
        floor = self.memory.mirrored_bytes(self.layout.k_min)
        if nbytes < floor:
            raise HostMemoryError(
                f"a lease of {nbytes} bytes is below the floor of {floor}: the {self.layout.k_min} "
                "units without a home on the device cannot do without their mirrors"
            )
        self._mirrors.lease(nbytes)

    def tend(self) -> None:
        """Make a move towards the lease: free mirrors that it does not cover, or write one more.

        Between steps; never waits for a copy unless a mirror that was being written must go.
        """
        if self.m >= self.cap:
            self._mirrors.stop_growing()
        while (last := self._mirrors.to_drop) is not None:
            if self._streamer.needs_mirror(last):
                return
            self._streamer.drop_mirror(last)
            self._mirrors.drop(last)
        if self.m < self.cap and (unit := self._mirrors.grow(self._homes.__getitem__)) is not None:
            self._streamer.add_mirror(unit, self._mirrors.bytes_of(unit))

    def settle(self) -> None:
        """Bring about what k says without a step, for a replica that has nothing to compute."""
        with torch.inference_mode():
            self._streamer.settle(self.streamed)
        self._lend()

    @property
    def host_bytes(self) -> int:
        """Bytes of all mirrors, exactly."""
        return self._mirrors.nbytes

    @property
    def streamer(self) -> WeightStreamer:
        """The weight streamer, for its counters and its span."""
        return self._streamer

    @property
    def mirrors(self) -> dict[int, Tensor]:
        """Unit -> its host bytes."""
        return {unit: self._mirrors.bytes_of(unit) for unit in self._mirrors.units()}

    def step(self, rows: Sequence[StepRow]) -> Tensor:
        """One forward over the rows' new tokens, packed.

        Returns:
            [rows that want logits, vocab]: after each one's last new token, in order.
        """
        self._set_threads()
        with torch.inference_mode():
            logits = self._replayed(rows)
            if logits is None:
                logits = self._forward(rows)
        self._lend()
        return logits

    def _replayed(self, rows: Sequence[StepRow]) -> Tensor | None:
        """The step as a captured graph, where there is one for it."""
        if self._graphs is None or any(len(row.tokens) > 1 for row in rows):
            return None
        size = self.placement.block_tokens
        decoding = [
            DecodeRow(
                Row(row.blocks[: row.context // size + 1], row.context, 1),
                row.tokens[0],
                row.logits,
            )
            for row in rows
        ]
        return self._graphs.step(decoding, self.streamed)

    def _forward(self, rows: Sequence[StepRow]) -> Tensor:
        attention = self._attention.step(
            [Row(row.blocks, row.context, len(row.tokens)) for row in rows]
        )
        last, ends = -1, []
        for row in rows:
            last += len(row.tokens)
            if row.logits:
                ends.append(last)
        tokens, keep = upload([[token for row in rows for token in row.tokens], ends], self.device)
        with self._streamer.iteration(self.streamed):
            logits: Tensor = self.model.module(
                input_ids=tokens[None],
                position_ids=attention.positions[None],
                use_cache=False,
                logits_to_keep=keep,
                select_n=attention,
            ).logits[0]
        return logits

    def take_link_time(self) -> LinkTime:
        """What the link took of the steps since the last call."""
        stalled_s, self._stalled_s = self._stalled_s, self.link.counters.stall_s
        used = self._streamer.take_used()
        per_byte_s = [seconds / nbytes for nbytes, seconds in used]
        return LinkTime(
            stall_s=self._stalled_s - stalled_s if self.device.type == "cpu" else None,
            transfer_s=self.memory.slot_bytes * median(per_byte_s) if per_byte_s else None,
            copied_s=sum(seconds for _, seconds in used),
        )

    def close(self) -> None:
        """Give arena and mirrors back; the model is left without tensors. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._streamer.close()
        self.link.drain()
        for unit in [*self.model.units, self.model.static]:
            unit.forget_views()
            unit.unbind()
        self._graphs = None
        del self.cache, self._attention
        self._homes.clear()
        self._mirrors.close()
        self.arena.close()

    def _make_cache(self, region: Tensor) -> KVCache:
        """The KV cache over the bytes that blocks may ever lie in."""
        return KVCache(region, self.model.kv, self.placement.block_tokens, self.model.dtype)

    def _layout(self) -> DeviceLayout:
        placement, k = self.placement, self.k
        k_min = k if placement.k_min is None else placement.k_min
        most = k if placement.k_max is None else placement.k_max
        layout = device_layout(self.memory, placement.arena_bytes, k_min, placement.slots, most)
        if layout is None:
            raise DeviceMemoryError(
                f"{k_min} of {self.memory.units} units streamed do not fit an arena of "
                f"{placement.arena_bytes} bytes; raise device_memory or stream more"
            )
        return layout

    def _kept_ids(self, k: int) -> range:
        """The KV blocks that exist now and may stay while k turns to `k`."""
        now, then = self.blocks.ids, self.layout.kv_ids(k)
        return range(max(now.start, then.start), min(now.stop, then.stop))

    def _ring_changes_hands(self, k: int) -> bool:
        """Whether KV must leave the ring for homes, or homes for the ring, on the way to `k`."""
        crosses = (self.k == 0) != (k == 0)
        return crosses and self.blocks.shortfall(self._kept_ids(k)) > 0

    def _lend(self) -> None:
        """Every unit had its turn since k was set: what is not needed any more holds KV now."""
        if self.blocks.ids != (lent := self.layout.kv_ids(self.k)):
            self.blocks.resize(lent)

    def _fill_mirrors(self, maps: HostMaps) -> Mirrors:
        placement = self.placement
        count = max(self.k, placement.mirrors or 0)
        lease_bytes = placement.lease_bytes
        if lease_bytes is None:
            lease_bytes = self.memory.mirrored_bytes(count)
        mirrors = Mirrors(self.memory, self.link, maps, lease_bytes, self.layout.k_max)
        mirrors.load([partial(_write, unit) for unit in self.model.units], count)
        return mirrors

    def _fill_homes(self) -> dict[int, Tensor]:
        static = self.arena.region(0, self.model.static.nbytes)
        self.model.static.fill(static)
        self.model.static.bind(static)
        homes: dict[int, Tensor] = {}
        for unit, offset in self.layout.homes.items():
            home = self.arena.region(offset, self.model.units[unit].nbytes)
            if unit not in self.streamed:
                self.model.units[unit].fill(home)
            homes[unit] = home
        return homes

    def _set_threads(self) -> None:
        if self.device.type != "cpu":
            return
        placement = self.placement
        resident = None if self.k else placement.resident_threads
        threads = resident or placement.threads or compute_threads(self.k)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _write(unit: FlatUnit, mirror: Tensor) -> None:
    unit.fill(mirror)
    unit.forget_views()  # of a mirror nobody computes with
