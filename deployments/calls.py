"""What travels between the ingress and a replica: frozen dataclasses, one chunk per engine step."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from select_n_core.engine.messages import EngineInfo, EngineStats
from select_n_core.errors import InputError, OverloadedError, QuotaError, SelectNError
from select_n_core.slo import SLO

Finish = Literal["stop", "length"]

# The engine reserves KV for prompt plus max_tokens, so a request that names no limit must not
# take the whole context.
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as the model's chat template reads it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class SamplingWish:
    """What a client said about sampling; None leaves the choice to the model's own defaults."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """Who is served, and how well.

    Attributes:
        tenant: empty where nobody needs to be known. weight: of its share of a replica.
        slo_class: by name; empty for the model's own targets.
        priority: a larger one is served first, within its tenant's share.
        slo: the targets; None for the model's own.
        max_queue: requests of the class that may wait at one replica; None is the model's own.
        max_tenant_queue: the same of the tenant.
    """

    tenant: str = ""
    weight: float = 1.0
    slo_class: str = ""
    priority: int = 0
    slo: SLO | None = None
    max_queue: int | None = None
    max_tenant_queue: int | None = None


@dataclass(slots=True)
class Route:
    """Where a call is to go, and where it went.

    The router on the way writes the second part, so a route belongs to one attempt of one call.

    Attributes:
        prefer: replicas in order, first to last. avoid: only where there is nobody else.
        sender, number: which call of which ingress it is; see `Request`.
        sent_to: the replica that took it. living: how many replicas the router knew.
    """

    prefer: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    sender: str = ""
    number: int = 0
    sent_to: str = ""
    living: int = 0

    @property
    def target(self) -> str:
        """The replica that took it, as far as one can tell; empty where one cannot."""
        return self.sent_to or next(iter(self.prefer), "")


@dataclass(frozen=True, slots=True)
class Call:
    """One sequence that a client asks for.

    Attributes:
        id: unique among live calls.
        prompt: plain text, token ids, or the turns of a conversation.
        prompt_field, max_tokens_field: what the client calls them, for errors.
        terms: whose it is and what it is promised; never from the client's own words.
        max_tokens: output tokens at most; None lets the replica choose.
        stop: strings that end the text, not shown.
        session: calls with the same one gain by going to the same replica; empty is none.
        route: None leaves it to Ray Serve.
    """

    id: str
    prompt: str | tuple[int, ...] | tuple[Message, ...]
    sampling: SamplingWish = field(default_factory=SamplingWish)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    prompt_field: str = "prompt"
    max_tokens_field: str = "max_tokens"
    terms: Terms = Terms()
    session: str = ""
    route: Route | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The verdict, before prefill: the call is let in, and has KV memory and a place.

    Attributes:
        cached_tokens: of the prompt's, those that the replica need not compute again.
    """

    prompt_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenChance:
    """A token as text with its natural-log probability."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """A token that was drawn, and the most likely alternatives, most likely first."""

    drawn: TokenChance
    top: tuple[TokenChance, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step added.

    Attributes:
        text: may lag behind the tokens (unfinished characters, possible stop strings).
        tokens: how many were drawn.
        finish: set on the last delta.
    """

    text: str
    tokens: int = 0
    details: tuple[TokenDetail, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The call ends here: as the first chunk it was refused, later it broke.

    Errors travel as data, so that their code, field and delay survive every transport.
    """

    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The failure behind an error; one that was not raised on purpose is internal."""
        if not isinstance(error, SelectNError):
            return cls("internal_error", f"internal error: {type(error).__name__}")
        return cls(
            code=error.code,
            message=str(error),
            field=error.field if isinstance(error, InputError) else None,
            retry_after_s=(
                error.retry_after_s if isinstance(error, OverloadedError | QuotaError) else None
            ),
        )


Chunk = Accepted | Delta | Failure


@dataclass(frozen=True, slots=True)
class Report:
    """A replica as others see it, at one moment.

    Attributes:
        node: of the cluster, on which it runs.
        measured_at_s: time of day (`time.time()`) at which `stats` held.
        draining: it takes no more calls.
    """

    replica: str
    info: EngineInfo
    stats: EngineStats
    node: str = ""
    measured_at_s: float = 0.0
    draining: bool = False


class Backend(Protocol):
    """A model's replicas, as the ingress sees them."""

    def generate(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Run one call: a verdict, then deltas up to one with `finish`, or a failure.

        It never raises. Closing it early stops the request in the engine.
        """
        ...

    async def check(self, timeout_s: float) -> Failure | None:
        """None when a replica answers within `timeout_s`, else why not."""
        ...

    async def reports(self, timeout_s: float) -> list[Report]:
        """One report of every replica; empty when they do not answer within `timeout_s`."""
        ...
