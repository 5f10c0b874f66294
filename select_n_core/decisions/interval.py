"""The interval control: when one unit more or less is streamed, and why.

Less at once when a promise is in danger, by as many units as it takes; more only in calm, by the
next unit that frees KV, and only for those who wait for it. What nobody needs goes back: streaming
less is never slower. Between k = 0, where the ring is lent too, and more units than it has slots,
there is nothing to gain: a turn steps over what lies there. Source: Select-N's online stage (arXiv
2502.08182), which moves an integer N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import Cause, Change, RequestFacts, StepState
from select_n_core.decisions.latency import LatencyModel, StepShape
from select_n_core.decisions.pace import Pace, pace_of, with_prompt

WORTH = 0.05  # streaming must serve so much more than none: less is noise of the record

# In steps at the promised pace.
CALM_STEPS = 10.0  # without a predicted miss, before more is streamed
DWELL_STEPS = 2.0  # at a k, before more is streamed: what the last turn freed comes first
SPARE_STEPS = 20.0  # without a turn, before KV that nobody needs goes back

_SLOWER = 1.001  # a step must be more than this slower to count as slower
_FASTER = 1.01  # what a unit at home must gain, where nothing forces it there
_COPIES = 0.98  # share of a step in copies at which they are what takes so long
_TPOT_MARGIN = 0.95  # of the promise that a step may take once a home is lent
_RESERVE = 0.1  # of the KV blocks that stay free when homes are taken back


def frees_memory(k: int, k_min: int, slots: int) -> bool:
    """Whether streaming `k` units can free device memory, in a layout that begins at `k_min`.

    Where the ring is lent at k = 0, up to as many units as it has slots free nothing: the ring
    takes what their homes gave.
    """
    return k_min > 0 or k == 0 or k > slots


def next_up(k: int, k_most: int, k_min: int, slots: int, blocks_at: Sequence[int]) -> int | None:
    """The smallest k above this one, up to `k_most`, that frees KV; None where there is none."""
    return next(
        (
            more
            for more in range(k + 1, k_most + 1)
            if frees_memory(more, k_min, slots) and blocks_at[more] > blocks_at[k]
        ),
        None,
    )


def fewer_in_danger(
    state: StepState, batch: Batch, pace: Pace, model: LatencyModel
) -> Change | None:
    """As many units less as it takes to keep the promise, as far as that makes steps faster.

    Everyone keeps room to end; what does not fit any more is preempted by whoever turns k.
    """
    step_s = pace.step_s(batch.shape)
    copy_bound = pace.copies_s >= _COPIES * step_s
    most = max(request.most_tokens for request in (*batch.requests, *state.waiting))
    need, best = state.blocks_of(most), state.k
    for k in _down(state):
        if need > state.blocks_at[k]:
            break
        faster_s = pace_of(model, k, state.slots).step_s(batch.shape)
        if faster_s * _SLOWER >= step_s:
            continue  # but at k = 0 other code may run
        best, step_s = k, faster_s
        if step_s <= state.tpot_s:
            break
    if best == state.k:
        return None
    return Change(best, Cause.LINK if copy_bound else Cause.TPOT)


def fewer_to_spare(
    state: StepState, batch: Batch, short: bool, pace: Pace, model: LatencyModel
) -> Change | None:
    """The next smaller k, if nobody needs the KV that its homes hold and steps gain by it.

    Args:
        short: somebody waits for KV.
    """
    fewer = next(_down(state), None)
    if fewer is None or short or not batch.requests:
        return None
    if state.dwell_s < SPARE_STEPS * state.tpot_s:
        return None
    owned = state.blocks - state.free_blocks
    if owned + max(0, batch.growth) > (1 - _RESERVE) * state.blocks_at[fewer]:
        return None
    shape = batch.later_shape
    if pace_of(model, fewer, state.slots).step_s(shape) * _FASTER >= pace.step_s(shape):
        return None
    return Change(fewer, Cause.SPARE)


def may_stream_more(
    state: StepState, now: StepShape, request: RequestFacts, need: int, model: LatencyModel
) -> bool:
    """Whether there is time to lend a home for one more request, and whether that serves more.

    Steps are looked at as they go on for ever: as many prompts come as requests end. As many like
    `request` come as the home holds and as wait.

    Args:
        now: a step in which all who run decode. need: blocks that the request lacks.
    """
    if state.k_up is None or state.calm_s < CALM_STEPS * state.tpot_s:
        return False
    if state.dwell_s < DWELL_STEPS * state.tpot_s:
        return False
    freed = state.blocks_at[state.k_up] - state.blocks
    more = max(1, min(freed // max(1, need), len(state.waiting)))
    slower, faster = (pace_of(model, k, state.slots) for k in (state.k_up, state.k))
    if slower.step_s(_going_on(now, 1, request)) > state.tpot_s * _TPOT_MARGIN:
        return False
    # More requests at a time must serve more per second, not only hold more.
    then_s = slower.step_s(_going_on(now, more, request))
    now_s = faster.step_s(_going_on(now, 0, request))
    least = now.decode_rows if state.k else now.decode_rows * (1 + WORTH)
    return (now.decode_rows + more) * now_s >= least * then_s


def _down(state: StepState) -> Iterator[int]:
    """What k may be turned down to, largest first."""
    return (
        k
        for k in range(state.k - 1, state.k_min - 1, -1)
        if frees_memory(k, state.k_min, state.slots)
    )


def _going_on(now: StepShape, more: int, request: RequestFacts) -> StepShape:
    """A step beside which a prompt is computed for every request that ends."""
    end = max(request.expected_tokens, request.next_tokens)
    rows = now.decode_rows + more
    tokens = rows * request.next_tokens // max(1, end - request.next_tokens)
    return with_prompt(StepShape(rows, now.context_tokens + more * end), tokens)
