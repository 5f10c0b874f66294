"""Who gives blocks back, and how: the last in service order, by the cheaper of two ways.

Both ways are priced in seconds that the others' steps take longer.
"""

from __future__ import annotations

from collections.abc import Iterable

from select_n_core.decisions.facts import Preemption, RequestFacts, StepState, Way
from select_n_core.decisions.latency import LatencyModel, StepShape
from select_n_core.decisions.pace import Pace, pace_of
from select_n_core.decisions.service import ServiceOrder


def release(state: StepState, blocks: int, model: LatencyModel) -> tuple[Preemption, ...]:
    """Preempt the last running requests in service order until `blocks` blocks came back."""
    order = ServiceOrder(state.policy, state.levels)
    staying = sorted(state.running, key=order.key)
    victims: list[RequestFacts] = []
    while blocks > 0 and staying:
        victims.append(staying.pop())
        blocks -= state.freed_by(victims[-1])
    return preempted(victims, decode_shape(staying), state, model)


def preempted(
    victims: Iterable[RequestFacts], beside: StepShape, state: StepState, model: LatencyModel
) -> tuple[Preemption, ...]:
    """Choose the way of each victim, in turn: host blocks that one takes are gone for the next.

    Args:
        beside: the decoding rows that stay.
    """
    pace = pace_of(model, state.k, state.slots)
    chunk = max(1, state.max_step_tokens - beside.decode_rows)
    left = state.host_blocks
    chosen: list[Preemption] = []
    for victim in victims:
        need = state.blocks_of(victim.context_tokens)
        way = Way.RECOMPUTE
        if 0 < need <= left and swap_s(need * state.block_copy_s, beside, pace) <= recompute_s(
            victim.context_tokens, beside, chunk, pace
        ):
            way, left = Way.SWAP, left - need
        chosen.append(Preemption(victim.id, way))
    return tuple(chosen)


def swap_s(one_way_s: float, beside: StepShape, pace: Pace) -> float:
    """What swapping costs the others: the link both ways, beside the weights that use it.

    Out, the next step waits for the blocks. Back, the copies run during a step, and what the
    weights leave of the link hides them.
    """
    idle_s = max(0.0, pace.step_s(beside) - pace.copies_s) if beside.decode_rows else 0.0
    return one_way_s + max(0.0, one_way_s - idle_s)


def recompute_s(tokens: int, beside: StepShape, chunk: int, pace: Pace) -> float:
    """What computing `tokens` again, `chunk` per step, adds to the others' steps."""
    alone_s = pace.step_s(beside) if beside.decode_rows else 0.0
    return sum(
        pace.step_s(beside.with_chunk(context, min(chunk, tokens - context))) - alone_s
        for context in range(0, tokens, chunk)
    )


def decode_shape(running: Iterable[RequestFacts]) -> StepShape:
    """The decoding rows of these requests."""
    contexts = [request.context_tokens for request in running if not request.prompt_left]
    return StepShape(len(contexts), sum(contexts))
