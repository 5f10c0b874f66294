"""Who of those that wait gets KV blocks: in service order, as far as blocks and time allow.

A request is let in when its prompt and its expected output fit the free blocks, less what those
that run are expected to grow by, when a step with one more row keeps the TPOT, and when its first
token and those that others still wait for come in time. One that does not fit is overtaken for a
while, then everybody behind it waits. A request of a higher class takes the place of running ones
of a lower class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import Reason, RequestFacts, StepState
from select_n_core.decisions.interval import may_stream_more
from select_n_core.decisions.latency import LatencyModel
from select_n_core.decisions.pace import pace_of
from select_n_core.decisions.room import Room
from select_n_core.decisions.service import ServiceOrder

_MOST_LATE = 2  # requests that lack time, before no more are looked at


@dataclass(slots=True)
class Admission:
    """Who comes in.

    Attributes:
        admitted: in order. evicted: running requests that make room for the last of them.
        fail: who can never fit. free_blocks: left for the rows of this step.
        k_up: units to stream instead, for those who wait. short: somebody waits for KV.
    """

    free_blocks: int
    admitted: list[RequestFacts] = field(default_factory=list)
    evicted: list[RequestFacts] = field(default_factory=list)
    fail: list[str] = field(default_factory=list)
    k_up: int | None = None
    short: bool = False


def admit(
    state: StepState,
    batch: Batch,
    missed: bool,
    order: ServiceOrder,
    model: LatencyModel,
) -> Admission:
    """Decide who of `state.waiting` joins the batch."""
    came = Admission(free_blocks=state.free_blocks)
    if not state.waiting:
        return came
    places = state.max_batch - len(batch.requests)
    if places < 1 and not order.has_below(batch.requests, max(map(order.rank, state.waiting))):
        return came
    room = Room(state, batch, pace_of(model, state.k, state.slots), order)
    first: RequestFacts | None = None  # in order, of those who are not let in
    late = 0
    if places > 0:
        looked_at: Iterable[RequestFacts] = order.first_to_last(state.waiting)
    else:  # only the first matters: whether somebody has to make room for it
        looked_at = [min(state.waiting, key=order.key)]
    for request in looked_at:
        need = state.blocks_of(request.next_tokens)
        if need > state.blocks and state.k_up is None:
            came.fail.append(request.id)
            continue
        if batch.requests or came.admitted:
            lack = room.lacks(request) if places > 0 else Reason.QUEUE
        elif need <= state.free_blocks:
            lack = room.late(request)  # alone, it need not leave room for anyone
        else:  # homes are lent to it first, or are on their way
            came.k_up = state.k_up if need > state.blocks else None
            came.short = True
            return came
        if lack is None:
            _let_in(came, request, room, state)
            places -= 1
            continue
        late += lack in (Reason.TPOT, Reason.TTFT)
        if lack is Reason.TTFT and request.is_new:  # waiting brings no time: it holds up nobody
            overtaken = True
        else:
            first = first or request
            overtaken = _may_be_overtaken(request, state)
        if places < 1 or late >= _MOST_LATE or not overtaken:
            break
    if first is not None:
        need = room.growth(first)
        came.short = need > room.free_blocks
        lend = came.short and not missed and room.shape.decode_rows < state.max_batch
        lend = lend and may_stream_more(state, room.shape, first, need, model)
        _evict_for(first, came, room, places, batch, order, state)
        if lend and not came.evicted:
            came.k_up = state.k_up
    return came


def _let_in(came: Admission, request: RequestFacts, room: Room, state: StepState) -> None:
    came.admitted.append(request)
    room.take(request)
    # What it has to begin with is taken at once: a swapped cache, or what is cached of a prefix.
    came.free_blocks -= state.blocks_of(request.context_tokens) - request.shared


def _may_be_overtaken(request: RequestFacts, state: StepState) -> bool:
    """For one that is due soon or has waited long, blocks are saved up."""
    policy = state.policy
    return request.slack_s > policy.overtaken_s and request.waited_s < policy.patience_s


def _evict_for(
    request: RequestFacts,
    came: Admission,
    room: Room,
    places: int,
    batch: Batch,
    order: ServiceOrder,
    state: StepState,
) -> None:
    """Let `request` in for the last running ones of a lower class, or change nothing."""
    if order.above_share(request.tenant):
        return
    lower = order.below(batch.requests, order.rank(request))
    # What it and those let in before would share may be shared with a victim alone, and is counted
    # among what comes free: it is theirs to take then.
    apart = request.shared + sum(each.shared for each in came.admitted)
    room.free_blocks -= apart
    victims: list[RequestFacts] = []
    for victim in order.last_to_first(lower):
        victims.append(victim)
        room.give_up(victim)
        if places + len(victims) < 1:
            continue
        lack = room.lacks(request)
        if lack is Reason.TTFT:  # the prompts before it stay, whoever goes
            return
        if lack is None:
            came.evicted = victims
            came.free_blocks += sum(map(state.freed_by, victims)) - apart
            _let_in(came, request, room, state)
            return
