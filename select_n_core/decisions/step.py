"""One step, one decision: who computes how many tokens now, and how much is streamed next.

Decoding requests come first: each gets its token, and the KV block it needs, if need be from the
last in service order. Prompt tokens fill what is left of the step's budget: the most tokens that
keep every decoding request's TPOT within the slack it has earned. Tokens that the copies hide
anyway are free and always taken. Where a TPOT would be missed, a unit comes home; where that does
not help, the last in service order gives its place back.
"""

from __future__ import annotations

from select_n_core.decisions.admission import Admission, admit
from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import RequestFacts, StepDecision, StepState
from select_n_core.decisions.latency import LatencyModel
from select_n_core.decisions.pace import Pace, pace_of
from select_n_core.decisions.preemption import decode_shape, preempted
from select_n_core.decisions.service import ServiceOrder

_SLOWER = 1.001  # a step must be more than this slower to count as slower


def plan_step(state: StepState, model: LatencyModel) -> StepDecision:
    """Decide one step. Pure; called once per iteration."""
    order = ServiceOrder(state.policy, state.levels)
    pace = pace_of(model, state.k, state.slots)
    batch = Batch(state.running, state)
    victims = _to_make_room(state, batch, order)
    if victims:
        batch = _without(batch, victims, state)
    missed = _misses(state, batch, pace)
    k_next = state.k
    if missed and _may_promote(state, batch, pace, model):
        k_next -= 1
    elif missed and (slow := _to_be_in_time(state, batch, pace, order)):
        victims += slow
        batch = _without(batch, slow, state)
    if victims:  # what came free is needed now; who comes next is decided without haste
        came = Admission(state.free_blocks + sum(victim.blocks for victim in victims))
    else:
        came = admit(state, batch, missed, order, model)
        if came.evicted:
            victims = came.evicted
            batch = _without(batch, victims, state)
    return StepDecision(
        preempt=preempted(victims, batch.shape, state, model) if victims else (),
        fail=tuple(came.fail),
        admit=tuple(request.id for request in came.admitted),
        rows=tuple(_rows(state, batch, came, pace, order)),
        k_next=k_next if came.k_up is None else came.k_up,
        missed=missed,
    )


def _without(batch: Batch, victims: list[RequestFacts], state: StepState) -> Batch:
    gone = {victim.id for victim in victims}
    return Batch([request for request in batch.requests if request.id not in gone], state)


def _to_make_room(state: StepState, batch: Batch, order: ServiceOrder) -> list[RequestFacts]:
    """Who gives blocks back, so that everyone who decodes has room for one more token."""
    size, free, short = state.block_tokens, state.free_blocks, len(batch.needy)
    victims: list[RequestFacts] = []
    if short <= free and (batch.decoding or not batch.prompts or free):
        return victims
    staying = sorted(batch.requests, key=order.key)
    growing = {request.id for request in batch.needy}
    while short > free:
        victims.append(staying.pop())
        free += victims[-1].blocks
        short -= victims[-1].id in growing
    # Those who decode end one day; where only prompts are left, the first of them must get on.
    while staying and not any(_can_go_on(request, free, size) for request in staying):
        victims.append(staying.pop())
        free += victims[-1].blocks
    return victims


def _can_go_on(request: RequestFacts, free_blocks: int, block_tokens: int) -> bool:
    return (request.blocks + free_blocks) * block_tokens > request.context_tokens


def _misses(state: StepState, batch: Batch, pace: Pace) -> bool:
    """Whether somebody's TPOT is predicted to be missed, not only one token late.

    While steps are faster than promised, one that is late catches up: no reason to give KV away.
    """
    if not batch.decoding:
        return False
    took_s = pace.step_s(batch.shape)
    return took_s > state.tpot_s and batch.slack_s < took_s


def _may_promote(state: StepState, batch: Batch, pace: Pace, model: LatencyModel) -> bool:
    """Whether one unit less over the link makes steps faster and leaves everyone room to end."""
    if state.k <= state.k_min:
        return False
    faster = pace_of(model, state.k - 1, state.slots)
    if faster.step_s(batch.shape) * _SLOWER >= pace.step_s(batch.shape):
        return False
    most = max(request.most_tokens for request in (*batch.requests, *state.waiting))
    return state.blocks_of(most) <= state.blocks_below


def _to_be_in_time(
    state: StepState, batch: Batch, pace: Pace, order: ServiceOrder
) -> list[RequestFacts]:
    """Who goes, so that a step takes no longer than promised; nobody, if that cannot be."""
    if pace.step_s(batch.shape) <= state.tpot_s:
        return []
    ordered = sorted(batch.requests, key=order.key)
    low, high = 0, len(ordered) - 1  # the most that can stay
    while low < high:
        middle = (low + high + 1) // 2
        if pace.step_s(decode_shape(ordered[:middle])) <= state.tpot_s:
            low = middle
        else:
            high = middle - 1
    if all(request.prompt_left for request in ordered[:low]):
        return []  # not even one alone is in time: whoever goes, goes for nothing
    return ordered[low:]


def _rows(
    state: StepState, batch: Batch, came: Admission, pace: Pace, order: ServiceOrder
) -> list[tuple[str, int]]:
    size, free = state.block_tokens, came.free_blocks - len(batch.needy)
    rows = [(request.id, 1) for request in batch.decoding]
    prompts = batch.prompts + [each for each in came.admitted if not each.context_tokens]
    if not prompts:
        return rows
    budget = _prompt_budget(state, batch, pace)
    for request in sorted(prompts, key=order.key):
        room = (request.blocks + free) * size - request.context_tokens
        tokens = min(request.prompt_left, budget, room)
        if tokens <= 0:
            continue
        rows.append((request.id, tokens))
        budget -= tokens
        free -= max(0, state.blocks_of(request.context_tokens + tokens) - request.blocks)
    return rows


def _prompt_budget(state: StepState, batch: Batch, pace: Pace) -> int:
    limit = max(0, state.max_step_tokens - batch.shape.decode_rows)
    if not batch.decoding:
        return limit
    within = pace.tokens_within(batch.shape, batch.slack_s, limit)
    if within >= state.least_chunk:
        return within
    # A broken promise is no reason to starve the queue: free tokens, or a little progress.
    free = pace.free_tokens(batch.shape, limit)
    return min(limit, max(within, free, state.least_chunk))
