"""A live request's state, and its part of a step."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from select_n_core.decisions.facts import RequestFacts
from select_n_core.decisions.latency import StepShape, chunk_pairs
from select_n_core.decisions.service import INPUT_WEIGHT, OUTPUT_WEIGHT
from select_n_core.engine.messages import Request
from select_n_core.slo import SLO


@dataclass(slots=True)
class Sequence:
    """A live request's state.

    Attributes:
        computed: tokens whose K/V are in the cache, on the device or in host blocks.
        tokens: prompt and output so far; no list, whose every item the garbage collector visits.
        since_s: when it began to wait; None while it runs. waited_s: before that, in all.
        charged: tokens that its tenant was charged for.
        room: tokens that fit the device blocks it owns.
        preempted: how often it gave its blocks back.
        coming_back: its cache is on the way from host blocks.
    """

    request: Request
    arrived_s: float
    tokens: array[int]
    computed: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    since_s: float | None = None
    waited_s: float = 0.0
    charged: int = 0
    room: int = 0
    preempted: int = 0
    coming_back: bool = False

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def most_tokens(self) -> int:
        """Prompt and output at most."""
        return len(self.request.prompt) + self.request.sampling.max_tokens

    def slack_s(self, now_s: float, slo: SLO) -> float:
        """Seconds until its next token is due: the first by TTFT, then one per TPOT."""
        if self.first_token_s is not None:
            return self.first_token_s + slo.tpot_s * self.output_tokens - now_s
        deadline_s = self.request.deadline_s
        return self.arrived_s + (slo.ttft_s if deadline_s is None else deadline_s) - now_s

    def charge(self, tokens: int) -> float:
        """Weighted tokens up to `tokens` in all that its tenant was not charged for yet."""
        begin, end, prompt = self.charged, min(tokens, self.most_tokens), len(self.request.prompt)
        if end <= begin:
            return 0.0
        self.charged = end
        read = max(0, min(end, prompt) - begin)
        return INPUT_WEIGHT * read + OUTPUT_WEIGHT * (end - begin - read)


def facts_of(
    sequences: Iterable[Sequence], now_s: float, slo: SLO, block_tokens: int, expected_output: int
) -> tuple[RequestFacts, ...]:
    """What decisions look at. Written out in one loop: it is made for everyone at every step."""
    facts, make, never = [], tuple.__new__, math.inf
    tpot_s, max_wait_s = slo.tpot_s, slo.max_wait_s
    for each in sequences:
        request, computed, first_s, since_s = (
            each.request,
            each.computed,
            each.first_token_s,
            each.since_s,
        )
        prompt, known, most = len(request.prompt), len(each.tokens), request.sampling.max_tokens
        left, output = known - computed, known - prompt
        expected = expected_output if output < expected_output else output + 1
        slack_s = each.slack_s(now_s, slo) if first_s is None else first_s + tpot_s * output - now_s
        wait_left_s = never
        if since_s is not None and not each.preempted:
            wait_left_s = slack_s if max_wait_s is None else max_wait_s - (now_s - since_s)
        facts.append(
            make(
                RequestFacts,
                (
                    request.id,
                    computed,
                    0 if left == 1 and output else left,
                    slack_s,
                    each.room // block_tokens,
                    prompt + (expected if expected < most else most),
                    prompt + most,
                    request.tenant,
                    request.priority,
                    each.waited_s if since_s is None else each.waited_s + now_s - since_s,
                    each.arrived_s,
                    wait_left_s,
                ),
            )
        )
    return tuple(facts)


def shape_of(turns: Iterable[Turn]) -> StepShape:
    """What a step of these turns computes, before it does."""
    rows = context = tokens = pairs = 0
    for sequence, amount in turns:
        if amount == 1 and sequence.output_tokens:
            rows, context = rows + 1, context + sequence.computed
        else:
            tokens, pairs = tokens + amount, pairs + chunk_pairs(sequence.computed, amount)
    return StepShape(rows, context, tokens, pairs)


class Turn(NamedTuple):
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
