"""How evenly pi spreads streamed units over an iteration, by the outside share it reckons with.

    python -m benchmarks.order --json

pi is made on a circle of the units and of what lies outside them (head, sampling, the gap between
two steps), and nobody knows beforehand how long that takes. For every share that pi could reckon
with and every true one: the recurrence's time against what no order can beat, max(L*c + g, k*t,
k*(t + c)/d), near balance of compute and copies, where order matters. d = 2, every k <= L/2.
Nothing is measured: it is arithmetic, and takes seconds.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np

from benchmarks.environment import Provenance, note, publish
from select_n_core.decisions.law import UnitCost, steady_state_s
from select_n_core.decisions.order import OUTSIDE, offload_order

SLOTS = 2
UNITS = (24, 30, 32, 40)
RECKONED = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
TRUE = (0.0, 0.05, 0.1, 0.25)
BALANCE = (0.9, 0.95, 1.0, 1.05, 1.1)  # copies against compute
_UNIT_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    provenance = Provenance()
    shares = [_share(reckoned) for reckoned in RECKONED]
    document = {
        "d": SLOTS,
        "units": UNITS,
        "true_outside": TRUE,
        "balance": BALANCE,
        "in_use": OUTSIDE,
        "shares": shares,
        "provenance": provenance.document(),
    }
    lines = [
        f"outside taken as {share['outside']:5.1%} of the units: T / floor mean "
        f"{share['mean']:.4f}, p90 {share['p90']:.4f}, worst {share['worst']:.4f}; mean by true "
        "share "
        + ", ".join(f"{each['outside']:.0%}: {each['mean']:.4f}" for each in share["by_true"])
        for share in shares
    ]
    publish("order", document, as_json=arguments.json, lines=lines)


def _share(reckoned: float) -> dict[str, Any]:
    by_true = {
        true: [ratio for units in UNITS for ratio in _ratios(units, reckoned, true)]
        for true in TRUE
    }
    note(f"outside taken as {reckoned:.1%}")
    everything = [ratio for ratios in by_true.values() for ratio in ratios]
    return {
        "outside": reckoned,
        **_summary(everything),
        "by_true": [{"outside": true, **_summary(ratios)} for true, ratios in by_true.items()],
    }


def _ratios(units: int, reckoned: float, true: float) -> list[float]:
    """T over its floor, at every k up to L/2 and every balance."""
    order, outside_s = offload_order(units, reckoned), true * units * _UNIT_S
    compute_s = units * _UNIT_S + outside_s
    ratios = []
    for k in range(1, units // 2 + 1):
        for balance in BALANCE:
            transfer_s = balance * compute_s / k
            took_s = steady_state_s(
                tuple(sorted(order[:k])),
                units,
                SLOTS,
                UnitCost.uniform(_UNIT_S),
                outside_s,
                (transfer_s,) * k,
            )
            floor_s = max(compute_s, k * transfer_s, k * (transfer_s + _UNIT_S) / SLOTS)
            ratios.append(took_s / floor_s)
    return ratios


def _summary(ratios: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(ratios),
        "p90": float(np.percentile(ratios, 90)),
        "worst": max(ratios),
    }


if __name__ == "__main__":
    main()
