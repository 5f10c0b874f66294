"""What travels between the engine and its clients: frozen dataclasses, one message per step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from select_n_core.config import ModelConfig
from select_n_core.decisions.lease import Ladder
from select_n_core.decisions.vacancy import Vacancy
from select_n_core.errors import InputError, SelectNError


class FinishReason(StrEnum):
    """Why a request produces no more tokens."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Defaults are greedy.

    Attributes:
        max_tokens: output tokens at most.
        temperature: 0 is greedy.
        top_p, top_k, min_p: nucleus mass, candidates (0 is all), relative floor.
        repetition_penalty: over prompt and output, 1 is none (CTRL's, as transformers has it).
        presence_penalty, frequency_penalty: over output only, 0 is none (OpenAI's).
        seed: of this request's own generator; None draws one.
        logprobs: number of alternatives reported with each token's log-probability; None is off.
        stop_token_ids: tokens that end the request, not shown in the text.
        ignore_eos: go on past end-of-sequence tokens (benchmarks).
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 2, "between 0 and 2"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "between -2 and 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
        }
        for name, (holds, range_) in checks.items():
            if not holds:
                raise InputError(f"{name} must be {range_}, got {getattr(self, name)}", field=name)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate.

    Attributes:
        id: unique among live requests.
        prompt: token ids, at least one.
        tenant: opaque; requests of one tenant share its fair share.
        weight: of the tenant's share, against those of others; the latest one holds.
        slo_class: opaque; requests of one class share its part of the queue.
        priority: a larger one is served first, within its tenant's share.
        deadline_s: its first token is due so long after its arrival; None follows the SLO.
        tpot_s: per output token after the first; None, or less than the SLO's, is the SLO's.
        max_wait_s: to be let in; None follows the SLO.
        max_queue: new requests of its class that may wait; None is as many as of all classes.
        max_tenant_queue: the same of its tenant.
        sender, number: who sent it, and which of that sender's it is, from 1 on; empty where
            nobody wants to know when it was heard.
        sent_s: when it arrived, by the machine's monotonic clock; None is when the engine reads it.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    tenant: str = ""
    weight: float = 1.0
    slo_class: str = ""
    priority: int = 0
    deadline_s: float | None = None
    tpot_s: float | None = None
    max_wait_s: float | None = None
    max_queue: int | None = None
    max_tenant_queue: int | None = None
    sender: str = ""
    number: int = 0
    sent_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise InputError(f"weight must be above zero, got {self.weight}", field="weight")
        for name in ("deadline_s", "tpot_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be above zero, got {value}", field=name)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of the token drawn and of the most likely alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one request.

    The first output, empty, says that the request was let in: it owns its place from then on.

    Attributes:
        cached_tokens: of the first output: prompt tokens that the cache held already.
        tokens: new token ids, in order; the end-of-sequence token is not among them.
        finish: set on the request's last output.
        error: the error behind `finish == ERROR`.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    error: Exception | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A step's view of the engine, for reports and autoscaling.

    Attributes:
        measured_at_s: the time of day (`time.time()`) at which all of it held.
        k, interval: units streamed now and N = L/k.
        mirrored, cap: units mirrored, and the most that the lease allows to stream.
        host_bytes, lease_bytes: what the mirrors take, and what they may.
        reserved_bytes: written down for this engine in its domain: pages of mirrors and host KV,
            and those kept for mirrors to come.
        turns: how often k was turned, by cause.
        running, waiting: requests.
        kv_free_tokens, kv_tokens: KV capacity left and in all. kv_cached_tokens: of what is left,
            that which holds prefixes until somebody needs it.
        link_bytes, streamed_units: host to device since start.
        link_bytes_by: since start, by (direction, kind).
        stall_s: compute time lost waiting for copies since start.
        iteration_s: last iteration's wall time.
        ttft_headroom, tpot_headroom: 1 - p95 over the last window / target; None while nothing
            finished in it. Negative is a broken promise.
        swaps, recomputes: preemptions since start, by where the cache went: to host blocks, or
            nowhere, to be computed again.
        prefix_queried_tokens, prefix_hit_tokens: prompt tokens let in since start, and those of
            them that the cache held; 0 where it keeps no prefixes.
        admitted: requests let in since start. returned: those that were not, by reason.
        vacancy: the room that is left; None before the engine said anything.
        offered_tokens: prompts and typical answers of all requests that came since start, by
            priority.
    """

    measured_at_s: float = 0.0
    k: int = 0
    interval: float | None = None
    mirrored: int = 0
    cap: int = 0
    host_bytes: int = 0
    lease_bytes: int = 0
    reserved_bytes: int = 0
    turns: Mapping[str, int] = field(default_factory=dict)
    running: int = 0
    waiting: int = 0
    kv_free_tokens: int = 0
    kv_cached_tokens: int = 0
    kv_tokens: int = 0
    iterations: int = 0
    link_bytes: int = 0
    link_bytes_by: Mapping[tuple[str, str], int] = field(default_factory=dict)
    streamed_units: int = 0
    stall_s: float = 0.0
    iteration_s: float = 0.0
    ttft_headroom: float | None = None
    tpot_headroom: float | None = None
    swaps: int = 0
    recomputes: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    admitted: int = 0
    returned: Mapping[str, int] = field(default_factory=dict)
    vacancy: Vacancy | None = None
    offered_tokens: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Start:
    """To the engine's own process, first: what it is to be.

    Attributes:
        lent: it starts with the mirrors that it cannot serve without; others are offered to it.
    """

    config: ModelConfig
    lent: bool = False


@dataclass(frozen=True, slots=True)
class Offer:
    """Host bytes that mirrors may take beyond the lease so far.

    Attributes:
        valid_until_s: by the machine's monotonic clock; it is refused from then on.
    """

    id: str
    nbytes: int
    valid_until_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Revocation:
    """Host bytes that are to be given back within `deadline_s`."""

    id: str
    nbytes: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """How an offer or a revocation ended: taken, or free; or the error that says why not."""

    id: str
    error: SelectNError | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts about a started engine that do not change while k is fixed.

    Attributes:
        plan_line: what was requested, pinned and predicted, for people.
        k_min: the fewest units that can be streamed in this arena.
        max_tokens: the most prompt plus output tokens one request may have.
        device_bytes: the arena, exactly. host_bytes: mirrors and host KV blocks, exactly.
        compute_kind: `real`, or `paced`: held to a record's times.
        ladder: what more or fewer mirrors take and are worth; None where nobody planned any.
        mirrors_group: of those in its domain who may share this engine's mirrors.
    """

    plan_line: str
    units: int
    k: int
    interval: float | None
    max_batch: int
    max_tokens: int
    device_bytes: int
    host_bytes: int
    kv_tokens: int
    predicted_tpot_s: float
    predicted_iteration_s: float
    link_kind: str
    link_bytes_per_s: float
    eos_token_ids: tuple[int, ...] = ()
    compute_kind: str = "real"
    k_min: int = 0
    ladder: Ladder | None = None
    mirrors_group: str = ""


@dataclass(frozen=True, slots=True)
class Commands:
    """To the engine, between two steps."""

    submit: tuple[Request, ...] = ()
    cancel: tuple[str, ...] = ()
    offer: tuple[Offer, ...] = ()
    revoke: tuple[Revocation, ...] = ()
    stop: bool = False


class Turned(NamedTuple):
    """Other units are streamed from a step on.

    Attributes:
        at_s: on the engine's clock.
        before, after: k. cause: see `decisions.facts.Cause`.
    """

    at_s: float
    before: int
    after: int
    cause: str


@dataclass(frozen=True, slots=True)
class StepReport:
    """From the engine, after each step."""

    outputs: tuple[Output, ...] = ()
    leases: tuple[LeaseAnswer, ...] = ()
    stats: EngineStats = field(default_factory=EngineStats)
    turned: tuple[Turned, ...] = ()
