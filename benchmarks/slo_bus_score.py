"""What two replicas on one bus came to: ratios to the other pairs, ceilings, saturation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from benchmarks.slo_cache import Result
from benchmarks.slo_load import Phase, Schedule
from benchmarks.slo_score import PhaseScore, score_phases
from benchmarks.slo_stand import TARGETS, Stand
from select_n_core.decisions.candidate import evaluate
from select_n_core.decisions.policy import Policy, forced_k

PHASES = (
    Phase("even", load=1.0, second_load=1.0),
    Phase("four-to-one", load=1.6, second_load=0.4),
    Phase("saturated", load=2.5, second_load=2.5),
)
OURS = "select_n"
ALONE = "select_n, no board"
HALVES = "flexgen, half each"
FREE = "flexgen, half each, not confined"
UNCOORDINATED = "flexgen, uncoordinated"
PAPER = 2.9  # Select-N against uncoordinated FlexGen on one bus
GOALS = {"even": 1.0, "four-to-one": 1.3}
_SPLITS = [share / 100 for share in range(5, 100, 5)]  # of the bus, for the first replica


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the planner expects of one phase, were every request typical and every queue endless.

    Attributes:
        share: of the bus for the first replica, at the best split. best_per_s: requests per second
            that both serve then, each at the k that is best with its share.
        halves_per_s: the same of two `flexgen` with half the bus each.
    """

    phase: str
    offered_per_s: float
    share: float
    best_per_s: float
    halves_per_s: float


def ceilings(whole: Stand, rate_per_s: float) -> tuple[Ceiling, ...]:
    """A bound for any way to share the bus, phase by phase; `rate_per_s` is one load."""
    inputs = whole.inputs()

    def served_per_s(share: float, k: int) -> float:
        transfer_s = inputs.latency.transfer_s / share
        latency = replace(inputs.latency, transfer_s=transfer_s)
        there = replace(inputs, latency=latency, forced_k=k, rate_per_s=None)
        return evaluate(there, k).requests_per_s

    best_per_s = {
        share: max(served_per_s(share, k) for k in range(inputs.memory.units + 1))
        for share in _SPLITS
    }
    fitted_k = forced_k(
        Policy.parse("flexgen"), replace(whole, link_share=0.5, rate_per_s=rate_per_s).inputs()
    )
    half_per_s = 0.0 if fitted_k is None else served_per_s(0.5, fitted_k)
    found = []
    for phase in PHASES:
        first_per_s, second_per_s = rate_per_s * phase.load, rate_per_s * phase.second_load
        both_per_s = {
            share: min(first_per_s, best_per_s[share]) + min(second_per_s, best_per_s[other])
            for share, other in zip(_SPLITS, reversed(_SPLITS), strict=True)
        }
        share = max(both_per_s, key=both_per_s.__getitem__)
        halves_per_s = min(first_per_s, half_per_s) + min(second_per_s, half_per_s)
        offered_per_s = first_per_s + second_per_s
        found.append(Ceiling(phase.name, offered_per_s, share, both_per_s[share], halves_per_s))
    return tuple(found)


def scores_of(result: Result, schedule: Schedule) -> tuple[PhaseScore, ...]:
    return score_phases(schedule, TARGETS, result.outcomes, result.samples, result.tokens)


def fitted(stand: Stand) -> str:
    """The static policy that streams what `flexgen` does where `stand` says."""
    inputs = stand.inputs()
    k = forced_k(Policy.parse("flexgen"), inputs)
    # Rounded down: floor(L / N) must be k again.
    return f"static:{math.floor(1000 * inputs.memory.units / k) / 1000}" if k else "resident"


def ratios_of(scores: dict[str, tuple[PhaseScore, ...]]) -> dict[str, dict[str, float | None]]:
    """Goodput of ours over each other pair's, by phase; None where the other served none."""
    if OURS not in scores:
        return {}
    return {
        ours.name: {
            label: ours.good.met / theirs[index].good.met if theirs[index].good.met else None
            for label, theirs in scores.items()
            if label != OURS
        }
        for index, ours in enumerate(scores[OURS])
    }


def saturation_of(
    result: Result | None, schedule: Schedule, whole: Stand
) -> dict[str, float] | None:
    """Summed link bytes of the saturated phase against min(bus, sum of k_max * S / T)."""
    if result is None or not result.samples:
        return None
    index = [phase.name for phase in PHASES].index("saturated")
    settled_s = (index + 0.25) * schedule.phase_s  # the queues fill first
    bytes_per_s = 0.0
    own = [s for s in result.samples if settled_s <= s.at_s <= (index + 1) * schedule.phase_s]
    for _, group in groupby(sorted(own, key=lambda s: s.replica), key=lambda s: s.replica):
        samples = list(group)
        span_s = samples[-1].at_s - samples[0].at_s
        bytes_per_s += (samples[-1].link_bytes - samples[0].link_bytes) / span_s
    inputs = whole.inputs()
    candidates = (evaluate(inputs, k) for k in range(inputs.memory.units + 1))
    most = max((c for c in candidates if c.feasible), key=lambda c: c.k)
    each = most.k * max(inputs.memory.unit_bytes) / most.serving.iteration_s
    bound = min(whole.bus_bytes_per_s, 2 * each)
    return {
        "link_bytes_per_s": bytes_per_s,
        "bound_bytes_per_s": bound,
        "k_max": most.k,
        "share": bytes_per_s / bound,
    }


def goal_lines(own: dict[str, Any]) -> list[str]:
    """What one seed says of the goals."""
    lines = []
    for phase, ratios in own["ratios"].items():
        shown = ", ".join(
            f"{'-' if ratio is None else f'{ratio:.2f}x'} of {label}"
            for label, ratio in ratios.items()
        )
        goal = f" (goal {GOALS[phase]}x of all but the last)" if phase in GOALS else ""
        lines.append(f"goodput, {phase}: {shown}{goal}; the paper: {PAPER}x of uncoordinated")
    if (saturation := own["saturation"]) is not None:
        lines.append(
            f"at saturation {saturation['link_bytes_per_s'] / 1e6:.0f} MB/s over the bus, "
            f"{saturation['share']:.1%} of min(bus, sum of k_max*S/T) (goal 95%)"
        )
    return lines
