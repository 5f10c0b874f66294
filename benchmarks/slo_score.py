"""What a run was worth: attainment, goodput and k of every phase, and the goals over all of them.

Goodput counts requests that met both targets, over *offered* ones: a refusal is a miss. Every share
comes with the lower end of its two-sided 95% Wilson interval. A policy that could not start met
nothing of what was offered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any, NamedTuple

from scipy.stats import binomtest

from benchmarks.slo_load import STEADY, Schedule
from select_n_core.slo import SLO


class Outcome(NamedTuple):
    """What became of one offered request.

    Attributes:
        phase: of its scheduled arrival. replica: that it was sent to.
        admitted: whether it entered. ended: its finish, or why there is none.
        ttft_s: from the scheduled arrival. tpot_s: mean per token after the first, if complete.
    """

    phase: int
    replica: int
    admitted: bool
    ended: str
    ttft_s: float | None
    tpot_s: float | None


class Sample(NamedTuple):
    """A replica at one moment; seconds since the schedule's begin, link bytes since its start."""

    at_s: float
    replica: int
    k: int
    running: int
    waiting: int
    kv_free_tokens: int
    host_bytes: int
    link_bytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """`met` of `of`, with the lower end of the Wilson interval; None where there is nothing."""

    met: int
    of: int

    @property
    def share(self) -> float | None:
        """met / of."""
        return self.met / self.of if self.of else None

    @property
    def low(self) -> float | None:
        """At 95%, two-sided."""
        if not self.of:
            return None
        interval = binomtest(self.met, self.of).proportion_ci(0.95, method="wilson")
        return float(interval.low)

    def document(self) -> dict[str, Any]:
        """Both numbers and what follows from them."""
        return asdict(self) | {"share": self.share, "low": self.low}


@dataclass(frozen=True, slots=True)
class PhaseScore:
    """One phase of one policy.

    Attributes:
        refused: offered requests that did not complete, by reason.
        ttft, tpot: over offered. admitted_ttft, admitted_tpot: over admitted.
        good: met both, over offered. seconds: of the phase.
        k: (mean, least, most) of the first replica; None where it did not start.
        host_bytes: most that mirrors took; replicas on a machine share them.
    """

    name: str
    seconds: float
    offered: int
    admitted: int
    refused: Mapping[str, int]
    ttft: Share
    tpot: Share
    admitted_ttft: Share
    admitted_tpot: Share
    good: Share
    tokens_per_s: float
    link_bytes_per_s: float
    host_bytes: int
    k: tuple[float, int, int] | None

    @property
    def goodput_per_s(self) -> float:
        """Requests per second that met both targets."""
        return self.good.met / self.seconds

    def document(self) -> dict[str, Any]:
        """For the result's JSON."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        shares = {name: each.document() for name, each in plain.items() if isinstance(each, Share)}
        return plain | shares | {"goodput_per_s": self.goodput_per_s}


def score_phases(
    schedule: Schedule,
    slo: SLO,
    outcomes: Sequence[Outcome],
    samples: Sequence[Sample],
    tokens: Sequence[int],
) -> tuple[PhaseScore, ...]:
    """Score every phase.

    Args:
        outcomes: one per arrival; empty where the policy could not start.
        tokens: received during each phase.
    """
    return tuple(
        _score(schedule, slo, index, outcomes, samples, tokens[index] if tokens else 0)
        for index in range(len(schedule.phases))
    )


def _score(
    schedule: Schedule,
    slo: SLO,
    index: int,
    outcomes: Sequence[Outcome],
    samples: Sequence[Sample],
    tokens: int,
) -> PhaseScore:
    own = [outcome for outcome in outcomes if outcome.phase == index]
    admitted = [outcome for outcome in own if outcome.admitted]
    offered = schedule.offered(index)
    within = [s for s in samples if index == schedule.phase_at(s.at_s) and s.at_s >= 0]
    ks = [sample.k for sample in within if sample.replica == 0]
    return PhaseScore(
        name=schedule.phases[index].name,
        seconds=schedule.phase_s,
        offered=offered,
        admitted=len(admitted),
        refused=Counter(outcome.ended for outcome in own if outcome.ended not in ENDED_WELL),
        ttft=Share(sum(meets_ttft(each, slo) for each in own), offered),
        tpot=Share(sum(meets_tpot(each, slo) for each in own), offered),
        admitted_ttft=Share(sum(meets_ttft(each, slo) for each in admitted), len(admitted)),
        admitted_tpot=Share(sum(meets_tpot(each, slo) for each in admitted), len(admitted)),
        good=Share(sum(meets_ttft(e, slo) and meets_tpot(e, slo) for e in own), offered),
        tokens_per_s=tokens / schedule.phase_s,
        link_bytes_per_s=_link_bytes(within) / schedule.phase_s,
        host_bytes=max((sample.host_bytes for sample in within), default=0),
        k=(fmean(ks), min(ks), max(ks)) if ks else None,
    )


ENDED_WELL = ("length", "stop")


def meets_ttft(outcome: Outcome, slo: SLO) -> bool:
    """Whether the first token came in time."""
    return outcome.ttft_s is not None and outcome.ttft_s <= slo.ttft_s


def meets_tpot(outcome: Outcome, slo: SLO) -> bool:
    """Whether it was completed at the promised pace."""
    return outcome.tpot_s is not None and outcome.tpot_s <= slo.tpot_s


def _link_bytes(samples: Iterable[Sample]) -> int:
    by_replica: dict[int, list[int]] = {}
    for sample in samples:
        by_replica.setdefault(sample.replica, []).append(sample.link_bytes)
    return sum(counts[-1] - counts[0] for counts in by_replica.values())


def goals(scores: Mapping[str, Sequence[PhaseScore]]) -> dict[str, Any]:
    """What the policies of one seed and memory say about the goals.

    A ratio whose divisor served nothing, or is not among `scores`, is None.
    """
    ours = scores.get("select_n")
    if ours is None:
        return {}
    flexgen = scores.get("flexgen")
    steady = [index for index, phase in enumerate(ours) if phase.name in STEADY]
    every = range(len(ours))
    return {
        "admitted_tpot_worst": _worst(phase.admitted_tpot for phase in ours),
        "admitted_ttft_worst": _worst(phase.admitted_ttft for phase in ours),
        "over_flexgen": _ratio(ours, flexgen, every),
        "over_flexgen_steady": _ratio(ours, flexgen, steady),
        "over_best_static": {
            phase.name: _over_best_static(scores, index) for index, phase in enumerate(ours)
        },
    }


def _worst(shares: Iterable[Share]) -> float | None:
    return min((each.share for each in shares if each.share is not None), default=None)


def _ratio(
    ours: Sequence[PhaseScore], theirs: Sequence[PhaseScore] | None, phases: Iterable[int]
) -> float | None:
    indices = list(phases)
    met = sum(theirs[index].good.met for index in indices) if theirs is not None else 0
    return sum(ours[index].good.met for index in indices) / met if met else None


def _over_best_static(scores: Mapping[str, Sequence[PhaseScore]], index: int) -> dict[str, Any]:
    statics = {name: each[index] for name, each in scores.items() if name.startswith("static:")}
    best = max(statics, key=lambda name: statics[name].good.met, default=None)
    met = statics[best].good.met if best is not None else 0
    return {
        "static": best,
        "ratio": scores["select_n"][index].good.met / met if met else None,
    }


def table(policy: str, phases: Sequence[PhaseScore], line: str) -> list[str]:
    """One policy's phases for people; shares are followed by their Wilson lower bounds."""
    lines = [
        f"{policy}: {line}",
        f"  {'phase':<15}{'offered':>8}{'admitted':>9}  {'TTFT':>13}  {'TPOT':>13}  "
        f"{'adm. TTFT':>13}  {'adm. TPOT':>13}  {'goodput':>13} {'req/s':>6} {'tok/s':>6} "
        f"{'host MiB':>8} {'link MB/s':>9}  k mean (min-max)",
    ]
    for phase in phases:
        shares = (phase.ttft, phase.tpot, phase.admitted_ttft, phase.admitted_tpot, phase.good)
        k = "-" if phase.k is None else f"{phase.k[0]:.1f} ({phase.k[1]}-{phase.k[2]})"
        lines.append(
            f"  {phase.name:<15}{phase.offered:>8}{phase.admitted:>9}  "
            + "  ".join(f"{_percent(each):>13}" for each in shares)
            + f" {phase.goodput_per_s:>6.2f} {phase.tokens_per_s:>6.0f} "
            f"{phase.host_bytes / (1 << 20):>8.0f} {phase.link_bytes_per_s / 1e6:>9.0f}  {k}"
        )
    return lines


def _percent(share: Share) -> str:
    if share.share is None or share.low is None:
        return "-"
    return f"{share.share:.1%} ≥{share.low:.1%}"


def goal_lines(found: Mapping[str, Any]) -> list[str]:
    """The goals of one seed and memory, for people."""
    if "over_best_static" not in found:
        return []
    by_phase = ", ".join(
        f"{name} {_beside(each)}" for name, each in found["over_best_static"].items()
    )
    return [
        f"select_n, admitted: worst phase TPOT {_shown(found['admitted_tpot_worst'])} "
        f"(goal 99%), TTFT {_shown(found['admitted_ttft_worst'])} (goal 98%)",
        f"goodput over flexgen: {_shown(found['over_flexgen'], 'x')} of the whole schedule "
        f"(goal 1.85x), {_shown(found['over_flexgen_steady'], 'x')} when steady (goal 1.0x)",
        f"goodput over each phase's best static (goal 0.95x): {by_phase}",
    ]


def _beside(best: Mapping[str, Any]) -> str:
    if best["static"] is None:
        return "- (none ran)"
    if best["ratio"] is None:
        return f"- ({best['static']} served none)"
    return f"{_shown(best['ratio'], 'x')} ({best['static']})"


def _shown(value: float | None, unit: str = "%") -> str:
    if value is None:
        return "-"
    return f"{value:.2f}x" if unit == "x" else f"{value:.1%}"
