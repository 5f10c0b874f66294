"""Latency targets: what was promised to the user."""

from __future__ import annotations

from dataclasses import dataclass

from select_n_core.errors import InputError


@dataclass(frozen=True, slots=True)
class SLO:
    """Targets of one service-level class.

    Attributes:
        tpot_s: time per output token after the first, mean over a request, seconds.
        ttft_s: time to first token, seconds.
    """

    tpot_s: float
    ttft_s: float

    def __post_init__(self) -> None:
        for name in ("tpot_s", "ttft_s"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"{name} must be above zero, got {getattr(self, name)}", field=name
                )
