"""Who of those that wait gets KV blocks: in service order, as far as blocks and time allow.

A request is let in when its prompt and its expected output fit the free blocks, less what those
that run are expected to grow by, and when a step with one more row keeps the TPOT. One that does
not fit is overtaken for a while, then everybody behind it waits. A request of a higher class takes
the place of running ones of a lower class.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import RequestFacts, StepState
from select_n_core.decisions.latency import LatencyModel, StepShape
from select_n_core.decisions.pace import pace_of
from select_n_core.decisions.service import ServiceOrder

DEMOTE_AFTER_S = 5.0  # without a predicted miss, before a home is lent to those who wait
_TPOT_MARGIN = 0.95  # of the promise that a step may take once a home is lent


@dataclass(slots=True)
class Admission:
    """Who comes in.

    Attributes:
        admitted: in order. evicted: running requests that make room for the last of them.
        fail: who can never fit. free_blocks: left for the rows of this step.
        k_up: units to stream instead, for those who wait.
    """

    free_blocks: int
    admitted: list[RequestFacts] = field(default_factory=list)
    evicted: list[RequestFacts] = field(default_factory=list)
    fail: list[str] = field(default_factory=list)
    k_up: int | None = None


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
    if places < 1 and max(map(order.rank, state.waiting)) <= batch.lowest_rank:
        return came
    room = _Room(state, batch, model)
    first: RequestFacts | None = None  # in order, of those who are not let in
    if places > 0:
        ordered = sorted(state.waiting, key=order.key)
    else:  # only the first matters: whether somebody has to make room for it
        ordered = [min(state.waiting, key=order.key)]
    for request in ordered:
        need = state.blocks_of(request.next_tokens)
        if need > state.blocks and state.k_up is None:
            came.fail.append(request.id)
            continue
        if batch.requests or came.admitted:
            fits = places > 0 and room.fits(request)
        elif need <= state.free_blocks:
            fits = True  # alone, it need not leave room for anyone
        else:  # homes are lent to it first, or are on their way
            came.k_up = state.k_up if need > state.blocks else None
            return came
        if fits:
            _let_in(came, request, room, state)
            places -= 1
            continue
        first = first or request
        if places < 1 or not _may_be_overtaken(request, state):
            break
    if first is not None:
        lend = not missed and room.may_lend_a_home(first)
        _evict_for(first, came, room, places, batch, order, state)
        if lend and not came.evicted:
            came.k_up = state.k_up
    return came


class _Room:
    """Blocks and time that are left, if everyone runs to the expected end."""

    def __init__(self, state: StepState, batch: Batch, model: LatencyModel) -> None:
        self._state = state
        self._model = model
        self._pace = pace_of(model, state.k, state.slots)
        self._free = state.free_blocks - batch.growth
        self._rows = batch.later_shape.decode_rows
        self._context = batch.later_shape.context_tokens
        # Where even one row takes longer than promised, time is no reason to keep anyone out.
        self._timeless = self._pace.step_s(StepShape(1)) > state.tpot_s

    def fits(self, request: RequestFacts) -> bool:
        """Whether `request` may join."""
        return self._growth(request) <= self._free and (
            self._timeless or self._pace.step_s(self._with(request)) <= self._state.tpot_s
        )

    def take(self, request: RequestFacts) -> None:
        """Let it join."""
        self._free -= self._growth(request)
        self._rows += 1
        self._context += request.next_tokens

    def give_up(self, running: RequestFacts) -> None:
        """Let one that runs leave."""
        self._free += self._growth(running) + running.blocks
        self._rows -= 1
        self._context -= running.next_tokens

    def may_lend_a_home(self, request: RequestFacts) -> bool:
        """Whether there is time to stream more for a request that lacks blocks and nothing else."""
        state = self._state
        if state.k_up is None or state.quiet_s < DEMOTE_AFTER_S:
            return False
        if self._growth(request) <= self._free or self._rows >= state.max_batch:
            return False
        slower = pace_of(self._model, state.k_up, state.slots)
        return slower.step_s(self._with(request)) <= state.tpot_s * _TPOT_MARGIN

    def _with(self, request: RequestFacts) -> StepShape:
        return StepShape(self._rows + 1, self._context + request.next_tokens)

    def _growth(self, request: RequestFacts) -> int:
        expected = max(request.expected_tokens, request.next_tokens)
        return self._state.blocks_of(expected) - request.blocks


def _let_in(came: Admission, request: RequestFacts, room: _Room, state: StepState) -> None:
    came.admitted.append(request)
    room.take(request)
    came.free_blocks -= state.blocks_of(request.context_tokens)  # a swapped one's, needed at once


def _may_be_overtaken(request: RequestFacts, state: StepState) -> bool:
    """For one that is due soon or has waited long, blocks are saved up."""
    policy = state.policy
    return request.slack_s > policy.overtaken_s and request.waited_s < policy.patience_s


def _evict_for(
    request: RequestFacts,
    came: Admission,
    room: _Room,
    places: int,
    batch: Batch,
    order: ServiceOrder,
    state: StepState,
) -> None:
    """Let `request` in for the last running ones of a lower class, or change nothing."""
    if order.above_share(request.tenant):
        return
    rank = order.rank(request)
    if rank <= batch.lowest_rank:
        return
    lower = sorted(
        (running for running in batch.requests if order.rank(running) < rank), key=order.key
    )[::-1]
    for count, victim in enumerate(lower, start=1):
        room.give_up(victim)
        if places + count > 0 and room.fits(request):
            came.evicted = lower[:count]
            came.free_blocks += sum(each.blocks for each in came.evicted)
            _let_in(came, request, room, state)
            return
