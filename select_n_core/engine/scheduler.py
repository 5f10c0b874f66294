"""The scheduler: requests from arrival to their last token, one pure decision per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from select_n_core.decisions.latency import LatencyModel
from select_n_core.decisions.step import RunningFacts, StepState, WaitingFacts, plan_step
from select_n_core.engine.messages import Request
from select_n_core.errors import ContextLengthError, OverloadedError, RequestError
from select_n_core.kv.blocks import BlockTable
from select_n_core.slo import SLO

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a replica lets in.

    Attributes:
        max_tokens: prompt plus output of one request.
        max_queue: requests waiting at most.
        least_chunk: prompt tokens a step takes even when promises are already broken.
    """

    max_batch: int
    max_step_tokens: int
    max_queue: int
    max_tokens: int
    vocab_size: int
    least_chunk: int = 32


@dataclass(slots=True)
class Sequence:
    """A live request's state.

    Attributes:
        computed: tokens whose K/V are in the cache.
        tokens: prompt and output so far.
    """

    request: Request
    arrived_s: float
    tokens: list[int]
    computed: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def prompt_left(self) -> int:
        """Prompt tokens not computed yet."""
        return max(0, len(self.request.prompt) - self.computed)

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def reserved_tokens(self) -> int:
        """KV room it needs to run to its last token."""
        return len(self.request.prompt) + self.request.sampling.max_tokens

    def slack_s(self, now_s: float, tpot_s: float) -> float:
        """Seconds until its next token is due, if every token has `tpot_s`."""
        if self.first_token_s is None:
            return float("inf")
        return self.first_token_s + tpot_s * self.output_tokens - now_s


@dataclass(frozen=True, slots=True)
class Turn:
    """One sequence's part of a step: `count` tokens from `sequence.computed` on."""

    sequence: Sequence
    count: int

    @property
    def new_tokens(self) -> list[int]:
        """The token ids to compute."""
        start = self.sequence.computed
        return self.sequence.tokens[start : start + self.count]

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's end and so yields a token."""
        return self.sequence.computed + self.count == len(self.sequence.tokens)


@dataclass(slots=True)
class Scheduler:
    """Queues, admits and orders; `plan_step` decides."""

    limits: Limits
    slo: SLO
    latency: LatencyModel
    blocks: BlockTable
    k: int
    slots: int
    clock: Clock
    waiting: deque[Sequence] = field(default_factory=deque)
    running: dict[str, Sequence] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether nobody runs or waits."""
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ContextLengthError: it can never fit. RequestError: malformed or not unique.
            OverloadedError: the queue is full.
        """
        if not request.prompt:
            raise RequestError("the prompt is empty", field="prompt")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.limits.vocab_size:
            raise RequestError(
                f"prompt token ids must be between 0 and {self.limits.vocab_size - 1}",
                field="prompt",
            )
        asked = len(request.prompt) + request.sampling.max_tokens
        if asked > self.limits.max_tokens:
            raise ContextLengthError(
                f"prompt ({len(request.prompt)} tokens) plus max_tokens "
                f"({request.sampling.max_tokens}) is {asked}; this model serves at most "
                f"{self.limits.max_tokens} tokens per request here",
                field="max_tokens",
            )
        if self.find(request.id) is not None:
            raise RequestError(f"request id {request.id!r} is in use", field="id")
        # Those who wait for no more than the next step to begin are not queued yet.
        places = self.limits.max_batch - len(self.running)
        if len(self.waiting) >= self.limits.max_queue + places:
            raise OverloadedError(
                f"{len(self.waiting)} requests are waiting already; retry later",
                retry_after_s=self._retry_after_s(),
            )
        self.waiting.append(Sequence(request, self.clock(), list(request.prompt)))

    def find(self, request_id: str) -> Sequence | None:
        """The live sequence of that id."""
        if request_id in self.running:
            return self.running[request_id]
        return next((s for s in self.waiting if s.request.id == request_id), None)

    def remove(self, request_id: str) -> Sequence | None:
        """Forget a live sequence and take its blocks back; None if it is not live."""
        if (sequence := self.running.pop(request_id, None)) is not None:
            self.blocks.release(request_id)
            return sequence
        if (sequence := self.find(request_id)) is not None:
            self.waiting.remove(sequence)
        return sequence

    def next_step(self) -> list[Turn]:
        """Decide the step, admit whom it admits, and return everyone's turn."""
        decision = plan_step(self.state(), self.latency)
        for request_id in decision.admit:
            sequence = self.waiting.popleft()
            assert sequence.request.id == request_id
            self.blocks.reserve(request_id, sequence.reserved_tokens)
            self.running[request_id] = sequence
        self.k = decision.k_next
        return [Turn(self.running[request_id], count) for request_id, count in decision.rows]

    def state(self) -> StepState:
        """The facts that the step's decision is made from."""
        now_s = self.clock()
        places = self.limits.max_batch - len(self.running)
        return StepState(
            running=tuple(
                RunningFacts(
                    id=s.request.id,
                    context_tokens=s.computed,
                    prompt_left=s.prompt_left,
                    slack_s=s.slack_s(now_s, self.slo.tpot_s),
                )
                for s in self.running.values()
            ),
            waiting=tuple(
                WaitingFacts(
                    id=s.request.id,
                    prompt_tokens=len(s.request.prompt),
                    blocks=self.blocks.blocks_of(s.reserved_tokens),
                )
                for s, _ in zip(self.waiting, range(places), strict=False)
            ),
            free_blocks=self.blocks.free_blocks,
            max_batch=self.limits.max_batch,
            max_step_tokens=self.limits.max_step_tokens,
            least_chunk=self.limits.least_chunk,
            k=self.k,
            slots=self.slots,
        )

    def _retry_after_s(self) -> float:
        """When the first running request will have ended, at its promised pace."""
        left = [s.request.sampling.max_tokens - s.output_tokens for s in self.running.values()]
        return max(1.0, min(left, default=1) * self.slo.tpot_s)
