"""What one request was promised, and the tighter targets that decisions aim at."""

from __future__ import annotations

from typing import NamedTuple

from select_n_core.engine.messages import Request
from select_n_core.slo import SLO

# Shares of the targets that decisions aim at: what is left over takes up what nobody can predict.
TPOT_AIM = 0.98
_TTFT_AIM = 0.9


class Targets(NamedTuple):
    """Of one request: seconds per output token, to the first token, and of waiting at most.

    Attributes:
        max_wait_s: None is until its own first token is due.
    """

    tpot_s: float
    ttft_s: float
    max_wait_s: float | None


def promised(slo: SLO, request: Request) -> Targets:
    """The request's own targets where it has some, else those of the model.

    A plan is made for the model's time per token: no request is promised a shorter one.
    """
    return Targets(
        slo.tpot_s if request.tpot_s is None else max(request.tpot_s, slo.tpot_s),
        slo.ttft_s if request.deadline_s is None else request.deadline_s,
        slo.max_wait_s if request.max_wait_s is None else request.max_wait_s,
    )


def aimed(promise: Targets) -> Targets:
    """What is decided by, so that the promise holds where predictions err."""
    ttft_s, max_wait_s = promise.ttft_s * _TTFT_AIM, promise.max_wait_s
    return Targets(
        promise.tpot_s * TPOT_AIM,
        ttft_s,
        None if max_wait_s is None else min(max_wait_s, ttft_s),
    )
