"""Who is returned to its caller instead of waiting on, why, and when it would fit."""

from __future__ import annotations

from select_n_core.decisions.admission import Admission
from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import Reason, Refusal, RequestFacts, StepState
from select_n_core.decisions.first_tokens import alone_s, first_token_due_s
from select_n_core.decisions.forecast import Forecast
from select_n_core.decisions.pace import Pace
from select_n_core.decisions.room import Room
from select_n_core.decisions.service import ServiceOrder


def refuse(
    state: StepState, batch: Batch, came: Admission, pace: Pace, order: ServiceOrder
) -> tuple[Refusal, ...]:
    """Return those that waited for as long as they may, and those that wait for nothing.

    The first token of the latter would be late even if they were let in by the next step and no
    prompt stood before theirs. One that was let in once is never returned.

    Args:
        batch, came: as this step leaves them.
    """
    left = state.waiting
    if came.admitted or came.fail:
        gone = {request.id for request in came.admitted}.union(came.fail)
        left = tuple(request for request in left if request.id not in gone)
    if not left:
        return ()
    longest = max([request.prompt_left for request in left])
    # Until the first token of any of them, if it is let in by the next step.
    next_s = pace.step_s(batch.shape) if batch.decoding else 0.0
    least_s = next_s + alone_s(longest, state, pace)
    returned = [
        request
        for request in left
        if request.wait_left_s <= 0
        or (request.slack_s < least_s and _waits_in_vain(request, next_s, state, pace))
    ]
    if not returned:
        return ()
    ids = {request.id for request in returned}
    queue = [request for request in left if request.id not in ids]
    room = Room(state, batch, pace, order)
    for request in came.admitted:
        room.take(request)
    forecast = Forecast(state, batch, came.admitted, queue, pace)
    return tuple(
        Refusal(each.id, _reason(each, room, state), forecast.fits_in_s(each)) for each in returned
    )


def _waits_in_vain(request: RequestFacts, next_s: float, state: StepState, pace: Pace) -> bool:
    if not request.is_new:
        return False
    least_s = next_s + alone_s(request.prompt_left, state, pace)
    return first_token_due_s(request, state, pace) < least_s


def _reason(request: RequestFacts, room: Room, state: StepState) -> Reason:
    if room.shape.decode_rows >= state.max_batch:
        return Reason.QUEUE
    return room.lacks(request) or Reason.QUEUE
