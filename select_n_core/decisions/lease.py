"""What a plan needs of host memory, what more of it would be worth, and the plan with less."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from select_n_core.decisions.candidate import Candidate
from select_n_core.decisions.loans import Rung
from select_n_core.decisions.plan import Plan


def paged(nbytes: int) -> int:
    """What `nbytes` take when they are mapped: whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def floor_bytes(plan: Plan, host_kv_bytes: int = 0) -> int:
    """Host bytes that a replica cannot serve without, in whole pages.

    They are the mirrors of the units without a home on the device, and the host KV blocks.
    """
    return paged(host_kv_bytes) + sum(map(paged, _unit_bytes(plan)[: plan.k_min]))


def ladder(plan: Plan, offered_per_s: float = math.inf) -> tuple[Rung, ...]:
    """What each mirror above the floor takes, and how much more goodput it gives, in order.

    With m mirrors the best k up to m is streamed, and no more requests are served than come.

    Args:
        offered_per_s: typical requests that come, as far as they are to be served here.
    """
    rates = [min(offered_per_s, _rate(candidate)) for candidate in plan.candidates]
    best = max(rates[: plan.k_min + 1])
    rungs = []
    for k in range(plan.k_min + 1, plan.k_max + 1):
        gain, best = max(0.0, rates[k] - best), max(best, rates[k])
        rungs.append(Rung(paged(_unit_bytes(plan)[k - 1]), gain))
    return tuple(rungs)


def with_mirrors(plan: Plan, mirrors: int) -> Plan:
    """The plan with pi's first `mirrors` units mirrored, `k_min` or more of them.

    Where the chosen k is above, the best below it is chosen: most goodput, then fewest streamed.
    How far k may turn in the arena, and how many may run, stay: more mirrors may come.
    """
    fewer = replace(plan, mirrors=mirrors, host_bytes=plan.candidates[mirrors].host_bytes)
    if plan.k <= mirrors:
        return fewer
    within = plan.candidates[plan.k_min : mirrors + 1]
    chosen = max(within, key=_rate)
    return replace(
        fewer,
        k=chosen.k,
        interval=chosen.interval,
        predicted_iteration_s=chosen.serving.iteration_s,
        predicted_tpot_s=chosen.serving.tpot_s,
        predicted_ttft_s=chosen.serving.ttft_s,
        max_batch=chosen.serving.batch,
        kv_tokens=chosen.kv_tokens,
    )


def _rate(candidate: Candidate) -> float:
    """Requests per second within the SLO, were there host memory for it."""
    fits = candidate.fits_device and candidate.meets_tpot and candidate.meets_ttft
    return candidate.serving.requests_per_s if fits else 0.0


def _unit_bytes(plan: Plan) -> Sequence[int]:
    """Of pi's units, in order."""
    sizes = [candidate.host_bytes for candidate in plan.candidates]
    return [after - before for before, after in pairwise(sizes)]
