"""Where everything lies in the device arena: a pure function of sizes and the range of k.

    | static | homes in reverse pi | KV blocks | ring of d slots |

The home next to be demoted touches the KV region, so turning k moves one boundary. Block ids
count on one lattice over all bytes that may ever hold KV, whole at the ring's edge: id 0 is the
lowest address, and an id exists only while all its bytes are lent. At k = 0 the ring is lent too.
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
    """Byte offsets into the arena, for every k from k_min to k_max.

    Attributes:
        homes: unit -> offset, for all but pi's first k_min units.
        slots: offsets of the staging slots; none where nothing may ever be streamed.
        lattice_offset: of block 0. lattice_blocks: all ids that may ever exist.
        ring_id: the ids from here on lie in the ring.
        first_ids: the lowest id that exists, at each k from k_min on.
    """

    k_min: int
    k_max: int
    homes: dict[int, int]
    slots: tuple[int, ...]
    lattice_offset: int
    lattice_blocks: int
    ring_id: int
    first_ids: tuple[int, ...]

    def kv_ids(self, k: int) -> range:
        """The KV blocks that exist while `k` units are streamed.

        Raises:
            InputError: k is not between k_min and k_max.
        """
        if not self.k_min <= k <= self.k_max:
            raise InputError(f"k must be between {self.k_min} and {self.k_max}, got {k}", field="k")
        end = self.lattice_blocks if k == 0 else self.ring_id
        return range(self.first_ids[k - self.k_min], end)

    @property
    def blocks_at(self) -> tuple[int, ...]:
        """KV blocks at every k up to k_max; none below k_min."""
        at = [len(self.kv_ids(k)) for k in range(self.k_min, self.k_max + 1)]
        return (0,) * self.k_min + tuple(at)


def device_layout(
    memory: ModelMemory, arena_bytes: int, k_min: int, slots: int, k_max: int | None = None
) -> DeviceLayout | None:
    """The layout in which pi's first `k_min` units have no home and up to `k_max` are streamed.

    `k_max` is `k_min` unless given. None when it does not fit even with zero KV blocks.
    """
    k_max = k_min if k_max is None else k_max
    if not 0 <= k_min <= k_max <= memory.units:
        field, wrong = ("k", k_min) if k_max == k_min else ("k_max", k_max)
        raise InputError(
            f"{field} must be between {0 if k_max == k_min else k_min} and {memory.units}, "
            f"got {wrong}",
            field=field,
        )
    order = offload_order(memory.units)
    offset = memory.static_bytes
    homes: dict[int, int] = {}
    for unit in reversed(order[k_min:]):
        homes[unit] = offset
        offset += memory.unit_bytes[unit]
    # The arena's size is the user's and need not be aligned: slots start on the last boundaries.
    ring_bytes = slots * memory.slot_bytes if k_max else 0
    ring = (arena_bytes - ring_bytes) // 256 * 256
    if ring < offset:
        return None
    boundaries = [homes[unit] for unit in order[k_min:k_max]]  # the KV region's begin above k_min
    begins = [offset, *boundaries]
    below = [(ring - begin) // memory.kv_block_bytes for begin in begins]
    inside = (arena_bytes - ring) // memory.kv_block_bytes if k_min == 0 else 0
    return DeviceLayout(
        k_min=k_min,
        k_max=k_max,
        homes=homes,
        slots=tuple(ring + index * memory.slot_bytes for index in range(slots)) if k_max else (),
        lattice_offset=ring - below[-1] * memory.kv_block_bytes,
        lattice_blocks=below[-1] + inside,
        ring_id=below[-1],
        first_ids=tuple(below[-1] - count for count in below),
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
