"""The order pi in which units are offloaded, and what an interval N means in units."""

from __future__ import annotations

from functools import cache

from select_n_core.errors import InputError


@cache
def offload_order(units: int) -> tuple[int, ...]:
    """Fixed priority pi: every prefix is nearly evenly spaced over the `units` layers.

    Bit-reversal (van der Corput) order, scaled to `units` and mirrored so that the last layer
    goes first: a group's streamed unit stands at the group's end, behind the compute that
    hides its copy. Because prefixes nest, moving k by one moves exactly one unit.
    """
    if units < 1:
        raise InputError(f"a model needs at least one unit, got {units}", field="units")
    bits = max(1, (units - 1).bit_length())
    order: dict[int, None] = {}
    for index in range(1 << bits):
        reversed_bits = int(f"{index:0{bits}b}"[::-1], 2)
        order.setdefault(units - 1 - ((reversed_bits * units) >> bits))
    return tuple(order)


def streamed_units(units: int, k: int) -> tuple[int, ...]:
    """The first `k` units of pi, in the order in which the forward meets them."""
    return tuple(sorted(offload_order(units)[:k]))


def k_of_interval(interval: float, units: int) -> int:
    """Units streamed at interval N: k = floor(L / N). N of 1 streams everything."""
    if not interval >= 1:
        raise InputError(
            f"interval must be 1 or more (one in every N of the {units} layers), got {interval}; "
            "write 'off' to stream nothing",
            field="interval",
        )
    return int(units / interval + 1e-9)


def interval_of_k(k: int, units: int) -> float | None:
    """Interval N = L / k as shown to people; None at k = 0, where nothing is streamed."""
    return None if k == 0 else round(units / k, 4)
