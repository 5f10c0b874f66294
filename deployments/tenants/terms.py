"""On which terms a request is served: its tenant's class, and what its headers ask for below it.

A header never gives more than the class: of another class, or of times, only what is no better than
the tenant's own counts. How many may wait is a class' own, whoever asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from deployments.calls import Terms
from deployments.tenants.gate import Caller
from select_n_core.errors import RequestError
from select_n_core.live import ClassConfig, LivePolicy
from select_n_core.quantities import parse_seconds
from select_n_core.slo import SLO

CLASS_HEADER = "X-SelectN-Class"
TTFT_HEADER = "X-SelectN-TTFT"
TPOT_HEADER = "X-SelectN-TPOT"

# The configuration's parser also does arithmetic, which is nothing for strangers.
_TIME = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})? ?(us|ms|s|min)")
_MOST_S = 3600.0  # who waits holds a place in a queue


class _Level(NamedTuple):
    """What a class grants: targets, rank, and how many may wait."""

    slo: SLO
    priority: int
    max_queue: int | None


def terms_of(caller: Caller, headers: Mapping[str, str], own: SLO) -> Terms:
    """The terms of a request for a model.

    Args:
        headers: of the request; names in any case, as HTTP has them.
        own: what the model promises; nobody is promised a shorter time per token.

    Raises:
        RequestError: a header names no class, or no time.
    """
    policy, tenant = caller.policy, caller.tenant
    who = Terms()
    if tenant is not None:
        who = Terms(tenant=tenant.name, weight=tenant.weight, max_tenant_queue=tenant.max_queue)
    name = policy.default_class
    if tenant is not None and tenant.slo_class is not None:
        name = tenant.slo_class
    level = _Level(own, 0, None) if name is None else _level(policy.classes[name], own)
    asked = headers.get(CLASS_HEADER)
    if asked is not None:
        other = _level(_class_of(asked, policy), own)
        if _is_no_better(other, level):
            name, level = asked, other
        else:  # it stays in the queue of its own class: the other one is not its to fill
            level = _worse(level, other)
    ttft_s, tpot_s = _time(headers, TTFT_HEADER), _time(headers, TPOT_HEADER)
    if name is None and asked is None and ttft_s is None and tpot_s is None:
        return who  # the model's own targets, as the replica has them
    slo = SLO(
        tpot_s=max(level.slo.tpot_s, tpot_s or 0.0),
        ttft_s=max(level.slo.ttft_s, ttft_s or 0.0),
        max_wait_s=level.slo.max_wait_s,
    )
    return replace(
        who,
        slo_class=name or "",
        priority=level.priority,
        slo=slo,
        max_queue=level.max_queue,
    )


def _class_of(name: str, policy: LivePolicy) -> ClassConfig:
    found = policy.classes.get(name)
    if found is None:
        known = ", ".join(policy.classes) or "none"
        raise RequestError(
            f"{CLASS_HEADER}: there is no class {name!r}; there is {known}", field=CLASS_HEADER
        )
    return found


def _level(given: ClassConfig, own: SLO) -> _Level:
    slo = SLO(max(given.tpot, own.tpot_s), given.ttft, given.max_wait)
    return _Level(slo, given.priority, given.max_queue)


def _is_no_better(one: _Level, other: _Level) -> bool:
    return (
        one.slo.tpot_s >= other.slo.tpot_s
        and one.slo.ttft_s >= other.slo.ttft_s
        and one.priority <= other.priority
    )


def _worse(own: _Level, other: _Level) -> _Level:
    """The worse of the two in each respect; it waits as the other class does."""
    slo = SLO(
        tpot_s=max(own.slo.tpot_s, other.slo.tpot_s),
        ttft_s=max(own.slo.ttft_s, other.slo.ttft_s),
        max_wait_s=other.slo.max_wait_s,
    )
    return _Level(slo, min(own.priority, other.priority), own.max_queue)


def _time(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    if not _TIME.fullmatch(text.strip()):
        raise RequestError(
            f"{name} must be a time with its unit, for example 500ms, got {text!r}", field=name
        )
    time_s = parse_seconds(text.strip())
    if time_s > _MOST_S:
        raise RequestError(f"{name} must be an hour at most, got {text!r}", field=name)
    return time_s
