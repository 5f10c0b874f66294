"""The planner: from a latency model, a memory budget and an SLO to k and N.

Source: Select-N's offline stage (arXiv 2502.08182): N_min follows from the SLO, N_max from
device memory; an empty range is a reason, not a crash. Here the choice maximises goodput, and
k = 0 ("do not offload") is always a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from select_n_core.decisions.candidate import (
    TPOT_MARGIN,
    Candidate,
    PlanInputs,
    evaluate,
    k_max,
    serve,
)
from select_n_core.decisions.interval import WORTH, frees_memory
from select_n_core.decisions.lending import most_lent
from select_n_core.decisions.order import interval_of_k
from select_n_core.errors import InputError
from select_n_core.quantities import format_bytes, format_seconds

_EQUAL = 1e-6  # rates that differ by less are the same rate, summed in another order


class Reason(StrEnum):
    """Why there is no feasible plan."""

    SLO_BELOW_COMPUTE = "slo_below_compute"
    DEVICE_TOO_SMALL = "device_too_small"
    HOST_TOO_SMALL = "host_too_small"
    INTERVAL_RANGE_EMPTY = "interval_range_empty"


class Note(StrEnum):
    """What a user should know about a feasible plan."""

    OFFLOAD_NOT_NEEDED = "offload_not_needed"
    FORCED_INTERVAL = "forced_interval"
    FORCED_INTERVAL_GAINS_NOTHING = "forced_interval_gains_nothing"
    FORCED_INTERVAL_MISSES_SLO = "forced_interval_misses_slo"


@dataclass(frozen=True, slots=True)
class Plan:
    """The planner's answer.

    Attributes:
        k, interval: units streamed and N = L/k; interval is None at k = 0.
        interval_range: (N from the SLO and host memory, N from device memory); an end is None
            where nothing needs streaming. None when a bound does not exist at all.
        reason: the word for why it is infeasible. message: the same in a sentence with the mend.
        max_batch: typical requests at a time, by SLO and KV; 0 when infeasible. The predictions
            are for as many.
        max_running: requests at a time within the SLO, were there KV for all of them, at the best
            k while serving.
        k_min, k_max: how far k may turn in this arena while serving.
        mirrors: units to mirror (m): the most that time and host memory allow to stream.
        candidates: every k from 0 to L, for tables and plots.
    """

    feasible: bool
    k: int
    interval: float | None
    interval_range: tuple[float | None, float | None] | None
    predicted_iteration_s: float
    predicted_tpot_s: float
    predicted_ttft_s: float
    device_bytes: int
    host_bytes: int
    max_batch: int
    max_running: int
    kv_tokens: int
    k_min: int
    k_max: int
    mirrors: int
    slots: int
    reason: Reason | None
    note: Note | None
    message: str
    candidates: tuple[Candidate, ...]


def make_plan(inputs: PlanInputs) -> Plan:
    """Choose k: the fewest streamed units among those with the most goodput within the SLO."""
    _check(inputs)
    candidates = tuple(evaluate(inputs, k) for k in range(inputs.memory.units + 1))
    if inputs.forced_k is not None:
        return _forced(inputs, candidates)
    able = [c for c in candidates if c.feasible and frees_memory(c.k, 0, inputs.slots)]
    if not able:
        return _infeasible(inputs, candidates)
    wanted = inputs.rate_per_s if inputs.rate_per_s is not None else float("inf")
    enough = min(wanted, max(c.requests_per_s for c in able)) * (1 - _EQUAL)
    best = next(
        c for c in able if c.requests_per_s >= (enough * (1 - WORTH) if c.k == 0 else enough)
    )
    if best.k:
        message = f"one in every {best.interval:g} {inputs.unit_name} streams from host memory"
        return _plan(inputs, candidates, best, message=message)
    message = "everything fits on the device: nothing is streamed"
    plan = _plan(inputs, candidates, best, note=Note.OFFLOAD_NOT_NEEDED, message=message)
    if plan.mirrors:
        message += f" until requests wait for KV, then up to k = {plan.mirrors}"
    return replace(plan, message=message)


def capacity_tokens(plan: Plan, inputs: PlanInputs) -> int:
    """The most prompt plus output tokens that one request may have under `plan`.

    k rises for a request that needs more KV, as far as mirrors and SLO allow.
    """
    most = plan.mirrors if plan.k_max > plan.k_min else plan.k
    within_reach = [c.kv_tokens for c in plan.candidates[plan.k : most + 1] if c.feasible]
    return min(inputs.max_context, max([plan.kv_tokens, *within_reach]))


def _range(candidates: tuple[Candidate, ...]) -> tuple[int | None, int | None]:
    """(largest k in time and in host memory, smallest k that fits the device)."""
    upper = [c.k for c in candidates if c.fits_host and c.meets_tpot and c.meets_ttft]
    lower = [c.k for c in candidates if c.fits_device]
    return max(upper, default=None), min(lower, default=None)


def _plan(
    inputs: PlanInputs,
    candidates: tuple[Candidate, ...],
    chosen: Candidate,
    *,
    reason: Reason | None = None,
    note: Note | None = None,
    message: str,
) -> Plan:
    upper, lower = _range(candidates)
    units = inputs.memory.units
    k_min, mirrors = _range_while_serving(inputs, candidates, chosen)
    bounds = (
        None
        if upper is None or lower is None
        else (interval_of_k(upper, units), interval_of_k(lower, units))
    )
    return Plan(
        feasible=reason is None,
        k=chosen.k,
        interval=chosen.interval,
        interval_range=bounds,
        predicted_iteration_s=chosen.serving.iteration_s,
        predicted_tpot_s=chosen.serving.tpot_s,
        predicted_ttft_s=chosen.serving.ttft_s,
        device_bytes=inputs.device_bytes,
        host_bytes=inputs.memory.mirrored_bytes(mirrors),
        max_batch=chosen.serving.batch if reason is None else 0,
        max_running=max(c.max_running for c in (chosen, *candidates[k_min : mirrors + 1])),
        kv_tokens=chosen.kv_tokens,
        k_min=k_min,
        k_max=k_max(inputs, k_min),
        mirrors=mirrors,
        slots=inputs.slots,
        reason=reason,
        note=note,
        message=message,
        candidates=candidates,
    )


def _range_while_serving(
    inputs: PlanInputs, candidates: tuple[Candidate, ...], chosen: Candidate
) -> tuple[int, int]:
    """(the least k, units to mirror): a fixed interval stands still, and so does a tight arena."""
    upper, lower = _range(candidates)
    if inputs.forced_k is not None or lower is None or upper is None:
        return chosen.k, chosen.k
    if not chosen.k:
        return 0, most_lent(inputs, candidates) if k_max(inputs, 0) else 0
    k_min = min(lower, chosen.k)
    return (k_min if k_max(inputs, k_min) > k_min else chosen.k), max(chosen.k, upper)


def _forced(inputs: PlanInputs, candidates: tuple[Candidate, ...]) -> Plan:
    """A user's interval is obeyed as long as memory holds it; a missed SLO is a note."""
    assert inputs.forced_k is not None
    chosen = candidates[inputs.forced_k]
    asked, mend = f"interval {_shown(chosen.interval)}", "interval: auto"
    if inputs.policy is not None:
        asked, mend = f"policy {inputs.policy}", "policy: select_n"
    if not chosen.fits_device or not chosen.fits_host:
        kind, reason = (
            ("device", Reason.DEVICE_TOO_SMALL)
            if not chosen.fits_device
            else ("host", Reason.HOST_TOO_SMALL)
        )
        need, have = (
            (chosen.device_bytes, inputs.device_bytes)
            if kind == "device"
            else (chosen.host_bytes, inputs.host_bytes)
        )
        message = (
            f"{asked} (k = {chosen.k}) needs "
            f"{format_bytes(need, up=True)} of {kind} memory, {format_bytes(have)} are given; "
            f"raise {kind}_memory or set {mend}"
        )
        return _plan(inputs, candidates, chosen, reason=reason, message=message)
    if 0 < chosen.k <= inputs.slots:
        note = Note.FORCED_INTERVAL_GAINS_NOTHING
        message = (
            f"k = {chosen.k} frees no device memory: the staging ring of {inputs.slots} slots "
            "takes it all"
        )
    elif not (chosen.meets_tpot and chosen.meets_ttft):
        note = Note.FORCED_INTERVAL_MISSES_SLO
        message = (
            f"{asked} is predicted to take "
            f"{format_seconds(chosen.serving.tpot_s)} per token and "
            f"{format_seconds(chosen.serving.ttft_s)} to the first, above the targets"
        )
    else:
        note = Note.FORCED_INTERVAL
        message = f"{asked} as asked"
    # A user who forces N past the SLO decided against it: memory alone limits the batch.
    if not chosen.max_running:
        memory = inputs.memory
        request = memory.blocks_of(inputs.prompt_tokens + inputs.output_tokens)
        batch = min(inputs.max_batch, chosen.kv_tokens // memory.block_tokens // request)
        serving = serve(inputs, chosen.k, batch)
        chosen = replace(chosen, serving=serving, max_running=inputs.max_batch)
    return _plan(inputs, candidates, chosen, note=note, message=message)


def _infeasible(inputs: PlanInputs, candidates: tuple[Candidate, ...]) -> Plan:
    upper, lower = _range(candidates)
    memory, slo = inputs.memory, inputs.slo
    smallest = min(candidates, key=lambda c: c.device_bytes)
    fastest = min(candidates, key=lambda c: c.serving.tpot_s)
    if lower is None:
        reason, shown = Reason.DEVICE_TOO_SMALL, smallest
        message = (
            f"even with {smallest.k} of {memory.units} units streamed, one request of "
            f"{inputs.prompt_tokens + inputs.output_tokens} tokens needs "
            f"{format_bytes(smallest.device_bytes, up=True)} of device memory, "
            f"{format_bytes(inputs.device_bytes)} are given; raise device_memory"
        )
    elif not any(c.meets_tpot and c.meets_ttft for c in candidates):
        reason, shown = Reason.SLO_BELOW_COMPUTE, fastest
        message = (
            f"a request that runs alone needs {_targets(fastest)} at best, the targets are "
            f"{format_seconds(slo.tpot_s)} and {format_seconds(slo.ttft_s)}; raise them or use a "
            "faster device"
        )
    elif not any(c.fits_device and c.fits_host for c in candidates):
        reason, shown = Reason.HOST_TOO_SMALL, candidates[lower]
        message = (
            f"the device holds the model only with {lower} or more of {memory.units} units "
            f"streamed, which takes {format_bytes(candidates[lower].host_bytes, up=True)} of host "
            f"memory; {format_bytes(inputs.host_bytes)} are given; raise host_memory or "
            "device_memory"
        )
    else:
        reason, shown = Reason.INTERVAL_RANGE_EMPTY, candidates[lower]
        allowed = candidates[upper or 0]
        needed = min(candidates[: allowed.k + 1], key=lambda c: c.device_bytes)
        message = (
            f"the targets allow N >= {_shown(allowed.interval)} (k <= {allowed.k}), device memory "
            f"needs N <= {_shown(shown.interval)} (k >= {shown.k}): give "
            f"{format_bytes(needed.device_bytes, up=True)} of device_memory, or "
            f"{_targets(shown)}"
        )
    return _plan(inputs, candidates, shown, reason=reason, message=message)


def _targets(candidate: Candidate) -> str:
    """The targets that this candidate would keep, as far as it misses those given."""
    targets = []
    if not candidate.meets_tpot:
        tpot_s = candidate.serving.tpot_s / (1 - TPOT_MARGIN)
        targets.append(f"a tpot of {format_seconds(tpot_s, up=True)}")
    if not candidate.meets_ttft:
        targets.append(f"a ttft of {format_seconds(candidate.serving.ttft_s, up=True)}")
    return " and ".join(targets)


def _shown(interval: float | None) -> str:
    return "off" if interval is None else f"{interval:g}"


def _check(inputs: PlanInputs) -> None:
    for name in ("device_bytes", "slots", "max_batch", "prompt_tokens", "output_tokens"):
        if getattr(inputs, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(inputs, name)}", field=name)
    if inputs.host_bytes < 0:
        raise InputError(
            f"host_memory must not be negative, got {inputs.host_bytes}", field="host_memory"
        )
    if inputs.max_step_tokens < inputs.max_batch:
        raise InputError(
            f"max_step_tokens ({inputs.max_step_tokens}) is below max_batch ({inputs.max_batch}): "
            "a step must hold one token of every running request",
            field="max_step_tokens",
        )
    total = inputs.prompt_tokens + inputs.output_tokens
    if total > inputs.max_context:
        raise InputError(
            f"prompt_tokens + output_tokens is {total}, the model's context is "
            f"{inputs.max_context}",
            field="prompt_tokens",
        )
    if inputs.forced_k is not None and not 0 <= inputs.forced_k <= inputs.memory.units:
        raise InputError(f"k must be between 0 and {inputs.memory.units}", field="interval")
