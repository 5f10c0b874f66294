"""How long the answers of a class lately were: what the next one is expected to come to."""

from __future__ import annotations

import math
from collections import deque

_MOST = 128  # answers of a class that are looked at
_LEAST = 16  # below, they say little
_QUANTILE = 0.8
_CLASSES = 256


class OutputLengths:
    """The last answers' tokens, by class; one per model."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[int]] = {}
        self._expected: dict[str, int] = {}

    def saw(self, slo_class: str, tokens: int) -> None:
        """An answer of that class ended after so many tokens."""
        seen = self._seen.get(slo_class)
        if seen is None:
            if len(self._seen) >= _CLASSES:  # classes come and go with the policy
                return
            seen = self._seen[slo_class] = deque(maxlen=_MOST)
        seen.append(tokens)
        if len(seen) >= _LEAST:
            self._expected[slo_class] = sorted(seen)[math.ceil(_QUANTILE * len(seen)) - 1]

    def expected(self, slo_class: str) -> int | None:
        """Tokens that four in five answers of the class stay within; None while few were seen."""
        return self._expected.get(slo_class)
