"""Policies: who decides how many units are streamed. Ours plans k and turns it; baselines do not.

All share scheduler, admission and streaming; a baseline only fixes k, once, before it starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from select_n_core.decisions.candidate import PlanInputs
from select_n_core.decisions.order import k_of_interval
from select_n_core.decisions.plan import make_plan
from select_n_core.errors import InputError


class PolicyKind(StrEnum):
    """The policies there are."""

    SELECT_N = "select_n"  # planned from the record, turned while serving
    FETCH_ALL = "fetch_all"  # every unit is streamed, as ZeRO-Inference does
    STATIC = "static"  # a given interval
    FLEXGEN = "flexgen"  # a static share, fitted to the SLO at the mean load before serving
    RESIDENT = "resident"  # nothing is streamed, whatever KV that leaves


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy as a user names it: `select_n`, `fetch_all`, `static:N`, `flexgen`, `resident`.

    Attributes:
        interval: N of `static:N`, else None.
    """

    kind: PolicyKind
    interval: float | None = None

    @classmethod
    def parse(cls, text: str) -> Policy:
        """The policy of that name.

        Raises:
            InputError: there is none.
        """
        name, colon, number = text.partition(":")
        try:
            kind = PolicyKind(name)
            interval = float(number) if colon else None
        except ValueError:
            raise _unknown(text) from None
        if (kind is PolicyKind.STATIC) != bool(colon):
            raise _unknown(text)
        if interval is not None and not 1 <= interval < math.inf:
            raise _unknown(text)
        return cls(kind, interval)

    @property
    def fixed(self) -> bool:
        """Whether k stands still and nothing seen while serving is learnt from."""
        return self.kind is not PolicyKind.SELECT_N

    def __str__(self) -> str:
        return self.kind.value if self.interval is None else f"{self.kind}:{self.interval:g}"


def forced_k(policy: Policy, inputs: PlanInputs) -> int | None:
    """The k that the policy fixes; None where the planner chooses.

    Args:
        inputs: of the planner; `forced_k` in them is not looked at. `flexgen` takes the fewest
            streamed units that serve `rate_per_s` of typical requests within the SLO; where none
            do, it is None: the planner then says why.
    """
    units = inputs.memory.units
    match policy.kind:
        case PolicyKind.SELECT_N:
            return None
        case PolicyKind.FETCH_ALL:
            return units
        case PolicyKind.RESIDENT:
            return 0
        case PolicyKind.STATIC:
            assert policy.interval is not None  # `parse` made it
            return k_of_interval(policy.interval, units)
        case PolicyKind.FLEXGEN:
            fitted = make_plan(replace(inputs, forced_k=None))
            return fitted.k if fitted.feasible else None


def _unknown(text: str) -> InputError:
    return InputError(
        "must be select_n, fetch_all, flexgen, resident or static:N with a number N of 1 or more, "
        f"got {text!r}",
        field="policy",
    )
