"""One step, one decision: who computes how many tokens now, and how much is streamed next.

Decoding requests come first: each gets its token, and the KV block it needs, if need be from the
last in service order. Prompt tokens fill what is left of the step's budget: the most tokens that
keep every decoding request's TPOT within the slack it has earned. Tokens that the copies hide
anyway are free and always taken. Where a TPOT would be missed, a unit comes home; where that does
not help, the last in service order gives its place back.
"""

from __future__ import annotations

import math
from dataclasses import replace

from select_n_core.decisions.admission import Admission, admit
from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import Cause, Change, RequestFacts, StepDecision, StepState
from select_n_core.decisions.interval import fewer_in_danger, fewer_to_spare
from select_n_core.decisions.latency import LatencyModel
from select_n_core.decisions.pace import Pace, pace_of, with_prompt
from select_n_core.decisions.preemption import decode_shape, preempted
from select_n_core.decisions.refusal import refuse
from select_n_core.decisions.service import ServiceOrder

_SPARE = 1.01  # times what decoding alone takes: beyond it there is time to spend


def plan_step(state: StepState, model: LatencyModel) -> StepDecision:
    """Decide one step. Pure; called once per iteration."""
    order = ServiceOrder(state.policy, state.levels)
    pace = pace_of(model, state.k, state.slots)
    batch = Batch(state.running, state)
    victims = _to_make_room(state, batch, order)
    if victims:
        batch = batch.without(victims, state)
    missed = _misses(state, batch, pace)
    change = fewer_in_danger(state, batch, pace, model) if missed else None
    if change is None and missed and (slow := _to_be_in_time(state, batch, pace, order)):
        victims += slow
        batch = batch.without(slow, state)
    if victims:  # what came free is needed now; who comes next is decided without haste
        came = Admission(state.free_blocks + sum(map(state.freed_by, victims)))
    else:
        came = admit(state, batch, missed, order, model)
        if came.evicted:
            victims = came.evicted
            batch = batch.without(victims, state)
        if came.k_up is not None:
            change = Change(came.k_up, Cause.KV)
        elif change is None and not victims and not came.admitted:
            change = fewer_to_spare(state, batch, came.short, pace, model)
    if victims:
        freed = sum(map(state.freed_by, victims))
        state = replace(state, free_blocks=state.free_blocks + freed)
    return StepDecision(
        preempt=preempted(victims, batch.shape, state, model) if victims else (),
        fail=tuple(came.fail),
        admit=tuple(request.id for request in came.admitted),
        rows=tuple(_rows(state, batch, came, pace, order)),
        change=change,
        missed=missed,
        refuse=refuse(state, batch, came, pace, order),
    )


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
        free += state.freed_by(victims[-1])
        short -= victims[-1].id in growing
    # Those who decode end one day; where only prompts are left, the first of them must get on.
    while staying and not any(_can_go_on(request, free, size) for request in staying):
        victims.append(staying.pop())
        free += state.freed_by(victims[-1])
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
    prompts = batch.prompts + [
        each for each in came.admitted if each.prompt_left and not each.in_host
    ]
    if not prompts:
        return rows
    shape, taken = batch.shape, 0
    limit = state.max_step_tokens - shape.decode_rows
    alone_s = pace.step_s(shape)
    budget_s = _slack_s(state, batch, alone_s) / (1 + state.reserve)
    in_time = budget_s >= alone_s
    hopeless = alone_s >= state.tpot_s  # slack will not come back by itself
    for request in sorted(prompts, key=order.key):
        context = request.context_tokens
        owned = request.blocks or state.blocks_of(context)  # from when it is let in
        room = (owned + free) * size - context
        most = min(request.prompt_left, limit - taken, room)
        if most <= 0:
            continue
        tokens = most
        if batch.decoding:
            # Where decoding alone takes longer, there is no need to search.
            tokens = pace.tokens_within(shape, budget_s, most, context) if in_time else 0
            if tokens < most and budget_s < _SPARE * alone_s:
                # What the copies hide costs nobody anything; more time than that hides more.
                least = pace.free_tokens(batch.shape, limit)
                if hopeless:  # a broken promise is no reason to starve the queue
                    least = max(least, state.least_chunk)
                tokens = max(tokens, min(most, least - taken))
        if tokens:
            rows.append((request.id, tokens))
        if tokens < most:  # there is no more time
            break
        shape = with_prompt(shape, tokens, context)
        taken += tokens
        free -= max(0, state.blocks_of(context + tokens) - owned)
    return rows


def _slack_s(state: StepState, batch: Batch, alone_s: float) -> float:
    """Of the decoding request that is due first, among those whose TPOT can still be kept."""
    gain_s = state.tpot_s - alone_s
    if batch.slack_s >= alone_s or gain_s <= 0:
        return batch.slack_s
    tpot_s = state.tpot_s
    kept_s = [
        request.slack_s
        for request in batch.decoding
        if request.slack_s >= tpot_s - (request.most_tokens - request.context_tokens) * gain_s
    ]
    return min(kept_s, default=math.inf)
