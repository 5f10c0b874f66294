"""What each tenant used of its quotas at this ingress: reserved at the door, settled at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from deployments.calls import DEFAULT_MAX_TOKENS, Call, Message
from deployments.tenants.quota import MINUTE_S, Bucket, filled, part_of, taken, wait_s
from select_n_core.errors import QuotaError
from select_n_core.live import TenantConfig

_MEMORY_S = 15.0  # of what was asked for: a burst at one ingress gets its part within seconds
_BYTES_PER_TOKEN = 4  # of text nobody has tokenised yet; what it was is known at the end


def expected_tokens(calls: Sequence[Call], choices_per_prompt: int) -> int:
    """The most that one request is expected to use: each prompt once, every choice's output."""
    prompts = sum(prompt_tokens(call) for call in calls[::choices_per_prompt])
    return prompts + sum(call.max_tokens or DEFAULT_MAX_TOKENS for call in calls)


def prompt_tokens(call: Call) -> int:
    """Of a call's prompt, as far as one can tell who has no tokenizer."""
    if isinstance(call.prompt, str):
        texts = [call.prompt]
    else:
        texts = [turn.content for turn in call.prompt if isinstance(turn, Message)]
        if not texts:
            return len(call.prompt)
    size = sum(len(text.encode(errors="replace")) for text in texts)
    return -(-size // _BYTES_PER_TOKEN)


class Demand(NamedTuple):
    """What was asked for in a tenant's name lately, per minute: let in or not."""

    requests: float = 0.0
    tokens: float = 0.0


# What the other living ingresses were asked for in the name of a tenant.
Others = Callable[[str], Sequence[Demand]]


def alone(_: str) -> Sequence[Demand]:
    """There is no other ingress."""
    return ()


class _Meter:
    """One quota of one tenant: what is left of it, and what was asked for lately."""

    def __init__(self) -> None:
        self._bucket: Bucket | None = None  # full until something is taken
        self._asked = 0.0
        self._asked_s = 0.0

    def ask(self, amount: float, now_s: float) -> None:
        """Somebody wants `amount`."""
        self._asked = self.asked(now_s) + amount * MINUTE_S / _MEMORY_S
        self._asked_s = now_s

    def asked(self, now_s: float) -> float:
        """Per minute, lately."""
        return self._asked * math.exp((self._asked_s - now_s) / _MEMORY_S)

    def wait_s(self, amount: float, part: float, now_s: float) -> float:
        """Until `amount` may be taken."""
        self._bucket = self._filled(part, now_s)
        return wait_s(self._bucket, amount, part)

    def take(self, amount: float, part: float, now_s: float) -> None:
        """Take it, whatever is left; a negative amount comes back."""
        self._bucket = taken(self._filled(part, now_s), amount, part)

    def _filled(self, part: float, now_s: float) -> Bucket:
        if self._bucket is None:
            return Bucket(part, now_s)
        return filled(self._bucket, part, now_s)


class Charge:
    """What one request took; it ends in `settle` or `refund`, of which the first one counts."""

    def __init__(self, give_back: Callable[[Demand], None], tokens: int) -> None:
        self._give_back = give_back
        self._tokens = tokens
        self._open = True

    @classmethod
    def of_nobody(cls) -> Charge:
        """For whoever has no quota."""
        return cls(lambda _: None, 0)

    def settle(self, used_tokens: int) -> None:
        """The request ended and used so many tokens."""
        self._end(Demand(0, self._tokens - used_tokens))

    def refund(self) -> None:
        """The request was not served, and not for a fault of its own."""
        self._end(Demand(1, self._tokens))

    def _end(self, unused: Demand) -> None:
        if self._open:
            self._open = False
            self._give_back(unused)


class Quotas:
    """The accounts of all tenants at one ingress.

    Args:
        others: with whom every quota is shared; see `part_of`.
        clock: seconds that never run back.
    """

    def __init__(self, others: Others = alone, clock: Callable[[], float] = time.monotonic) -> None:
        self._others = others
        self._clock = clock
        self._accounts: dict[str, tuple[_Meter, _Meter]] = {}

    def charge(self, tenant: TenantConfig, tokens: int) -> Charge:
        """Take one request and `tokens` from what the tenant has left.

        Call it once for what a client sends, whatever becomes of it afterwards.

        Args:
            tokens: the most that it is expected to use, prompt and output.

        Raises:
            QuotaError: the quota is used up, or is smaller than this request; nothing was taken.
        """
        if tenant.tokens_per_minute is not None and tokens > tenant.tokens_per_minute:
            raise QuotaError(
                f"this request may take {tokens} tokens (prompt and max_tokens), more than tenant "
                f"{tenant.name} has per minute ({tenant.tokens_per_minute:g}); lower max_tokens or "
                "shorten the prompt",
                retry_after_s=None,
            )
        now_s, amounts = self._clock(), Demand(1, tokens)
        for meter, amount in zip(self._meters(tenant), amounts, strict=True):
            meter.ask(amount, now_s)
        entries = self._entries(tenant, amounts, now_s)
        wait_s, kind = max(
            ((meter.wait_s(amount, part, now_s), kind) for kind, meter, amount, part in entries),
            default=(0.0, ""),
        )
        if wait_s > 0:
            raise QuotaError(
                f"tenant {tenant.name} has used up its {kind} per minute", retry_after_s=wait_s
            )
        for _, meter, amount, part in entries:
            meter.take(amount, part, now_s)
        return Charge(partial(self._give_back, tenant), tokens)

    def demands(self) -> Mapping[str, Demand]:
        """What this ingress was lately asked for in every tenant's name: the others' `others`."""
        now_s = self._clock()
        return {
            name: Demand(*(meter.asked(now_s) for meter in meters))
            for name, meters in self._accounts.items()
        }

    def _give_back(self, tenant: TenantConfig, unused: Demand) -> None:
        now_s = self._clock()
        for _, meter, amount, part in self._entries(tenant, unused, now_s):
            meter.take(-amount, part, now_s)

    def _entries(
        self, tenant: TenantConfig, amounts: Demand, now_s: float
    ) -> list[tuple[str, _Meter, float, float]]:
        """Of each quota that the tenant has: its name, meter, amount, and our part of it."""
        quotas = (tenant.requests_per_minute, tenant.tokens_per_minute)
        others = tuple(zip(*self._others(tenant.name), strict=True)) or ((), ())
        return [
            (kind, meter, amount, part_of(quota, meter.asked(now_s), rest))
            for kind, meter, amount, quota, rest in zip(
                Demand._fields, self._meters(tenant), amounts, quotas, others, strict=True
            )
            if quota is not None
        ]

    def _meters(self, tenant: TenantConfig) -> tuple[_Meter, _Meter]:
        return self._accounts.setdefault(tenant.name, (_Meter(), _Meter()))
