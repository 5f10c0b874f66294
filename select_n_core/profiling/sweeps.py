"""Sweeps: every case once, again and again, and only those that had the machine for themselves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from select_n_core.profiling.passes import Pass, typical
from select_n_core.profiling.rig import Case

_UNDISTURBED = 1.08
_MOST_SWEEPS = 2  # times those asked for, until enough are undisturbed

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

    A neighbour's burst does not hit all repeats of one case, and drift hits all cases alike.
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
        if len(found) == _MOST_SWEEPS * sweeps:
            break
        sweep: Sweep = {}
        there_and_back = cases if len(found) % 2 == 0 else cases[::-1]
        for number, case in enumerate(there_and_back):
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
    if case.beside:
        mode = "beside copies"
    return f"{mode}: {facts.decode_rows} rows, {facts.prefill_tokens} prompt tokens"
