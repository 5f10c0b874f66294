"""Whether first tokens come in time, if one more prompt joins those that are being computed.

While nobody decodes, a step takes all the prompt tokens it may. It goes on so while those who do
decode have earned the slack for it, until the first of the prompts is through and decodes too.
From then on a step has the time of one token: as many prompt tokens as fit in beside the decoding
rows. Deadlines that lie within a quantum of each other may be served either way round, and both
are counted with.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate
from typing import NamedTuple

from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import RequestFacts, StepState
from select_n_core.decisions.latency import StepShape
from select_n_core.decisions.pace import Pace, with_prompt
from select_n_core.decisions.service import ServiceOrder

_ALONE = 1.1  # of what a prompt takes alone, where that is above its target

_Key = tuple[bool, int, float]  # above its share, class, due


def alone_s(prompt_tokens: int, state: StepState, pace: Pace) -> float:
    """Seconds until the first token of a fresh prompt on an empty device."""
    return pace.prompt_s(prompt_tokens, state.max_step_tokens) * (1 + state.reserve)


def first_token_due_s(request: RequestFacts, state: StepState, pace: Pace) -> float:
    """Seconds until a new request's first token is due.

    One whose target cannot be met even on an empty device is judged by what it takes there.
    """
    least_s = alone_s(request.prompt_left, state, pace)
    if least_s > request.slack_s + request.waited_s:
        return _ALONE * least_s - request.waited_s
    return request.slack_s


class _Due(NamedTuple):
    """Prompt tokens up to a first token, its own prompt's included, and when it is due."""

    tokens: int
    due_s: float


class FirstTokens:
    """The prompts of those that are let in, in the order in which they are computed.

    Args:
        timeless: even one row takes longer than promised: a step takes the least there is to take.
    """

    def __init__(
        self, state: StepState, batch: Batch, pace: Pace, order: ServiceOrder, *, timeless: bool
    ) -> None:
        self._state = state
        self._pace = pace
        self._order = order
        self._timeless = timeless
        self._now = batch.shape
        self._earned_s = batch.slack_s - state.tpot_s  # infinite while nobody decodes
        self._prompts = list(batch.prompts)
        self._total = batch.prompt_tokens
        self._longest = max((each.next_tokens for each in batch.prompts), default=0)
        self._known: tuple[list[_Key], list[int], list[_Due | None]] | None = None

    def take(self, request: RequestFacts) -> None:
        """The request is let in."""
        if request.prompt_left:
            self._prompts.append(request)
            self._total += request.prompt_left
            self._longest = max(self._longest, request.next_tokens)
            self._known = None

    def give_up(self, running: RequestFacts) -> None:
        """The request gives its place back."""
        if running.prompt_left:
            self._prompts.remove(running)
            self._total -= running.prompt_left
            self._known = None

    def in_time(self, request: RequestFacts, others: StepShape) -> bool:
        """Whether its first token and those of all let in before come in time if it joins.

        One that was let in before has no first token to wait for, but may delay others'. What is
        late already cannot be harmed.

        Args:
            others: a step in which all others decode, itself too if it has no prompt left.
        """
        tokens = request.prompt_left
        if not self._total + tokens:
            return True
        keys, sums, dues = self._known or self._look()
        above, rank, quantum_s = *self._order.lane(request), self._state.policy.quantum_s
        behind = bisect_left(keys, (above, rank, request.slack_s - quantum_s))
        ahead = bisect_left(keys, (above, rank, request.slack_s + quantum_s))
        asked = [due for due in dues[:behind] if due]
        asked += [_Due(due.tokens + tokens, due.due_s) for due in dues[behind:] if due]
        if request.is_new:
            own_s = first_token_due_s(request, self._state, self._pace)
            asked.append(_Due(sums[ahead] + tokens, own_s))
        first = tokens
        if keys and not (tokens and (above, rank, request.slack_s) < keys[0]):
            first = sums[1]
        return self._kept(asked, others, tokens, first, max(self._longest, request.next_tokens))

    def _kept(
        self, asked: list[_Due], others: StepShape, tokens: int, first: int, longest: int
    ) -> bool:
        """Whether all that is asked is kept; `first` tokens are left of the first prompt."""
        state, tpot_s = self._state, self._state.tpot_s
        most = state.max_step_tokens - others.decode_rows
        if most < 1:
            return False
        total, prompts = self._total + tokens, len(self._prompts) + (tokens > 0)

        def step_s(beside: StepShape, chunk: int) -> float:
            chunks = min(prompts, 1 + chunk * prompts // total)
            return (1 + state.reserve) * self._pace.step_s(
                with_prompt(beside, chunk, longest, chunks)
            )

        chunk = min(most, total)
        took_s = step_s(others, chunk)
        if took_s <= tpot_s:
            return all(-(-due.tokens // chunk) * took_s <= due.due_s for due in asked)

        fast, fast_s = -(-first // chunk), step_s(self._now, chunk)
        if self._earned_s < math.inf and fast_s > tpot_s:
            fast = max(0, min(fast, int(self._earned_s / (fast_s - tpot_s))))
        if self._timeless:
            free = self._pace.free_tokens(others, chunk)
            slow = min(chunk, max(state.least_chunk, free))
            slow_s = step_s(others, slow)
            return all(
                -(-min(due.tokens, fast * chunk) // chunk) * fast_s
                + -(-max(0, due.tokens - fast * chunk) // slow) * slow_s
                <= due.due_s
                for due in asked
            )
        left = total - fast * chunk
        least = 1  # prompt tokens per step
        for due in asked:
            if due.due_s == math.inf:
                continue
            later = due.tokens - fast * chunk
            if later <= 0:
                if -(-due.tokens // chunk) * fast_s > due.due_s:
                    return False
                continue
            steps = int((due.due_s - fast * fast_s) / tpot_s)
            if steps < 1:
                return False
            least = max(least, -(-later // steps))
        return left <= 0 or (least <= most and step_s(others, least) <= tpot_s)

    def _look(self) -> tuple[list[_Key], list[int], list[_Due | None]]:
        """Keys in order, sums of tokens up to each, and what is asked of those not yet late."""
        quantum_s = self._state.policy.quantum_s
        keyed = sorted(
            ((*self._order.lane(each), each.slack_s), each.prompt_left) for each in self._prompts
        )
        keys = [key for key, _ in keyed]
        sums = list(accumulate((left for _, left in keyed), initial=0))
        chunk = max(1, min(self._state.max_step_tokens - self._now.decode_rows, self._total))
        step_s = self._pace.step_s(with_prompt(self._now, chunk, self._longest))
        step_s *= 1 + self._state.reserve
        dues: list[_Due | None] = []
        for above, rank, slack_s in keys:
            ahead = sums[bisect_left(keys, (above, rank, slack_s + quantum_s))]
            late = -(-ahead // chunk) * step_s > slack_s
            dues.append(None if late else _Due(ahead, slack_s))
        self._known = keys, sums, dues
        return self._known
