"""A live request's state, and its part of a step."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from select_n_core.decisions.facts import RequestFacts
from select_n_core.decisions.latency import StepShape, chunk_pairs
from select_n_core.decisions.service import INPUT_WEIGHT, OUTPUT_WEIGHT
from select_n_core.engine.messages import Request
from select_n_core.engine.targets import Targets, aimed
from select_n_core.kv.named import NOTHING, Found

_NEVER = 1 << 62  # tokens


@dataclass(slots=True)
class Sequence:
    """A live request's state.

    Attributes:
        request: without its prompt, which `tokens` begins with: the garbage collector would visit
            every token of a tuple, at the expense of some step.
        promise: what it was let in for, or will be. aim: what is decided by.
        tokens: prompt and output so far; no list, for the same reason.
        prompt_tokens: how many of them are the prompt.
        computed: tokens whose K/V are in the cache, on the device or in host blocks.
        since_s: when it began to wait; None while it runs. waited_s: before that, in all.
        charged: tokens that its tenant was charged for.
        room: tokens that fit the device blocks it owns.
        salt: of its tenant, where prefixes are cached; see `Salts.of`.
        names: of its first full blocks, as far as they were needed.
        named: how many of those that it owns were given theirs. name_at: tokens computed with
            which there is one more.
        findable: how many of its first blocks may be in the cache while it waits. found: which of
            them are. cached: the tokens that those hold.
        preempted: how often it gave its blocks back.
        coming_back: its cache is on the way from host blocks.
        facts: what decisions look at, as of the last call of `facts_of`.
    """

    request: Request
    arrived_s: float
    promise: Targets
    aim: Targets = field(init=False)
    tokens: array[int] = field(init=False)
    prompt_tokens: int = field(init=False)
    computed: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    since_s: float | None = None
    waited_s: float = 0.0
    charged: int = 0
    room: int = 0
    salt: blake2b | None = None
    names: list[bytes] = field(default_factory=list)
    named: int = 0
    name_at: int = _NEVER
    findable: int = 0
    found: Found = NOTHING
    cached: int = 0
    preempted: int = 0
    coming_back: bool = False
    facts: RequestFacts = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.aim = aimed(self.promise)
        self.tokens, self.prompt_tokens = array("q", request.prompt), len(request.prompt)
        self.request = replace(request, prompt=())
        self.facts = RequestFacts(
            request.id,
            context_tokens=0,
            prompt_left=self.prompt_tokens,
            slack_s=math.inf,
            most_tokens=self.most_tokens,
            tenant=request.tenant,
            priority=request.priority,
            arrived_s=self.arrived_s,
        )

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def most_tokens(self) -> int:
        """Prompt and output at most."""
        return self.prompt_tokens + self.request.sampling.max_tokens

    def owns(self, blocks: int, block_tokens: int) -> None:
        """It owns so many blocks from now on."""
        self.room, self.facts.blocks = blocks * block_tokens, blocks

    def let_in(self, now_s: float) -> None:
        """It waits no more."""
        assert self.since_s is not None
        self.waited_s, self.since_s = self.waited_s + now_s - self.since_s, None
        self.facts.waited_s, self.facts.wait_left_s = self.waited_s, math.inf

    def charge(self, tokens: int) -> float:
        """Weighted tokens up to `tokens` in all that its tenant was not charged for yet."""
        begin, end, prompt = self.charged, min(tokens, self.most_tokens), self.prompt_tokens
        if end <= begin:
            return 0.0
        self.charged = end
        read = max(0, min(end, prompt) - begin)
        return INPUT_WEIGHT * read + OUTPUT_WEIGHT * (end - begin - read)


def facts_of(
    sequences: Iterable[Sequence], now_s: float, expected_output: int
) -> tuple[RequestFacts, ...]:
    """What decisions look at, brought up to date.

    Written out in one loop, and what seldom changes is left to whoever changes it: it is done for
    everyone at every step.
    """
    found = []
    for each in sequences:
        facts, computed, first_s, since_s = (
            each.facts,
            each.computed or each.cached,
            each.first_token_s,
            each.since_s,
        )
        tpot_s, ttft_s, max_wait_s = each.aim
        known, prompt, most = len(each.tokens), each.prompt_tokens, facts.most_tokens
        left, output = known - computed, known - prompt
        facts.context_tokens = computed
        facts.prompt_left = 0 if left == 1 and output else left
        expected = prompt + expected_output if output < expected_output else known + 1
        facts.expected_tokens = expected if expected < most else most
        if first_s is None:
            facts.slack_s = each.arrived_s + ttft_s - now_s
        else:
            facts.slack_s = first_s + tpot_s * output - now_s
        if since_s is not None:
            facts.waited_s = each.waited_s + now_s - since_s
            if each.preempted:
                facts.wait_left_s = math.inf
            elif max_wait_s is None:
                facts.wait_left_s = facts.slack_s
            else:
                facts.wait_left_s = max_wait_s - (now_s - since_s)
        found.append(facts)
    return tuple(found)


def shape_of(turns: Iterable[Turn]) -> StepShape:
    """What a step of these turns computes, before it does."""
    rows = context = tokens = pairs = 0
    for turn in turns:
        sequence, amount = turn.sequence, turn.amount
        if amount == 1 and sequence.output_tokens:
            rows, context = rows + 1, context + sequence.computed
        else:
            tokens, pairs = tokens + amount, pairs + chunk_pairs(sequence.computed, amount)
    return StepShape(rows, context, tokens, pairs)


@dataclass(slots=True)
class Turn:
    """One sequence's part of a step: `amount` tokens from `sequence.computed` on."""

    sequence: Sequence
    amount: int

    @property
    def new_tokens(self) -> list[int]:
        """The token ids to compute."""
        start = self.sequence.computed
        return self.sequence.tokens[start : start + self.amount].tolist()

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's end and so yields a token."""
        return self.sequence.computed + self.amount == len(self.sequence.tokens)
