"""What a replica kept of its promise lately: p95 of TTFT and TPOT against their targets."""

from __future__ import annotations

from collections import deque

import numpy as np

from select_n_core.slo import SLO

_WINDOW_S = 10.0
_MOST = 256
_PERCENTILE = 95.0
_LATEST = 10.0  # times the target; how much later a returned request would be served says little


class HeadroomWindow:
    """Requests of the last ten seconds.

    Headroom is 1 - p95 / target: 1 is idle, 0 is just kept, negative is broken.
    """

    def __init__(self, slo: SLO) -> None:
        self._slo = slo
        self._ttft: deque[tuple[float, float]] = deque(maxlen=_MOST)
        self._tpot: deque[tuple[float, float]] = deque(maxlen=_MOST)

    def saw_first_token(self, now_s: float, share: float) -> None:
        """A request got its first token after `share` of its own target."""
        self._ttft.append((now_s, share))

    def saw_finish(self, now_s: float, share: float) -> None:
        """A request ended with a mean of `share` of its own target per token after the first."""
        self._tpot.append((now_s, share))

    def saw_returned(self, now_s: float, after_s: float) -> None:
        """A request was returned that would have had its first token after `after_s`, or later.

        It counts as late in any case: a replica that returns requests has no headroom.
        """
        self._ttft.append((now_s, min(max(after_s / self._slo.ttft_s, 1.0), _LATEST)))

    def ttft(self, now_s: float) -> float | None:
        """Headroom of TTFT; None when the window is empty."""
        return self._headroom(self._ttft, now_s)

    def tpot(self, now_s: float) -> float | None:
        """Headroom of TPOT; None when the window is empty."""
        return self._headroom(self._tpot, now_s)

    @staticmethod
    def _headroom(seen: deque[tuple[float, float]], now_s: float) -> float | None:
        while seen and seen[0][0] < now_s - _WINDOW_S:
            seen.popleft()
        if not seen:
            return None
        return 1.0 - float(np.percentile([share for _, share in seen], _PERCENTILE))
