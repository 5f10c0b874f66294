"""What callers are told whose requests are returned."""

from __future__ import annotations

from select_n_core.decisions.facts import Reason
from select_n_core.errors import OverloadedError
from select_n_core.quantities import format_seconds

_WHY = {
    Reason.KV: "the KV memory it needs did not come free",
    Reason.TPOT: "one more would slow down those that run beyond what they were promised",
    Reason.TTFT: "with the prompts before it, first tokens would come later than promised",
    Reason.QUEUE: "others were there before it",
}


def waited_in_vain(reason: Reason, waited_s: float, fits_in_s: float) -> OverloadedError:
    """The error of a request that was queued and is returned."""
    why = f"the request waited {format_seconds(waited_s)} and was not let in: {_WHY[reason]}"
    return _error(why, reason, fits_in_s)


def queue_full(queued: int, fits_in_s: float) -> OverloadedError:
    """The error of a request that finds `queued` others waiting, as many as may."""
    return _error(f"{queued} requests are waiting already", Reason.QUEUE, fits_in_s)


def _error(why: str, reason: Reason, fits_in_s: float) -> OverloadedError:
    again = format_seconds(max(0.0, fits_in_s), up=True)
    return OverloadedError(
        f"{why}; send it again in {again}", reason=reason, retry_after_s=fits_in_s
    )
