"""Who is let in: those for whom every promise still holds. Who is returned, why, and until when."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from fake_executor import VOCAB, Served, served
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from test_step import MODEL, MS, decoding, prompting, state

from select_n_core.decisions.facts import Reason, RequestFacts
from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape, chunk_pairs
from select_n_core.decisions.pace import pace_of
from select_n_core.decisions.step import plan_step
from select_n_core.engine.messages import FinishReason, Request, SamplingParams
from select_n_core.errors import OverloadedError
from select_n_core.slo import SLO


def new(name: str, prompt: int = 10, slack_s: float = 1.0, **facts) -> RequestFacts:
    """One that arrived just now and may wait until its first token is due."""
    facts = {"expected_tokens": prompt, "wait_left_s": slack_s, **facts}
    return RequestFacts(name, 0, prompt, slack_s, **facts)


def waited(request: RequestFacts, seconds: float) -> RequestFacts:
    return replace(
        request,
        slack_s=request.slack_s - seconds,
        wait_left_s=request.wait_left_s - seconds,
        waited_s=request.waited_s + seconds,
    )


def plan(running=(), waiting=(), model=MODEL, **changes):
    return plan_step(state(running, waiting, **changes), model)


def reasons(decision) -> dict[str, Reason]:
    return {refusal.id: refusal.reason for refusal in decision.refuse}


class TestFirstTokens:
    """One row takes 1 ms, every token more 0.1 ms; 64 tokens a step at most."""

    def test_one_comes_in_if_the_prompts_before_it_leave_it_time(self):
        ahead = replace(prompting("ahead", 500), slack_s=0.5)  # 8 steps of 7.3 ms
        tight = {"tpot_s": 10 * MS}
        assert plan([ahead], [new("a", 10, 0.6)], **tight).admit == ("a",)
        decision = plan([ahead], [new("a", 10, 60 * MS, priority=-1)], **tight)
        assert decision.admit == ()

    def test_those_who_decode_slow_the_prompts_down(self):
        waiting = [new("a", 64, 45 * MS)]
        assert plan((), waiting, tpot_s=3 * MS).admit == ("a",)
        fresh = [decoding("d", slack_s=3 * MS)]  # 20 tokens a step beside it
        assert plan(fresh, waiting, tpot_s=3 * MS).admit == ("a",)
        assert plan(fresh, [new("a", 64, 8 * MS)], tpot_s=3 * MS).admit == ()

    def test_slack_that_was_earned_is_spent_on_it(self):
        waiting = [new("a", 60, 8 * MS)]
        assert plan([decoding("d", slack_s=3 * MS)], waiting, tpot_s=3 * MS).admit == ()
        assert plan([decoding("d", slack_s=8 * MS)], waiting, tpot_s=3 * MS).admit == ("a",)

    def test_nobody_comes_in_before_one_whose_first_token_would_then_be_late(self):
        mine = replace(prompting("mine", 128), slack_s=17 * MS)  # needs 14.6 ms
        urgent = new("urgent", 60, 9 * MS, priority=1)
        assert plan([mine], [urgent], tpot_s=10 * MS).admit == ()
        relaxed = replace(mine, slack_s=40 * MS)
        assert plan([relaxed], [urgent], tpot_s=10 * MS).admit == ("urgent",)

    def test_one_that_is_late_already_keeps_nobody_out(self):
        late = replace(prompting("late", 128), slack_s=1 * MS)
        assert plan([late], [new("a", 10, 0.5)], tpot_s=10 * MS).admit == ("a",)

    def test_a_prompt_too_long_for_its_target_is_judged_by_what_it_takes_alone(self):
        long = new("long", 640, 50 * MS)  # 10 steps of 7.3 ms
        assert plan((), [long]).admit == ("long",)
        assert plan((), [waited(long, 5 * MS)]).admit == ("long",)
        assert reasons(plan((), [waited(long, 10 * MS)])) == {"long": Reason.TTFT}
        busy = [replace(prompting("other", 640), slack_s=0.1)]
        assert plan(busy, [long]).admit == ()

    def test_one_that_was_let_in_before_waits_for_no_first_token(self):
        back = RequestFacts("back", 0, 300, -5.0, expected_tokens=310)
        assert plan([decoding("d")], [back]).admit == ("back",)

    def test_one_that_would_be_late_holds_up_nobody(self):
        queue = [new("long", 60, 8 * MS), new("short", 10, 60 * MS)]
        assert plan([decoding("d", slack_s=3 * MS)], queue, tpot_s=3 * MS).admit == ("short",)


class TestReturning:
    def test_one_waits_as_long_as_it_may(self):
        full = {"free_blocks": 0, "tpot_s": 10 * MS}
        patient = new("a", 10, 1.0, wait_left_s=0.5)
        assert plan([decoding("d")], [patient], **full).refuse == ()
        assert plan([decoding("d")], [waited(patient, 0.49)], **full).refuse == ()
        assert reasons(plan([decoding("d")], [waited(patient, 0.5)], **full)) == {"a": Reason.KV}

    def test_one_is_let_in_even_at_its_limit(self):
        decision = plan([decoding("d")], [waited(new("a", 10, 1.0, wait_left_s=0.5), 0.5)])
        assert (decision.admit, decision.refuse) == (("a",), ())

    def test_one_does_not_wait_for_what_can_no_longer_be(self):
        request = new("a", 60, 1.0)  # 6.9 ms of prompt after a step of 1 ms
        full = {"free_blocks": 0, "tpot_s": 10 * MS}
        assert plan([decoding("d")], [waited(request, 0.990)], **full).refuse == ()
        assert reasons(plan([decoding("d")], [waited(request, 0.993)], **full)) == {"a": Reason.KV}

    def test_one_that_was_let_in_before_is_never_returned(self):
        back = RequestFacts("back", 0, 300, -5.0, expected_tokens=310, waited_s=100.0)
        assert plan([decoding("d")], [back], free_blocks=0).refuse == ()

    def test_the_reason_is_what_is_missing(self):
        def reason(running, due_s=1.0, **changes) -> Reason:
            request = waited(new("a", 10, 0.1 + due_s, wait_left_s=0.1), 0.1)
            (refusal,) = plan(running, [request], **changes).refuse
            return refusal.reason

        rows = [decoding(str(number), slack_s=1.45 * MS) for number in range(5)]  # 1.4 ms a step
        assert reason(rows, free_blocks=0) is Reason.KV
        assert reason(rows, tpot_s=1.45 * MS) is Reason.TPOT
        assert reason(rows, max_batch=5) is Reason.QUEUE
        tight = [decoding("d", slack_s=1.2 * MS)]
        assert reason(tight, due_s=5 * MS, tpot_s=1.2 * MS) is Reason.TTFT  # two tokens a step

    def test_nobody_is_returned_twice_or_let_in_and_returned(self):
        queue = [waited(new(str(n), 60, 20 * MS, arrived_s=n), 9 * MS) for n in range(20)]
        decision = plan([decoding("d", slack_s=5 * MS)], queue, tpot_s=5 * MS)
        returned = [refusal.id for refusal in decision.refuse]
        assert len(set(returned)) == len(returned)
        assert not set(returned) & set(decision.admit)


class TestWhenItFits:
    """A step takes 1 ms; those that run end after `left` of them."""

    @staticmethod
    def fits_in_s(running, request=None, **changes) -> float:
        request = waited(request or new("a", 16, 1.0, wait_left_s=0.1), 0.1)
        (refusal,) = plan(running, [request], **{"tpot_s": 0.1, **changes}).refuse
        return refusal.fits_in_s

    @staticmethod
    def ending(name: str, left: int) -> RequestFacts:
        return decoding(name, expected_tokens=51 + left)

    def test_once_the_first_has_ended_that_leaves_blocks_enough(self):
        two = [self.ending("soon", 10), self.ending("late", 40)]
        soon_s = self.fits_in_s(two, free_blocks=2)
        assert soon_s == pytest.approx(11 * 1.1 * MS)
        large = new("a", 16, 1.0, wait_left_s=0.1, expected_tokens=100)
        assert self.fits_in_s(two, large, free_blocks=2) == pytest.approx(41 * 1.1 * MS)

    def test_once_there_is_a_place_in_the_batch(self):
        two = [self.ending("soon", 10), self.ending("late", 40)]
        assert self.fits_in_s(two, max_batch=2) == pytest.approx(11 * 1.1 * MS)

    def test_once_steps_are_fast_enough(self):
        rows = [self.ending(str(left), left) for left in (10, 20, 30)]
        rows = [replace(row, slack_s=1.25 * MS) for row in rows]
        assert self.fits_in_s(rows, tpot_s=1.25 * MS) > 10 * 1.2 * MS

    def test_one_step_at_least(self):
        rows = [decoding("d", slack_s=1.2 * MS, expected_tokens=51)]
        assert self.fits_in_s(rows, free_blocks=0, tpot_s=1.2 * MS) >= 1 * MS

    def test_those_that_wait_on_come_first(self):
        two = [self.ending("soon", 10), self.ending("late", 40)]
        back = RequestFacts("back", 0, 40, -1.0, expected_tokens=60)
        request = waited(new("a", 16, 1.0, wait_left_s=0.1), 0.1)
        (refusal,) = plan(two, [back, request], free_blocks=0, tpot_s=0.1).refuse
        assert refusal.fits_in_s >= 41 * 1.1 * MS


# The shapes of models: cheap, dear in tokens, and one whose steps are bound by copies.
CHEAP = LatencyModel(4, 1 * MS, ComputeModel(((1, 1 * MS), (64, 2 * MS)), 0.0, 0.0, 0.0, 0.0))
DEAR = LatencyModel(
    4, 0.1 * MS, ComputeModel(((1, 1 * MS), (64, 20 * MS)), 2e-6, 3e-6, 0.5 * MS, 1e-5)
)
COPIES = LatencyModel(
    4, 6 * MS, ComputeModel(((1, 1 * MS), (64, 5 * MS)), 2e-6, 1e-6, 0.0, 0.0, copy_slowdown=0.2)
)


@dataclass(repr=False)
class Exact:
    """A served engine whose steps take what the model says; requests arrive at their own times."""

    world: Served
    latency: LatencyModel
    arrivals: list[tuple[float, Request]]
    sent_s: dict[str, float] = field(default_factory=dict)
    decided_s: float = 0.0
    times_s: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.world.step_s = 0.0
        compute = self.world.executor.step
        pace = pace_of(self.latency, self.world.executor.k, 2)

        def step(rows):
            self.world.clock.now_s += pace.step_s(self._shape(rows))
            return compute(rows)

        self.world.executor.step = step

    def _shape(self, rows) -> StepShape:
        running, blocks = self.world.scheduler.running, self.world.executor.blocks
        owners = {
            blocks.table(name)[0]: sequence
            for name, sequence in running.items()
            if blocks.owned_blocks(name)
        }
        decode = [row for row in rows if owners[row.blocks[0]].output_tokens]
        prompts = [row for row in rows if not owners[row.blocks[0]].output_tokens]
        return StepShape(
            len(decode),
            sum(row.context for row in decode),
            sum(len(row.tokens) for row in prompts),
            sum(chunk_pairs(row.context, len(row.tokens)) for row in prompts),
            len(prompts),
        )

    def __repr__(self) -> str:
        scheduler = self.world.scheduler
        asked = [
            (at_s, len(each.prompt), each.sampling.max_tokens, each.deadline_s, each.tpot_s)
            for at_s, each in self.arrivals
        ]
        limits, blocks = scheduler.limits, scheduler.blocks.blocks
        return f"{self.latency}, k={scheduler.k}, {scheduler.slo}, {limits}, {blocks=}, {asked=}"

    @property
    def now_s(self) -> float:
        return self.world.clock.now_s

    def step(self) -> None:
        if self.world.engine.idle and self.arrivals:
            self.world.clock.now_s = max(self.now_s, self.arrivals[0][0])
        while self.arrivals and self.arrivals[0][0] <= self.now_s:
            at_s, request = self.arrivals.pop(0)
            self.sent_s[request.id] = at_s
            self.world.engine.submit(replace(request, sent_s=at_s))
        before = {name: len(tokens) for name, tokens in self.world.tokens.items()}
        self.decided_s = self.now_s
        self.world.step()
        for name, tokens in self.world.tokens.items():
            times = self.times_s.setdefault(name, [])
            times += [self.now_s] * (len(tokens) - before.get(name, 0))

    def run(self, most: int = 5000) -> None:
        for _ in range(most):
            if self.world.engine.idle and not self.arrivals:
                return
            self.step()
        raise AssertionError(f"still live after {most} steps: {[*self.world.scheduler.waiting]}")

    def ttft_s(self, name: str) -> float:
        return self.times_s[name][0] - self.sent_s[name]

    def tpot_s(self, name: str) -> float:
        times = self.times_s[name]
        return (times[-1] - times[0]) / max(1, len(times) - 1)


def request(name: str, prompt: int, tokens: int, **facts) -> Request:
    ids = tuple((int(name) * 31 + place * 7) % VOCAB for place in range(prompt))
    return Request(name, ids, SamplingParams(max_tokens=tokens), **facts)


MOST = 24  # tokens of an answer at most, all of which are expected


@st.composite
def histories(draw) -> Exact:
    latency = draw(st.sampled_from([CHEAP, DEAR, COPIES]))
    k = draw(st.sampled_from([0, 2, 4]))
    pace = pace_of(latency, k, 2)
    # Whoever is alone keeps the TPOT.
    least_s = pace.step_s(StepShape(1, 64))
    slo = SLO(
        tpot_s=least_s * draw(st.floats(1.05, 4)),
        ttft_s=least_s * draw(st.floats(2, 60)),
    )
    if draw(st.booleans()):
        slo = replace(slo, max_wait_s=slo.ttft_s * draw(st.floats(0, 1)))
    blocks = draw(st.integers(16, 40))
    world = served(
        latency,
        slo,
        [blocks] * 5,
        k,
        k_min=k,
        host_blocks=0,
        max_batch=draw(st.integers(1, 8)),
        max_step_tokens=draw(st.integers(8, 40)),
        max_tokens=64,
        expected_output=MOST,
        least_chunk=draw(st.integers(1, 8)),
    )
    at_s, arrivals = 100.0, []
    for number in range(draw(st.integers(1, 16))):
        at_s += draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])) * least_s * draw(st.floats(0, 2))
        prompt, tokens = draw(st.integers(1, 40)), draw(st.integers(1, MOST))
        due_s = draw(st.sampled_from([None, None, 0.5, 2.0]))
        facts = {} if due_s is None else {"deadline_s": slo.ttft_s * due_s}
        if slower := draw(st.sampled_from([None, None, None, 1.5, 4.0])):
            facts["tpot_s"] = slo.tpot_s * slower
        arrivals.append((at_s, request(str(number), prompt, tokens, **facts)))
    return Exact(world, latency, arrivals)


def target_s(exact: Exact, asked: Request) -> float:
    """When its first token is due: as promised, or what a prompt that long takes alone."""
    scheduler = exact.world.scheduler
    pace = pace_of(exact.latency, scheduler.k, scheduler.slots)
    alone_s = pace.prompt_s(len(asked.prompt), scheduler.limits.max_step_tokens)
    promised_s = scheduler.slo.ttft_s if asked.deadline_s is None else asked.deadline_s
    # Decisions aim a little below what is promised.
    return promised_s if alone_s <= 0.9 * promised_s else float("inf")


def check(exact: Exact, asked: Sequence[Request]) -> None:
    slo = exact.world.scheduler.slo
    for each in asked:
        if exact.world.ends[each.id] is FinishReason.ERROR:
            error = exact.world.errors[each.id]
            assert isinstance(error, OverloadedError), error
            assert not exact.world.tokens[each.id], "nobody is returned after a token"
            assert error.reason in set(Reason)
            assert 0 < error.retry_after_s < float("inf")
            continue
        assert len(exact.world.tokens[each.id]) == each.sampling.max_tokens
        assert exact.tpot_s(each.id) <= (each.tpot_s or slo.tpot_s) * (1 + 1e-9)
        assert exact.ttft_s(each.id) <= target_s(exact, each) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(histories())
def test_with_an_exact_model_whoever_is_let_in_gets_what_was_promised(exact):
    note(repr(exact))
    asked = [each for _, each in exact.arrivals]
    exact.run()
    assert set(exact.world.ends) == {each.id for each in asked}, "nobody is lost"
    check(exact, asked)
    scheduler = exact.world.scheduler
    assert scheduler.admitted + scheduler.returned.total() == len(asked)


@settings(max_examples=60, deadline=None)
@given(histories())
def test_who_is_returned_is_let_in_at_the_time_that_was_named(exact):
    note(repr(exact))
    asked = {each.id: each for _, each in exact.arrivals}
    while not exact.world.errors and (exact.arrivals or not exact.world.engine.idle):
        exact.step()
    assume(exact.world.errors)
    name, error = next(iter(exact.world.errors.items()))
    exact.arrivals = []
    # It may come while a step runs and have lost too much of its time when that has ended.
    for again in ("again", "and again"):
        note(f"at {exact.now_s}: {error}")
        sent_s = exact.now_s + error.retry_after_s
        exact.arrivals = [(sent_s, replace(asked[name], id=again))]
        while again not in exact.world.tokens:  # the verdict
            exact.step()
        if again not in exact.world.errors:
            break
        error = exact.world.errors[again]
    exact.run()
    assert exact.world.ends[again] is FinishReason.LENGTH, error


@settings(max_examples=30, deadline=None)
@given(histories())
def test_nobody_waits_longer_than_allowed(exact):
    slo = exact.world.scheduler.slo
    asked = {each.id: each for _, each in exact.arrivals}
    while exact.arrivals or not exact.world.engine.idle:
        exact.step()
        for waits in exact.world.scheduler.waiting.values():
            own_s = asked[waits.request.id].deadline_s
            limit_s = slo.max_wait_s
            if limit_s is None:
                limit_s = slo.ttft_s if own_s is None else own_s
            assert waits.preempted or waits.since_s + limit_s > exact.decided_s - 1e-9


def test_an_idle_replica_takes_a_burst_up_to_what_it_can_serve_in_time():
    world = served(CHEAP, SLO(20 * MS, 60 * MS), [64] * 5, 0, max_batch=32, expected_output=MOST)
    burst = [(100.0, request(str(number), 12, 8)) for number in range(30)]
    exact = Exact(world, CHEAP, burst)
    asked = [each for _, each in burst]
    exact.run()
    check(exact, asked)
    taken = [each for each in asked if each.id not in world.errors]
    assert 5 <= len(taken) < 30
