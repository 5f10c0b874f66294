"""One step's decision: who computes how many tokens now."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.decisions.step import RunningFacts, StepState, WaitingFacts, plan_step

MS = 1e-3
# One token costs 1 ms over 10 units, 0.1 ms more for each that joins; a copy takes 2 ms.
MODEL = LatencyModel(
    units=10,
    transfer_s=2 * MS,
    streaming=ComputeModel(((1, 0.1 * MS), (257, 2.66 * MS)), 0.0, 0.0, 0.0, 0.0),
)
LATE = -1.0


def decoding(name: str, slack_s: float = 10.0, context: int = 50) -> RunningFacts:
    return RunningFacts(name, context_tokens=context, prompt_left=0, slack_s=slack_s)


def prompting(name: str, left: int, computed: int = 0) -> RunningFacts:
    return RunningFacts(name, context_tokens=computed, prompt_left=left, slack_s=float("inf"))


def waiting(name: str, prompt: int = 10, blocks: int = 1) -> WaitingFacts:
    return WaitingFacts(name, prompt_tokens=prompt, blocks=blocks)


def state(running=(), waiting=(), **changes) -> StepState:
    facts = StepState(
        running=tuple(running),
        waiting=tuple(waiting),
        free_blocks=100,
        max_batch=8,
        max_step_tokens=64,
        least_chunk=16,
        k=0,
        slots=2,
    )
    return replace(facts, **changes)


def rows(running=(), waiting=(), **changes) -> dict[str, int]:
    return dict(plan_step(state(running, waiting, **changes), MODEL).rows)


def test_nobody_there_is_an_empty_step():
    decision = plan_step(state(), MODEL)
    assert (decision.admit, decision.rows) == ((), ())


def test_a_lone_prompt_takes_the_whole_budget_and_no_more_than_it_has():
    assert rows(waiting=[waiting("a", prompt=500)]) == {"a": 64}
    assert rows(waiting=[waiting("a", prompt=5)]) == {"a": 5}


def test_decoding_requests_come_first_and_get_one_token_each():
    decision = plan_step(state([prompting("p", 100), decoding("d")]), MODEL)
    assert decision.rows == (("d", 1), ("p", 63))


def test_a_prompt_goes_on_where_it_stopped_before_newcomers_start():
    assert rows([prompting("old", 40, computed=64)], [waiting("new", prompt=500)]) == {
        "old": 40,
        "new": 24,
    }


def test_prompts_take_only_the_time_that_decoding_requests_can_spare():
    spare = rows([decoding("d", slack_s=4 * MS)], [waiting("p", prompt=60)])
    assert spare == {"d": 1, "p": 30}  # 1 ms for d, 0.1 ms for each of 30
    assert rows([decoding("d")], [waiting("p", prompt=60)]) == {"d": 1, "p": 60}


def test_the_tightest_request_sets_the_budget():
    assert rows([decoding("a"), decoding("b", slack_s=4.1 * MS)], [waiting("p", 60)])["p"] == 30


def test_a_broken_promise_still_leaves_prompts_a_little_progress():
    assert rows([decoding("d", slack_s=LATE)], [waiting("p", prompt=60)]) == {"d": 1, "p": 16}


def test_tokens_that_the_copies_hide_are_taken_even_when_promises_are_broken():
    taken = rows([decoding("d", slack_s=LATE)], [waiting("p", prompt=60)], k=5, least_chunk=1)
    free = MODEL.free_tokens(StepShape(1, 50), 5, 2, 63)
    assert free > 16
    assert taken == {"d": 1, "p": min(60, free)}


def test_a_full_step_of_decoding_requests_leaves_no_room_and_takes_none():
    running = [decoding(str(number), slack_s=LATE) for number in range(8)]
    full = rows([*running, prompting("p", 10)], max_step_tokens=8, max_batch=9)
    assert "p" not in full
    assert sum(full.values()) == 8


def test_requests_are_admitted_in_order_while_places_and_blocks_last():
    queue = [waiting("a", blocks=3), waiting("b", blocks=4), waiting("c", blocks=1)]
    assert plan_step(state(waiting=queue), MODEL).admit == ("a", "b", "c")
    assert plan_step(state(waiting=queue, max_batch=2), MODEL).admit == ("a", "b")
    assert plan_step(state([decoding("r")], queue, max_batch=2), MODEL).admit == ("a",)


def test_nobody_overtakes_a_request_that_does_not_fit_yet():
    queue = [waiting("a", blocks=3), waiting("large", blocks=4), waiting("small", blocks=1)]
    assert plan_step(state(waiting=queue, free_blocks=5), MODEL).admit == ("a",)


def test_streaming_stays_as_it_is():
    assert plan_step(state([decoding("d")], k=4), MODEL).k_next == 4


@st.composite
def states(draw):
    max_batch = draw(st.integers(1, 12))
    count = draw(st.integers(0, max_batch))
    running = [
        RunningFacts(
            f"r{number}",
            context_tokens=draw(st.integers(0, 300)),
            prompt_left=draw(st.one_of(st.just(0), st.integers(1, 200))),
            slack_s=draw(st.floats(-1, 1)),
        )
        for number in range(count)
    ]
    queue = [
        WaitingFacts(f"w{number}", draw(st.integers(1, 300)), draw(st.integers(1, 20)))
        for number in range(draw(st.integers(0, 6)))
    ]
    return StepState(
        running=tuple(running),
        waiting=tuple(queue),
        free_blocks=draw(st.integers(0, 40)),
        max_batch=max_batch,
        max_step_tokens=draw(st.integers(max_batch, 256)),
        least_chunk=draw(st.integers(1, 64)),
        k=draw(st.integers(0, 10)),
        slots=draw(st.integers(1, 3)),
    )


@given(states())
def test_a_step_never_breaks_its_limits_and_never_forgets_who_decodes(now):
    decision = plan_step(now, MODEL)
    taken = dict(decision.rows)
    assert len(taken) == len(decision.rows)
    assert sum(taken.values()) <= now.max_step_tokens

    decoders = [request.id for request in now.running if not request.prompt_left]
    assert [name for name, _ in decision.rows[: len(decoders)]] == decoders
    assert all(taken[name] == 1 for name in decoders)

    queue = [request.id for request in now.waiting]
    assert list(decision.admit) == queue[: len(decision.admit)]
    blocks = {request.id: request.blocks for request in now.waiting}
    assert sum(blocks[name] for name in decision.admit) <= now.free_blocks
    assert len(now.running) + len(decision.admit) <= now.max_batch

    left = {r.id: r.prompt_left for r in now.running if r.prompt_left}
    left |= {r.id: r.prompt_tokens for r in now.waiting if r.id in decision.admit}
    assert all(0 < taken[name] <= left[name] for name in taken if name not in decoders)
    assert set(taken) <= {*decoders, *left}


@given(states())
def test_whenever_there_is_room_prompts_make_progress(now):
    decision = plan_step(now, MODEL)
    decoders = sum(not request.prompt_left for request in now.running)
    prompts = [r.id for r in now.running if r.prompt_left] + list(decision.admit)
    if prompts and decoders < now.max_step_tokens:
        assert dict(decision.rows)[prompts[0]] >= 1


@given(states(), st.floats(0, 1))
def test_more_than_a_little_progress_is_only_made_in_time_or_for_free(now, slack_s):
    now = replace(now, running=tuple(replace(r, slack_s=slack_s) for r in now.running))
    taken = dict(plan_step(now, MODEL).rows)
    decoders = [r for r in now.running if not r.prompt_left]
    prompt_tokens = sum(taken.values()) - len(decoders)
    if not decoders or prompt_tokens <= now.least_chunk:
        return
    shape = StepShape(len(decoders), sum(r.context_tokens for r in decoders))
    free_s = MODEL.iteration_s(shape, now.k, now.slots) * 1.001
    took_s = MODEL.iteration_s(shape.with_chunk(0, prompt_tokens), now.k, now.slots)
    assert took_s <= max(slack_s, free_s) + 1e-9


def test_two_equal_states_get_the_same_decision():
    now = state([decoding("d"), prompting("p", 9)], [waiting("w")])
    assert plan_step(now, MODEL) == plan_step(replace(now), MODEL)


@pytest.mark.parametrize("k", [0, 3, 10])
def test_the_budget_counts_what_streaming_takes(k):
    spare = rows([decoding("d", slack_s=21 * MS)], [waiting("p", prompt=60)], k=k, least_chunk=1)
    took_s = MODEL.iteration_s(StepShape(1, 50).with_chunk(0, spare["p"]), k, 2)
    assert took_s <= 21 * MS
