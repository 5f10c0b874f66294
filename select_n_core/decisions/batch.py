"""What running requests add up to, in one pass: a step looks at hundreds of them, many times."""

from __future__ import annotations

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
        lowest_rank: of anyone's class, lifted by the time it waited.
    """

    __slots__ = (
        "decoding",
        "growth",
        "later_shape",
        "lowest_rank",
        "needy",
        "prompt_tokens",
        "prompts",
        "requests",
        "shape",
        "slack_s",
    )

    def __init__(self, requests: Sequence[RequestFacts], state: StepState) -> None:
        size, patience_s = state.block_tokens, state.policy.patience_s
        decoding: list[RequestFacts] = []
        prompts: list[RequestFacts] = []
        needy: list[RequestFacts] = []
        context = later = prompt_tokens = growth = 0
        slack_s = float("inf")
        lowest = 1 << 62
        for request in requests:
            known, left = request.context_tokens, request.prompt_left
            blocks, rank = request.blocks, request.priority
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
            if request.waited_s >= patience_s:
                rank += int(request.waited_s / patience_s)
            if rank < lowest:
                lowest = rank
        self.requests = list(requests)
        self.decoding, self.prompts, self.needy = decoding, prompts, needy
        self.prompt_tokens, self.growth, self.lowest_rank = prompt_tokens, growth, lowest
        self.slack_s = slack_s
        self.shape = StepShape(len(decoding), context)
        self.later_shape = StepShape(len(self.requests), later)
