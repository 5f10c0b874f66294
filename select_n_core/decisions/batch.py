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
        context = later = left = growth = 0
        slack_s = float("inf")
        lowest = 1 << 62
        for request in requests:
            _, known, prompt, due_s, blocks, expected, _, _, rank, waited_s, _, _ = request
            if prompt:
                prompts.append(request)
                left += prompt
            else:
                decoding.append(request)
                context += known
                if known >= blocks * size:
                    needy.append(request)
                if due_s < slack_s:
                    slack_s = due_s
                prompt = 1
            known += prompt
            end = expected if expected > known else known
            later += end
            growth += -(-end // size) - blocks
            if waited_s >= patience_s:
                rank += int(waited_s / patience_s)
            if rank < lowest:
                lowest = rank
        self.requests = list(requests)
        self.decoding, self.prompts, self.needy = decoding, prompts, needy
        self.prompt_tokens, self.growth, self.lowest_rank = left, growth, lowest
        self.slack_s = slack_s
        self.shape = StepShape(len(decoding), context)
        self.later_shape = StepShape(len(self.requests), later)
