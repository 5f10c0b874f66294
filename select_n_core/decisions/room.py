"""What is left for one more request: blocks, time per token, time to first tokens."""

from __future__ import annotations

from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import Reason, RequestFacts, StepState
from select_n_core.decisions.first_tokens import FirstTokens
from select_n_core.decisions.latency import StepShape
from select_n_core.decisions.pace import Pace
from select_n_core.decisions.service import ServiceOrder


class Room:
    """Blocks and time that are left, if everyone runs to the expected end.

    Attributes:
        free_blocks: without those that all who run are expected to grow by.
        shape: a step in which all who run decode, at their expected end.
    """

    def __init__(self, state: StepState, batch: Batch, pace: Pace, order: ServiceOrder) -> None:
        self._state = state
        self._pace = pace
        self.free_blocks = state.free_blocks - batch.growth
        self.shape = batch.later_shape
        # Where even one row takes longer than promised, time is no reason to keep anyone out.
        self._timeless = pace.step_s(StepShape(1)) > state.tpot_s
        self._first_tokens = FirstTokens(state, batch, pace, order, timeless=self._timeless)

    def lacks(self, request: RequestFacts) -> Reason | None:
        """Why `request` may not join, or None."""
        if self.growth(request) > self.free_blocks:
            return Reason.KV
        if not self._timeless and self._pace.step_s(self.joined(request)) > self._state.tpot_s:
            return Reason.TPOT
        return self.late(request)

    def late(self, request: RequestFacts) -> Reason | None:
        """TTFT where a first token would be late if `request` joined, else None."""
        others = self.shape if request.prompt_left else self.joined(request)
        return None if self._first_tokens.in_time(request, others) else Reason.TTFT

    def take(self, request: RequestFacts) -> None:
        """Let it join."""
        self.free_blocks -= self.growth(request)
        self.shape = self.joined(request)
        self._first_tokens.take(request)

    def give_up(self, running: RequestFacts) -> None:
        """Let one that runs leave."""
        self.free_blocks += self.growth(running) + self._state.freed_by(running)
        rows, context = self.shape.decode_rows, self.shape.context_tokens
        self.shape = StepShape(rows - 1, context - self._end(running))
        self._first_tokens.give_up(running)

    def joined(self, request: RequestFacts) -> StepShape:
        """A step in which `request` decodes too."""
        rows, context = self.shape.decode_rows, self.shape.context_tokens
        return StepShape(rows + 1, context + self._end(request))

    def growth(self, request: RequestFacts) -> int:
        """Blocks until its expected end, beside those that it owns or will share."""
        return self._state.blocks_of(self._end(request)) - request.at_hand

    @staticmethod
    def _end(request: RequestFacts) -> int:
        return max(request.expected_tokens, request.next_tokens)
