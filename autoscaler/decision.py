"""The scaling decision: from what every replica can still promise to how many replicas are wanted.

Pure: facts in, a number out; the cluster and a simulator call the same function. The unit is the
*used share* of a promise, p95 / target, so headroom = 1 - used. Sharing the same requests among
fewer replicas raises the used share in proportion; the part of TPOT that a request alone already
takes (`tpot_floor`) is set apart first, because no number of replicas shrinks it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

from select_n_core.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """What one replica reports about the promise it keeps.

    Attributes:
        ttft_headroom, tpot_headroom: 1 - p95 / target; negative is a broken promise, 1 is idle.
        running, waiting: requests, means over the look-back window.
        tpot_floor: share of the TPOT target that a request alone takes, at least 0. At 1 or more
            TPOT says nothing about replicas and is left out.
    """

    ttft_headroom: float
    tpot_headroom: float
    running: float
    waiting: float
    tpot_floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ttft_headroom", "tpot_headroom"):
            if not -math.inf < getattr(self, name) <= 1:
                raise InputError(
                    f"{name} must be at most 1 and finite, got {getattr(self, name)}", field=name
                )
        for name in ("running", "waiting", "tpot_floor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"{name} must be 0 or more and finite, got {getattr(self, name)}", field=name
                )

    @property
    def used(self) -> float:
        """The larger used share of the two promises, above 1 when one is broken."""
        ttft = 1 - self.ttft_headroom
        if self.tpot_floor >= 1:
            return ttft
        # A p95 below the floor is noise around an unloaded replica.
        tpot = max(0.0, 1 - self.tpot_headroom - self.tpot_floor) / (1 - self.tpot_floor)
        return max(ttft, tpot)


@dataclass(frozen=True, slots=True)
class ScalingFacts:
    """One look at a deployment.

    Attributes:
        replicas: those with a fresh report.
        target_replicas: how many were asked for last.
        min_replicas, max_replicas: the bounds.
        silent_replicas: running, without a fresh report.
        settling: a replica joined too recently for the others' p95 to show it.
    """

    replicas: tuple[ReplicaFacts, ...]
    target_replicas: int
    min_replicas: int
    max_replicas: int
    silent_replicas: int = 0
    settling: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise InputError(
                f"need 0 <= min_replicas <= max_replicas, got {self.min_replicas} and "
                f"{self.max_replicas}",
                field="min_replicas",
            )
        for name in ("target_replicas", "silent_replicas"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more", field=name)


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """The water marks between which the number of replicas stays.

    Attributes:
        low_water: below this headroom a replica more is wanted.
        high_water: this headroom must remain after taking a replica away.
    """

    low_water: float = 0.05
    high_water: float = 0.3

    def __post_init__(self) -> None:
        for name in ("low_water", "high_water"):
            if not -1 < getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be between -1 and 1, got {getattr(self, name)}", field=name
                )
        if self.low_water >= self.high_water:
            raise ConfigError(
                f"low_water ({self.low_water}) must be below high_water ({self.high_water}), "
                "or the number of replicas swings",
                field="low_water",
            )


class Step(IntEnum):
    """What to do, as the change in the number of replicas."""

    DOWN = -1
    HOLD = 0
    UP = 1


def desired_replicas(facts: ScalingFacts, limits: ScalingLimits) -> int:
    """Replicas wanted, within the bounds: the last target or one beside it.

    One step at a time, because the p95 of an overloaded queue does not say by how much; the next
    step waits until the last one shows. With no fresh report the target stays.
    """
    wanted = facts.target_replicas + scaling_step(facts, limits)
    return min(max(wanted, facts.min_replicas), facts.max_replicas)


def scaling_step(facts: ScalingFacts, limits: ScalingLimits) -> Step:
    """The direction alone, before the bounds."""
    if not facts.replicas:
        return Step.HOLD
    if _wants_more(facts, limits):
        started = len(facts.replicas) + facts.silent_replicas
        coming = started < facts.target_replicas
        return Step.HOLD if coming or facts.settling else Step.UP
    return Step.DOWN if _can_spare_one(facts, limits) else Step.HOLD


def _wants_more(facts: ScalingFacts, limits: ScalingLimits) -> bool:
    replicas = facts.replicas
    requests = sum(replica.running + replica.waiting for replica in replicas)
    if requests <= len(replicas):
        return False  # each has a replica to itself: one more would not make any of them faster
    least = 1 - max(replica.used for replica in replicas)
    most = 1 - min(replica.used for replica in replicas)
    waits = any(replica.waiting > 0 for replica in replicas)
    # One bad replica among idle ones is the router's business: the rest can carry its load too.
    rest_can_carry = len(replicas) > 1 and _shared(replicas, len(replicas) - 1) >= limits.high_water
    return (least < limits.low_water and not rest_can_carry) or (waits and most < limits.high_water)


def _can_spare_one(facts: ScalingFacts, limits: ScalingLimits) -> bool:
    """Whether every replica, and the fleet after removing one, stays above the high-water mark."""
    left = min(len(facts.replicas), facts.target_replicas - 1)
    if facts.silent_replicas or left < 1:
        return False  # the load of a silent replica is unknown; the last one is never ours to take
    least = 1 - max(replica.used for replica in facts.replicas)
    return min(least, _shared(facts.replicas, left)) >= limits.high_water


def _shared(replicas: tuple[ReplicaFacts, ...], left: int) -> float:
    """The headroom when `left` replicas share evenly what all of them carry now."""
    return 1 - sum(replica.used for replica in replicas) / left
