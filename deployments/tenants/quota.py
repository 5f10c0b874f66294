"""Quotas per minute as token buckets, and each ingress' part of them. Pure: time is an argument.

A bucket holds a minute's worth at most: in any time t, no more than quota * (1 + t / 60 s) is
taken, and what one request takes above its part of the quota is waited for afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from select_n_core.decisions.bus import fair_shares

MINUTE_S = 60.0
_ROUNDING = 1e-9


class Bucket(NamedTuple):
    """What is left of a quota at a moment; below zero, that much was taken ahead of time."""

    level: float
    at_s: float


def filled(bucket: Bucket, per_minute: float, now_s: float) -> Bucket:
    """The bucket at `now_s`; it may have another size than before."""
    passed_s = max(0.0, now_s - bucket.at_s)
    return Bucket(min(bucket.level + per_minute * passed_s / MINUTE_S, per_minute), now_s)


def wait_s(bucket: Bucket, amount: float, per_minute: float) -> float:
    """Seconds until `amount` may be taken; 0 is now. More than a whole bucket needs a full one."""
    lacking = min(amount, per_minute) - bucket.level
    return 0.0 if lacking <= _ROUNDING * per_minute else lacking * MINUTE_S / per_minute


def taken(bucket: Bucket, amount: float, per_minute: float) -> Bucket:
    """The bucket without `amount`; a negative one gives back, up to the brim."""
    return Bucket(min(bucket.level - amount, per_minute), bucket.at_s)


def part_of(quota: float, own: float, others: Sequence[float]) -> float:
    """One ingress' part of a quota: what it is asked for within fair shares, the rest evenly.

    All ingresses that see the same numbers take parts that add up to the quota.

    Args:
        own, others: what each was lately asked for, per minute.
    """
    wants = (own, *others)
    shares = fair_shares(wants, quota)
    return shares[0] + max(0.0, quota - sum(shares)) / len(wants)
