"""When a request that is returned would be let in: once enough of those that run have ended.

Each runs to its expected end, in steps as the model predicts them; those that wait are let in
before it, and the prompts of all are computed first. Whoever shares blocks now is taken to have
them to itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import RequestFacts, StepState
from select_n_core.decisions.first_tokens import alone_s, first_token_due_s
from select_n_core.decisions.latency import StepShape
from select_n_core.decisions.pace import Pace, with_prompt

_AGES_S = 1e9
_BITS = 40
_BLOCKS = (1 << _BITS) - 1


class Forecast:
    """The ends of those that run, and what those that wait will take.

    Args:
        admitted: let in by the step that is decided; they run.
        queue: those that wait on.
    """

    def __init__(
        self,
        state: StepState,
        batch: Batch,
        admitted: Sequence[RequestFacts],
        queue: Sequence[RequestFacts],
        pace: Pace,
    ) -> None:
        self._state = state
        self._pace = pace
        shape = batch.later_shape
        # Free blocks, those included that the others have yet to grow by.
        free = state.free_blocks - batch.growth
        for request in admitted:
            end = max(request.expected_tokens, request.next_tokens)
            shape = StepShape(shape.decode_rows + 1, shape.context_tokens + end)
            free -= state.blocks_of(end)
        prompt_tokens = sum([each.prompt_left for each in (*admitted, *queue)])
        self._rows, self._queued_rows = shape.decode_rows, len(queue)
        self._set_pace(shape, batch.prompt_tokens + prompt_tokens)
        late = self._prompt_steps
        ends = sorted(self._ends_of((*batch.requests, *admitted), late))
        self._ends = ends
        self._free = list(accumulate([end & _BLOCKS for end in ends], initial=free))
        self._all_ended_s = self._after(ends[-1] >> _BITS) if ends else 0.0
        queued = self._ends_of(queue, 0)
        self._queued_blocks = sum([end & _BLOCKS for end in queued])
        if queued:  # each is let in or returned by the time it may wait, and ends
            waits = [each.wait_left_s for each in queue if each.is_new]
            self._all_ended_s += max([0.0, *waits]) + self._after(late + (max(queued) >> _BITS) - 1)

    def fits_in_s(self, request: RequestFacts) -> float:
        """Seconds until `request`, sent again then, would be let in if nobody else came.

        One step at least.
        """
        state = self._state
        target_s = min(_AGES_S, request.slack_s + request.waited_s)
        again = replace(request, slack_s=target_s, waited_s=0.0)
        need = self._queued_blocks + state.blocks_of(max(again.expected_tokens, again.next_tokens))
        rows = self._rows + self._queued_rows + 1 - self._most_rows(again)
        ended = max(0, rows, bisect_left(self._free, need))
        if ended > self._rows:
            return max(self._row_s, self._all_ended_s)
        least_s = alone_s(again.prompt_left, state, self._pace)
        prompts_s = self._prompt_steps * self._prompt_s - max(0.0, target_s - least_s)
        ended_s = self._after(self._ends[ended - 1] >> _BITS) if ended else 0.0
        return max(self._row_s, prompts_s, ended_s)

    def _ends_of(self, requests: Iterable[RequestFacts], late: int) -> list[int]:
        """Steps until each has ended, and its blocks then, as one number: hundreds are sorted.

        Args:
            late: steps before a prompt is through.
        """
        size, ends = self._state.block_tokens, []
        for request in requests:
            left, end = request.prompt_left, request.expected_tokens
            steps = end - request.context_tokens - (left or 1)
            if steps < 0:
                steps, end = 0, end - steps
            if left:
                steps += late
            ends.append((steps + 1 << _BITS) - (-end // size))
        return ends

    def _set_pace(self, all_decode: StepShape, prompt_tokens: int) -> None:
        """How long steps take: with one row, with all, and with prompts beside all."""
        state, pace, rows = self._state, self._pace, max(1, self._rows)
        self._one = StepShape(1, all_decode.context_tokens // rows)
        self._one_s = pace.step_s(self._one)
        self._row_s = max(self._one_s, pace.step_s(all_decode))
        self._per_row_s = (self._row_s - self._one_s) / max(1, rows - 1)
        most = max(1, state.max_step_tokens - self._rows)
        full_s = pace.step_s(with_prompt(all_decode, most))
        self._per_token_s = max(0.0, full_s - self._row_s) / most
        spare_s = max(0.0, state.tpot_s - self._row_s)
        chunk = most
        if spare_s < self._per_token_s * most:
            chunk = min(most, max(1, int(spare_s / self._per_token_s)))
        self._prompt_s = self._row_s + chunk * self._per_token_s
        self._prompt_steps = -(-prompt_tokens // chunk)

    def _after(self, steps: int) -> float:
        slow = min(steps, self._prompt_steps)
        return slow * self._prompt_s + (steps - slow) * self._row_s

    def _most_rows(self, request: RequestFacts) -> int:
        """Rows in all with which steps keep the TPOT and leave time for the request's prompt."""
        state = self._state
        if self._one_s > state.tpot_s:
            return state.max_batch
        # It is looked at only after the step during which it comes.
        due_s = first_token_due_s(request, state, self._pace) - self._row_s
        chunk = -(-request.prompt_left // max(1, int(due_s / state.tpot_s)))
        most = min(state.max_batch, max(0, 1 + state.max_step_tokens - chunk))
        beside_one = with_prompt(self._one, chunk, request.next_tokens)
        took_s = (1 + state.reserve) * self._pace.step_s(beside_one)
        spare_s = min(due_s, state.tpot_s) - took_s
        if spare_s < 0:
            return 0
        if spare_s >= self._per_row_s * most:
            return most
        return min(most, 1 + int(spare_s / self._per_row_s))
