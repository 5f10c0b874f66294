"""The scheduler: who is let in, who runs, and whose blocks come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.latency import ComputeModel, LatencyModel
from select_n_core.engine.messages import Request, SamplingParams
from select_n_core.engine.scheduler import Limits, Scheduler, Sequence
from select_n_core.errors import ContextLengthError, OverloadedError, RequestError
from select_n_core.kv.blocks import BlockTable
from select_n_core.slo import SLO

MS = 1e-3
LATENCY = LatencyModel(4, 1 * MS, ComputeModel(((1, 1 * MS), (64, 2 * MS)), 0.0, 0.0, 0.0, 0.0))


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def scheduler(blocks: int = 16, clock: Clock | None = None, **limits: int) -> Scheduler:
    facts = {
        "max_batch": 4,
        "max_step_tokens": 64,
        "max_queue": 3,
        "max_tokens": min(200, blocks * 16),
        "vocab_size": 50,
    }
    return Scheduler(
        limits=Limits(**{**facts, **limits}),
        slo=SLO(tpot_s=0.1, ttft_s=1.0),
        latency=LATENCY,
        blocks=BlockTable(blocks, 16),
        k=2,
        slots=2,
        clock=clock or Clock(),
    )


def request(name: str, prompt: int = 10, max_tokens: int = 6) -> Request:
    return Request(name, tuple(range(1, prompt + 1)), SamplingParams(max_tokens=max_tokens))


def advance(turns, clock: Clock | None = None) -> None:
    """What the engine does after a step: tokens are computed, those that sample get one."""
    for turn in turns:
        samples = turn.samples
        turn.sequence.computed += turn.count
        if samples:
            turn.sequence.tokens.append(7)
            if clock is not None and turn.sequence.first_token_s is None:
                turn.sequence.first_token_s = clock()


class TestLettingIn:
    def test_a_request_waits_until_a_step_admits_it(self):
        queue = scheduler()
        queue.add(request("a"))
        assert not queue.idle
        assert [turn.sequence.request.id for turn in queue.next_step()] == ["a"]
        assert list(queue.running) == ["a"]
        assert not queue.waiting

    @pytest.mark.parametrize("prompt", [(), (50,), (-1, 3), (3, 10**9)])
    def test_a_prompt_that_is_empty_or_no_token_ids_is_refused(self, prompt):
        queue = scheduler()
        with pytest.raises(RequestError) as caught:
            queue.add(Request("a", prompt, SamplingParams(max_tokens=1)))
        assert caught.value.field == "prompt"
        assert queue.idle

    def test_the_largest_token_id_is_let_in(self):
        scheduler().add(Request("a", (0, 49), SamplingParams(max_tokens=1)))

    def test_a_request_that_can_never_fit_is_told_the_limit(self):
        queue = scheduler()
        queue.add(request("fits", prompt=49, max_tokens=151))
        with pytest.raises(ContextLengthError) as caught:
            queue.add(request("a", prompt=49, max_tokens=152))
        assert str(caught.value) == (
            "prompt (49 tokens) plus max_tokens (152) is 201; "
            "this model serves at most 200 tokens per request here"
        )
        assert caught.value.field == "max_tokens"

    def test_a_live_id_is_not_taken_twice(self):
        queue = scheduler()
        queue.add(request("a"))
        with pytest.raises(RequestError, match="'a' is in use"):
            queue.add(request("a"))
        queue.next_step()
        with pytest.raises(RequestError, match="'a' is in use"):
            queue.add(request("a"))
        queue.remove("a")
        queue.add(request("a"))

    def test_a_full_queue_says_when_to_come_back(self):
        queue = scheduler(max_batch=1)
        queue.add(request("running", max_tokens=60))
        advance(queue.next_step())
        for name in "abc":
            queue.add(request(name))
        with pytest.raises(OverloadedError, match="3 requests are waiting already") as caught:
            queue.add(request("d"))
        assert caught.value.retry_after_s == pytest.approx(59 * 0.1)
        assert [s.request.id for s in queue.waiting] == ["a", "b", "c"]

    def test_nobody_is_told_to_come_back_within_a_second(self):
        queue = scheduler(max_queue=1, max_batch=1)
        queue.add(request("a"))
        queue.add(request("b"))
        with pytest.raises(OverloadedError) as caught:
            queue.add(request("c"))
        assert caught.value.retry_after_s == 1.0

    def test_a_burst_on_an_idle_replica_may_fill_the_batch_and_the_queue(self):
        queue = scheduler(max_queue=1, max_batch=2)
        for name in "abc":
            queue.add(request(name))
        with pytest.raises(OverloadedError):
            queue.add(request("d"))


class TestSteps:
    def test_a_long_prompt_goes_in_chunks_and_then_decodes(self):
        queue = scheduler()
        queue.add(request("a", prompt=49, max_tokens=3))
        queue.limits = Limits(4, 20, 3, 200, 50)
        seen = []
        for _ in range(5):
            turns = queue.next_step()
            seen += [(turn.new_tokens, turn.samples) for turn in turns]
            advance(turns)
        prompt = list(range(1, 50))
        assert seen == [
            (prompt[:20], False),
            (prompt[20:40], False),
            (prompt[40:], True),
            ([7], True),
            ([7], True),
        ]

    def test_blocks_are_reserved_for_the_whole_request_at_admission(self):
        queue = scheduler()
        queue.add(request("a", prompt=17, max_tokens=16))
        queue.next_step()
        assert len(queue.blocks.table("a")) == 3

    def test_no_more_run_than_the_batch_holds(self):
        queue = scheduler(max_batch=2)
        for name in "abc":
            queue.add(request(name))
        advance(queue.next_step())
        assert list(queue.running) == ["a", "b"]
        queue.remove("a")
        queue.next_step()
        assert list(queue.running) == ["b", "c"]

    def test_a_request_without_room_waits_and_keeps_its_place(self):
        queue = scheduler(blocks=4)
        for name, prompt in (("a", 40), ("large", 40), ("small", 4)):
            queue.add(request(name, prompt=prompt))
        advance(queue.next_step())
        assert list(queue.running) == ["a"]
        queue.remove("a")
        queue.next_step()
        assert list(queue.running) == ["large", "small"]

    def test_an_idle_scheduler_has_nothing_to_do(self):
        queue = scheduler()
        assert queue.idle
        assert queue.next_step() == []


class TestSlack:
    def test_a_request_without_a_first_token_has_all_the_time(self):
        sequence = Sequence(request("a"), arrived_s=0.0, tokens=[1, 2, 3])
        assert sequence.slack_s(1e6, 0.1) == float("inf")

    def test_every_token_earns_its_time_and_the_clock_spends_it(self):
        clock = Clock()
        queue = scheduler(clock=clock)
        queue.add(request("a"))
        advance(queue.next_step(), clock)
        (facts,) = queue.state().running
        assert facts.slack_s == pytest.approx(0.1)
        clock.now_s += 0.03
        advance(queue.next_step(), clock)
        (facts,) = queue.state().running
        assert facts.slack_s == pytest.approx(0.17)


class TestRemoving:
    def test_a_running_request_gives_its_blocks_back(self):
        queue = scheduler()
        queue.add(request("a"))
        queue.next_step()
        assert queue.remove("a").request.id == "a"
        assert queue.blocks.free_blocks == 16
        assert queue.idle

    def test_a_waiting_request_leaves_the_queue_and_the_others_their_places(self):
        queue = scheduler()
        for name in "abc":
            queue.add(request(name))
        queue.remove("b")
        assert [s.request.id for s in queue.waiting] == ["a", "c"]

    def test_a_request_that_is_not_live_is_nobody(self):
        assert scheduler().remove("a") is None


@given(st.lists(st.tuples(st.sampled_from("sdx"), st.integers(0, 9), st.integers(1, 90))))
def test_blocks_are_conserved_whatever_comes_and_goes(events):
    queue = scheduler(blocks=8, max_tokens=120, max_queue=4)
    for kind, number, size in events:
        if kind == "s":
            advance(queue.next_step())
            for name, sequence in list(queue.running.items()):
                if sequence.output_tokens >= sequence.request.sampling.max_tokens:
                    queue.remove(name)
        elif kind == "x":
            queue.remove(str(number))
        elif queue.find(str(number)) is None and len(queue.waiting) < 4:
            queue.add(request(str(number), prompt=min(size, 49), max_tokens=size % 7 + 1))
        held = sum(len(queue.blocks.table(name)) for name in queue.running)
        assert queue.blocks.free_blocks + held == 8
        assert len(queue.running) <= 4
    while not queue.idle:
        turns = queue.next_step()
        assert turns, "live requests, and nobody computes"
        advance(turns)
        for name, sequence in list(queue.running.items()):
            if sequence.output_tokens >= sequence.request.sampling.max_tokens:
                queue.remove(name)
    assert queue.blocks.free_blocks == 8
