"""Where everything lies in the device arena: a pure function of sizes and k.

    | static | homes in reverse pi | KV blocks | ring of d slots |

The home next to be demoted touches the KV region, so turning k moves one boundary. Block ids
count on one lattice that ends where the KV region ends: id 0 is the lowest address.
"""

from __future__ import annotations

from dataclasses import dataclass

from select_n_core.decisions.order import offload_order
from select_n_core.errors import InputError


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Sizes of a model in bytes; every size is a multiple of the arena's alignment.

    Attributes:
        static_bytes: all tensors that are in no unit.
        unit_bytes: of each unit, in call order.
        kv_block_bytes: one block of `block_tokens` tokens, all layers, K and V.
    """

    static_bytes: int
    unit_bytes: tuple[int, ...]
    kv_block_bytes: int
    block_tokens: int

    @property
    def units(self) -> int:
        """L, the number of units."""
        return len(self.unit_bytes)

    @property
    def slot_bytes(self) -> int:
        """A staging slot holds the largest unit."""
        return max(self.unit_bytes)

    def mirrored_bytes(self, k: int) -> int:
        """Host bytes of the mirrors of pi's first `k` units."""
        return sum(self.unit_bytes[unit] for unit in offload_order(self.units)[:k])

    def host_cap(self, host_bytes: int) -> int:
        """The largest k whose mirrors fit `host_bytes`."""
        used = 0
        for count, unit in enumerate(offload_order(self.units)):
            used += self.unit_bytes[unit]
            if used > host_bytes:
                return count
        return self.units

    def blocks_of(self, tokens: int) -> int:
        """KV blocks that `tokens` tokens of one request take."""
        return -(-tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """Byte offsets into the arena.

    Attributes:
        homes: unit -> offset, for every unit at home.
        kv_offset: of block 0. kv_blocks: how many blocks fit.
        slots: offsets of the staging slots; empty at k = 0, when the ring is KV space too.
    """

    homes: dict[int, int]
    kv_offset: int
    kv_blocks: int
    slots: tuple[int, ...]


def device_layout(memory: ModelMemory, arena_bytes: int, k: int, slots: int) -> DeviceLayout | None:
    """The layout with pi's first `k` units streamed; None when even zero KV blocks do not fit."""
    if not 0 <= k <= memory.units:
        raise InputError(f"k must be between 0 and {memory.units}, got {k}", field="k")
    offset = memory.static_bytes
    homes: dict[int, int] = {}
    for unit in reversed(offload_order(memory.units)[k:]):
        homes[unit] = offset
        offset += memory.unit_bytes[unit]
    # The arena's size is the user's and need not be aligned: slots start on the last boundaries.
    ring_bytes = slots * memory.slot_bytes if k else 0
    kv_end = (arena_bytes - ring_bytes) // 256 * 256
    if kv_end < offset:
        return None
    blocks = (kv_end - offset) // memory.kv_block_bytes
    ring = tuple(kv_end + index * memory.slot_bytes for index in range(slots)) if k else ()
    return DeviceLayout(
        homes=homes,
        kv_offset=kv_end - blocks * memory.kv_block_bytes,
        kv_blocks=blocks,
        slots=ring,
    )


def arena_bytes_for(memory: ModelMemory, k: int, slots: int, blocks: int) -> int:
    """The smallest arena that holds `blocks` KV blocks with `k` units streamed."""
    return (
        memory.static_bytes
        + sum(memory.unit_bytes)
        - memory.mirrored_bytes(k)
        + (slots * memory.slot_bytes if k else 0)
        + blocks * memory.kv_block_bytes
    )
