"""What running requests add up to, in one pass: a step looks at hundreds of them, many times."""

from __future__ import annotations

import math
from collections.abc import Sequence

from select_n_core.decisions.facts import RequestFacts, StepState
from select_n_core.decisions.latency import StepShape


class Batch:
    """Running requests and their sums.

    Attributes:
        decoding, prompts: which of the two each request does, in the order given.
        shape: the decoding rows of a step.
        needy: those that decode and have no room for one more token.
        prompt_tokens: left in all.
        slack_s: of the decoding one that is due first.
        growth: blocks until everyone's expected end.
        later_shape: of a step in which all decode and are at their expected end.
    """

    __slots__ = (
        "decoding",
        "growth",
        "later_shape",
        "needy",
        "prompt_tokens",
        "prompts",
        "requests",
        "shape",
        "slack_s",
    )

    def __init__(self, requests: Sequence[RequestFacts], state: StepState) -> None:
        size = state.block_tokens
        decoding: list[RequestFacts] = []
        prompts: list[RequestFacts] = []
        needy: list[RequestFacts] = []
        context = later = prompt_tokens = growth = 0
        slack_s = math.inf
        for request in requests:
            known, left = request.context_tokens, request.prompt_left
            blocks = request.blocks
            if left:
                prompts.append(request)
                prompt_tokens += left
                known += left
            else:
                decoding.append(request)
                context += known
                if known >= blocks * size:
                    needy.append(request)
                if request.slack_s < slack_s:
                    slack_s = request.slack_s
                known += 1
            end = request.expected_tokens
            if end < known:
                end = known
            later += end
            growth += -(-end // size) - blocks
        self.requests = list(requests)
        self.decoding, self.prompts, self.needy = decoding, prompts, needy
        self.prompt_tokens, self.growth, self.slack_s = prompt_tokens, growth, slack_s
        self.shape = StepShape(len(decoding), context)
        self.later_shape = StepShape(len(self.requests), later)

    def without(self, leaving: Sequence[RequestFacts], state: StepState) -> Batch:
        """What stays when some of them leave, without another look at everyone."""
        gone, part = set(leaving), Batch(leaving, state)

        def staying(requests: list[RequestFacts], some: list[RequestFacts]) -> list[RequestFacts]:
            return [each for each in requests if each not in gone] if some else requests

        left = Batch.__new__(Batch)
        left.requests = staying(self.requests, part.requests)
        left.decoding = staying(self.decoding, part.decoding)
        left.prompts = staying(self.prompts, part.prompts)
        left.needy = staying(self.needy, part.needy)
        left.prompt_tokens = self.prompt_tokens - part.prompt_tokens
        left.growth = self.growth - part.growth
        left.slack_s = self.slack_s
        if part.slack_s <= self.slack_s:
            left.slack_s = min([each.slack_s for each in left.decoding], default=math.inf)
        left.shape = _less(self.shape, part.shape)
        left.later_shape = _less(self.later_shape, part.later_shape)
        return left


def _less(shape: StepShape, part: StepShape) -> StepShape:
    return StepShape(
        shape.decode_rows - part.decode_rows, shape.context_tokens - part.context_tokens
    )
