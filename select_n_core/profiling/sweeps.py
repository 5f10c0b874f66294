"""Sweeps: every case once, again and again, and only those that had the machine for themselves."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

from select_n_core.profiling.passes import Pass, typical
from select_n_core.profiling.rig import Case

_UNDISTURBED = 1.08
_MOST_MORE = 3  # sweeps beyond those asked for, until enough are undisturbed

Progress = Callable[[str, float], None]  # what is measured now, share done

Sweep = dict[Case, list[Pass]]
"""Every case's passes, taken one case after another."""


def sweep_s(sweep: Sweep) -> float:
    """Seconds of a sweep: one typical pass of every case."""
    return sum(typical(passes, "wall_s") for passes in sweep.values())


def undisturbed(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """Those within 8% of the fastest: what took longer shared the machine with somebody."""
    limit_s = _UNDISTURBED * min((sweep_s(sweep) for sweep in sweeps), default=0.0)
    return [sweep for sweep in sweeps if sweep_s(sweep) <= limit_s]


def run_sweeps(
    visit: Callable[[Case], list[Pass]], cases: Sequence[Case], sweeps: int, progress: Progress
) -> tuple[dict[Case, list[Pass]], float]:
    """Passes of every case from `sweeps` undisturbed sweeps, as far as they can be had.

    Every sweep takes the cases in an order of its own: a neighbour's burst does not hit all
    repeats of one case, and what drifts within a sweep does not set cases of one kind apart.
    Whether a sweep counts is judged by its whole length, before anything is fitted.

    Args:
        visit: warmed-up passes of a case.

    Returns:
        The passes that count, and the noise: how much longer than the fastest sweep the median
        one took.
    """
    found: list[Sweep] = []
    furthest = 0.0
    visit(cases[0])  # the first case would pay for cold caches
    while (missing := sweeps - len(undisturbed(found))) > 0:
        if len(found) == sweeps + _MOST_MORE:
            break
        sweep: Sweep = {}
        shuffled = random.Random(len(found)).sample(cases, len(cases))
        for number, case in enumerate(shuffled):
            run = len(found) + number / len(cases)
            furthest = max(furthest, run / (len(found) + missing))
            progress(_said(case), furthest)
            sweep[case] = visit(case)
        found.append(sweep)
    kept = undisturbed(found)
    walls_s = [sweep_s(sweep) for sweep in found]
    passes = {case: [each for sweep in kept for each in sweep[case]] for case in cases}
    return passes, statistics.median(walls_s) / min(walls_s) - 1


def _said(case: Case) -> str:
    facts = case.shape.facts()
    mode = f"k = {case.k}" if case.k else "resident" if case.resident else "streaming"
    return f"{mode}: {facts.decode_rows} rows, {facts.prefill_tokens} prompt tokens"
