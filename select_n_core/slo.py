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
        max_wait_s: a request that does not fit waits so long at most before it is returned to its
            caller; None is its time to first token.
    """

    tpot_s: float
    ttft_s: float
    max_wait_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("tpot_s", "ttft_s"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"{name} must be above zero, got {getattr(self, name)}", field=name
                )
        if self.max_wait_s is not None and not 0 <= self.max_wait_s <= self.ttft_s:
            raise InputError(
                f"max_wait_s must be between 0 and ttft_s ({self.ttft_s:g}), got "
                f"{self.max_wait_s}: who waited longer has missed the first token",
                field="max_wait_s",
            )

    @property
    def longest_wait_s(self) -> float:
        """Seconds after which a request without a deadline of its own is let in or returned."""
        return self.ttft_s if self.max_wait_s is None else self.max_wait_s
