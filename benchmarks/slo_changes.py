"""What a replica makes of a link that is another one all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.slo_load import Schedule
from benchmarks.slo_score import Sample

_SETTLED_S = 2.0  # after which the first replica has answered a change


@dataclass(frozen=True, slots=True)
class Change:
    """What the first replica made of a phase's begin, which nobody announced to it.

    Attributes:
        phase: that began. k, running: just before, and `_SETTLED_S` later.
    """

    phase: str
    k: tuple[int, int]
    running: tuple[int, int]


def changes(schedule: Schedule, samples: Sequence[Sample]) -> tuple[Change, ...]:
    """Those of the phases whose link is another one than before."""
    first = [sample for sample in samples if sample.replica == 0]
    found = []
    for index in range(1, len(schedule.phases)):
        begin_s = index * schedule.phase_s
        before = [each for each in first if each.at_s < begin_s]
        after = [each for each in first if each.at_s >= begin_s + _SETTLED_S]
        links = [each.link_share for each in schedule.phases[index - 1 : index + 1]]
        if before and after and links[0] != links[1]:
            was, then = before[-1], after[0]
            name = schedule.phases[index].name
            found.append(Change(name, (was.k, then.k), (was.running, then.running)))
    return tuple(found)


def change_line(found: Sequence[Change]) -> str:
    """For people."""
    return "; ".join(
        f"{each.phase} begins: k {each.k[0]} -> {each.k[1]}, running {each.running[0]} -> "
        f"{each.running[1]} after {_SETTLED_S:g} s"
        for each in found
    )
