"""The order pi in which units are offloaded, and what an interval N means in units."""

from __future__ import annotations

from functools import cache
from itertools import count

from select_n_core.errors import InputError

# What lies outside the units (head, sampling, the gap between two steps), in shares of their time.
# It need not be known well: `benchmarks/order.py` shows what other shares come to.
OUTSIDE = 0.1


@cache
def offload_order(units: int, outside: float = OUTSIDE) -> tuple[int, ...]:
    """Fixed priority pi: every prefix is nearly evenly spaced over the *time* of an iteration.

    Bit-reversal (van der Corput) order around a circle of `units` layers and of what lies outside
    them, backwards from the last layer. Were the circle one of layers alone, the compute outside
    would lengthen one gap in which d slots cannot keep the link busy. Because prefixes nest,
    moving k by one moves exactly one unit.

    Args:
        outside: the time outside the units against theirs, as far as the order reckons with it.
    """
    if units < 1:
        raise InputError(f"a model needs at least one unit, got {units}", field="units")
    circle = units * (1 + outside)
    order: dict[int, None] = {}
    numbers = count()
    while len(order) < units:
        at = (units - 0.5 - circle * _bits_reversed(next(numbers))) % circle
        if at >= units:  # outside: the nearer of the last unit and the first
            at = 0 if at - units > circle - at else units - 1
        order.setdefault(int(at))
    return tuple(order)


def _bits_reversed(index: int) -> float:
    """The binary digits of `index` mirrored at the point: 1, 2, 3 give 0.5, 0.25, 0.75."""
    return int(f"{index:b}"[::-1], 2) / (1 << index.bit_length())


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
