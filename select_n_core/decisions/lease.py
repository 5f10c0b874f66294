"""What a plan needs of host memory, what more of it would be worth, and the plan with less."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from select_n_core.decisions.candidate import Candidate
from select_n_core.decisions.loans import Rung
from select_n_core.decisions.plan import Plan

_EQUAL = 1e-6  # rates that differ by less are the same rate, summed in another order
_SPARE = 1e-3  # of what mirrors gain at full load: what they gain while no load wants them


def paged(nbytes: int) -> int:
    """What `nbytes` take when they are mapped: whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class Ladder:
    """What a replica's mirrors take, and what each is worth at a given load.

    Attributes:
        k_min: mirrors that it cannot serve without.
        unit_bytes: of pi's units, exactly, as many as may ever be mirrored here.
        rates_per_s: typical requests within the SLO, with k = 0, 1, ... of those units streamed.
        host_kv_bytes: of host KV blocks, exactly.
        tokens: of a typical request, prompt and output.
        lifetime_s: of a typical request among as many as are served at the planned k.
    """

    k_min: int
    unit_bytes: tuple[int, ...]
    rates_per_s: tuple[float, ...]
    host_kv_bytes: int = 0
    tokens: int = 1
    lifetime_s: float = 1.0

    @classmethod
    def of(cls, plan: Plan, tokens: int = 1, host_kv_bytes: int = 0) -> Ladder:
        """The ladder of a plan, up to the mirrors that its host memory allows."""
        chosen = plan.candidates[plan.k]
        return cls(
            k_min=plan.k_min,
            unit_bytes=tuple(_unit_bytes(plan)[: plan.mirrors]),
            rates_per_s=tuple(_rate(each) for each in plan.candidates[: plan.mirrors + 1]),
            host_kv_bytes=host_kv_bytes,
            tokens=tokens,
            lifetime_s=chosen.serving.batch / chosen.serving.requests_per_s,
        )

    @property
    def floor_bytes(self) -> int:
        """Host bytes that the replica cannot serve without, in whole pages.

        They are the mirrors of the units without a home on the device, and the host KV blocks.
        """
        return self.host_kv_pages + sum(map(paged, self.unit_bytes[: self.k_min]))

    @property
    def host_kv_pages(self) -> int:
        """Bytes of the host KV blocks, in whole pages."""
        return paged(self.host_kv_bytes)

    @property
    def floor_rate_per_s(self) -> float:
        """Typical requests per second with the floor alone."""
        return max(self.rates_per_s[: self.k_min + 1])

    def mirrored_bytes(self, mirrors: int) -> int:
        """Bytes of the first `mirrors` mirrors, exactly: what a lease on them is."""
        return sum(self.unit_bytes[:mirrors])

    def rungs(
        self, offered_per_s: float = math.inf, waiting_per_s: float = 0.0
    ) -> tuple[Rung, ...]:
        """What each mirror above the floor takes, and how much more goodput it gives, in order.

        With m mirrors the best k up to m is streamed, and no more requests are served than come.
        Those that wait may be longer than typical ones and lack KV where those would not: every
        mirror gains at least an equal part of them. One that gains nothing at this load is spare.

        Args:
            offered_per_s: typical requests that come, as far as they are to be served here.
            waiting_per_s: of them, those that wait to be let in.
        """
        rates = [min(offered_per_s, rate) for rate in self.rates_per_s]
        best = max(rates[: self.k_min + 1])
        rungs, count = [], len(rates) - 1 - self.k_min
        for k in range(self.k_min + 1, len(rates)):
            gain, best = rates[k] - best, max(best, rates[k])
            gain, spare = max(gain, waiting_per_s / count), False
            if gain <= _EQUAL * best:
                gain, spare = _SPARE * max(self.rates_per_s) / count, True
            rungs.append(Rung(paged(self.unit_bytes[k - 1]), gain, spare))
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
