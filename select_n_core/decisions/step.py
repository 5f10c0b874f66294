"""One step, one decision: who computes how many tokens now, and how much is streamed next.

Decoding requests come first: each gets its token. Prompt tokens fill what is left of the step's
budget: the most tokens that keep every decoding request's TPOT within the slack it has earned.
Tokens that the copies hide anyway are free and always taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from select_n_core.decisions.latency import LatencyModel, StepShape


@dataclass(frozen=True, slots=True)
class RunningFacts:
    """A request that holds KV blocks.

    Attributes:
        context_tokens: in the cache.
        prompt_left: prompt tokens not computed yet; 0 means it decodes.
        slack_s: how long this step may take before its TPOT is overdrawn; ignored in prefill.
    """

    id: str
    context_tokens: int
    prompt_left: int
    slack_s: float


@dataclass(frozen=True, slots=True)
class WaitingFacts:
    """A request that waits for KV blocks, in queue order.

    Attributes:
        blocks: it needs to run to its last token.
    """

    id: str
    prompt_tokens: int
    blocks: int


@dataclass(frozen=True, slots=True)
class StepState:
    """All that a step's decision depends on."""

    running: tuple[RunningFacts, ...]
    waiting: tuple[WaitingFacts, ...]
    free_blocks: int
    max_batch: int
    max_step_tokens: int
    least_chunk: int
    k: int
    slots: int


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What happens in this step.

    Attributes:
        admit: waiting requests that get their KV blocks now, in order.
        rows: (request, new tokens) of this step, decoding rows first.
        k_next: units streamed in the next iteration.
    """

    admit: tuple[str, ...]
    rows: tuple[tuple[str, int], ...]
    k_next: int


def plan_step(state: StepState, model: LatencyModel) -> StepDecision:
    """Decide one step. Pure; called once per iteration."""
    admitted = tuple(_admit(state))
    decoding = [request for request in state.running if request.prompt_left == 0]
    prompts = [
        (request.id, request.context_tokens, request.prompt_left)
        for request in state.running
        if request.prompt_left
    ] + [(request.id, 0, request.prompt_tokens) for request in admitted]
    rows = [(request.id, 1) for request in decoding]
    if prompts:
        shape = StepShape(
            decode_rows=len(decoding),
            context_tokens=sum(request.context_tokens for request in decoding),
        )
        budget = _prompt_budget(state, model, shape, decoding)
        for request_id, _context, left in prompts:
            if budget <= 0:
                break
            tokens = min(left, budget)
            rows.append((request_id, tokens))
            budget -= tokens
    return StepDecision(
        admit=tuple(request.id for request in admitted), rows=tuple(rows), k_next=state.k
    )


def _admit(state: StepState) -> Iterable[WaitingFacts]:
    """First come, first served: nobody overtakes a request that does not fit yet."""
    free, places = state.free_blocks, state.max_batch - len(state.running)
    for request in state.waiting:
        if places < 1 or request.blocks > free:
            return
        free, places = free - request.blocks, places - 1
        yield request


def _prompt_budget(
    state: StepState, model: LatencyModel, shape: StepShape, decoding: list[RunningFacts]
) -> int:
    limit = state.max_step_tokens - shape.decode_rows
    if not decoding:
        return limit
    slack_s = min(request.slack_s for request in decoding)
    within = model.tokens_within(shape, state.k, state.slots, slack_s, limit)
    if within >= state.least_chunk:
        return within
    # A broken promise is no reason to starve the queue: free tokens, or a little progress.
    free = model.free_tokens(shape, state.k, state.slots, limit)
    return min(limit, max(within, free, state.least_chunk))
