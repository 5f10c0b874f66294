"""The scheduler: who is let in, who runs, who is preempted, and whose blocks come back."""

import gc
from dataclasses import replace

import pytest
from fake_executor import VOCAB, Clock, Served, expected_tokens, served
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from select_n_core.decisions.facts import Reason
from select_n_core.decisions.latency import ComputeModel, LatencyModel
from select_n_core.engine.messages import FinishReason, Request, SamplingParams
from select_n_core.engine.scheduler import Limits, Scheduler, Turning
from select_n_core.engine.vacancy import VacancyMeter
from select_n_core.errors import (
    ContextLengthError,
    DeviceMemoryError,
    InputError,
    OverloadedError,
    RequestError,
)
from select_n_core.kv.blocks import BlockTable
from select_n_core.kv.names import Salts
from select_n_core.slo import SLO

MS = 1e-3
LATENCY = LatencyModel(4, 1 * MS, ComputeModel(((1, 1 * MS), (64, 2 * MS)), 0.0, 0.0, 0.0, 0.0))


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
        blocks=BlockTable(range(blocks), 16),
        k=2,
        slots=2,
        clock=clock or Clock(),
    )


def request(name: str, prompt: int = 10, max_tokens: int = 6, **facts) -> Request:
    return Request(name, tuple(range(1, prompt + 1)), SamplingParams(max_tokens), **facts)


def advance(turns, clock: Clock | None = None) -> None:
    """What the engine does after a step: tokens are computed, those that sample get one."""
    for turn in turns:
        samples = turn.samples
        turn.sequence.computed += turn.amount
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
        error = caught.value
        assert (error.reason, error.code) == (Reason.QUEUE, "overloaded_queue")
        # Those that wait may begin within a second and end six tokens later.
        assert 60 * 4 * MS < error.retry_after_s < 1.5
        assert list(queue.waiting) == ["a", "b", "c"]
        assert queue.returned == {Reason.QUEUE: 1}

    def test_a_request_that_arrived_while_a_step_ran_has_waited_since(self):
        queue = scheduler(clock=Clock(100.0))
        queue.add(request("a", sent_s=99.75))
        queue.add(request("b", sent_s=100.5))  # a clock that runs ahead is not believed
        first, second = queue.state().waiting
        # Decisions aim at 0.9 of the TTFT target: what is left over is for what nobody predicts.
        assert (first.waited_s, first.slack_s) == (0.25, pytest.approx(0.65))
        assert (second.waited_s, second.slack_s) == (0.0, pytest.approx(0.9))

    def test_one_that_waited_in_vain_is_returned_and_leaves_nothing(self):
        clock = Clock()
        queue = scheduler(blocks=8, clock=clock)
        queue.add(request("large", prompt=40, max_tokens=80))
        advance(queue.next_step(), clock)
        queue.add(request("other", prompt=30))
        clock.now_s += 0.5
        advance(queue.next_step(), clock)
        assert list(queue.waiting) == ["other"]
        clock.now_s += 0.5
        queue.next_step()
        ((name, error),) = queue.take_failed()
        assert (name, error.reason, error.code) == ("other", Reason.KV, "overloaded_kv")
        assert str(error).startswith("the request waited 1 s and was not let in: the KV memory")
        assert error.retry_after_s > 0
        assert (queue.admitted, queue.returned) == (1, {Reason.KV: 1})
        assert queue.take_entered() == [("large", 0)]
        assert not queue.waiting

    def test_a_deadline_before_arrival_is_refused(self):
        for name in ("deadline_s", "tpot_s"):
            with pytest.raises(InputError, match=f"{name} must be above zero"):
                request("a", **{name: -1.0})

    def test_a_burst_on_an_idle_replica_may_fill_the_batch_and_the_queue(self):
        queue = scheduler(max_queue=1, max_batch=2)
        for name in "abc":
            queue.add(request(name))
        with pytest.raises(OverloadedError):
            queue.add(request("d"))


class TestSteps:
    def test_a_long_prompt_goes_in_chunks_and_then_decodes(self):
        queue = scheduler(max_step_tokens=20)
        queue.add(request("a", prompt=49, max_tokens=3))
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

    def test_blocks_grow_with_what_is_computed(self):
        queue = scheduler()
        queue.add(request("a", prompt=16, max_tokens=20))
        owned = []
        for _ in range(19):
            advance(queue.next_step())
            owned.append(queue.blocks.owned_blocks("a"))
        assert owned == [1] + [2] * 16 + [3] * 2

    def test_no_more_run_than_the_batch_holds(self):
        queue = scheduler(max_batch=2)
        for name in "abc":
            queue.add(request(name))
        advance(queue.next_step())
        assert list(queue.running) == ["a", "b"]
        queue.remove("a")
        queue.next_step()
        assert list(queue.running) == ["b", "c"]

    def test_an_idle_scheduler_has_nothing_to_do(self):
        queue = scheduler()
        assert queue.idle
        assert queue.next_step() == []


class TestFacts:
    def test_a_live_request_leaves_the_garbage_collector_no_tokens_to_visit(self):
        queue = scheduler()
        queue.add(request("a", prompt=5))
        live = queue.find("a")
        assert not live.request.prompt
        assert not any(isinstance(each, int) for each in gc.get_referents(live.tokens))
        assert (live.prompt_tokens, live.output_tokens) == (5, 0)

    def test_facts_follow_the_request(self):
        clock = Clock()
        queue = scheduler(clock=clock)
        queue.add(request("a", prompt=5))
        (waiting,) = queue.state().waiting
        assert (waiting.context_tokens, waiting.prompt_left, waiting.is_new) == (0, 5, True)
        advance(queue.next_step(), clock)
        (running,) = queue.state().running
        assert (running.context_tokens, running.prompt_left, running.is_new) == (5, 0, False)


class TestOwnTargets:
    def test_steps_keep_to_the_tightest_promise_to_anyone(self):
        queue = scheduler()
        assert queue.state().tpot_s == pytest.approx(0.098)
        queue.add(request("a", tpot_s=0.4))
        assert queue.state().tpot_s == pytest.approx(0.392)
        queue.add(request("b", tpot_s=0.2))
        assert queue.state().tpot_s == pytest.approx(0.196)
        queue.remove("b")
        assert queue.state().tpot_s == pytest.approx(0.392)
        queue.remove("a")
        assert queue.state().tpot_s == pytest.approx(0.098)

    def test_nobody_is_promised_more_than_the_model_was_planned_for(self):
        queue = scheduler()
        queue.add(request("a", tpot_s=0.01))
        assert queue.find("a").promise.tpot_s == 0.1

    def test_one_waits_as_long_as_its_own_class_lets_it(self):
        clock = Clock()
        queue = scheduler(blocks=4, clock=clock)
        queue.add(request("runs", 40, 20))
        queue.next_step()
        queue.add(request("hasty", 40, 20, max_wait_s=0.1))
        queue.add(request("patient", 40, 20, max_wait_s=0.4))
        clock.now_s += 0.2
        queue.next_step()
        assert [name for name, _ in queue.take_failed()] == ["hasty"]
        clock.now_s += 0.3
        queue.next_step()
        assert [name for name, _ in queue.take_failed()] == ["patient"]

    def test_a_class_fills_its_own_part_of_the_queue_only(self):
        queue = scheduler(max_batch=1, max_queue=3)
        queue.add(request("runs"))
        queue.next_step()
        queue.add(request("a", slo_class="batch", max_queue=1))
        with pytest.raises(OverloadedError, match="waiting already"):
            queue.add(request("b", slo_class="batch", max_queue=1))
        queue.add(request("c", slo_class="chat", max_queue=2))
        assert list(queue.waiting) == ["a", "c"]

    def test_so_does_a_tenant_whatever_its_requests_classes(self):
        queue = scheduler(max_batch=1, max_queue=9)
        queue.add(request("runs"))
        queue.next_step()
        for name, slo_class in (("a", "chat"), ("b", "batch")):
            queue.add(request(name, tenant="acme", slo_class=slo_class, max_tenant_queue=2))
        with pytest.raises(OverloadedError, match="2 requests are waiting already") as caught:
            queue.add(request("c", tenant="acme", max_tenant_queue=2))
        assert caught.value.reason == Reason.QUEUE
        queue.add(request("d", tenant="zeta", max_tenant_queue=1))
        assert list(queue.waiting) == ["a", "b", "d"]

    def test_twice_the_weight_is_twice_the_tokens_from_the_next_request_on(self):
        world = served(COSTLY, SLACK, [40], max_batch=2)
        for number in range(60):
            for tenant, weight in (("heavy", 2.0), ("light", 1.0)):
                world.engine.submit(
                    asked(
                        f"{tenant}{number}", tokens=6, tenant=tenant, weight=weight, deadline_s=60.0
                    )
                )
        while len(world.ends) < 45:
            world.step()
        heavy = sum(name.startswith("heavy") for name in world.ends)
        assert 27 <= heavy <= 33


class TestVacancy:
    def test_it_counts_who_runs_who_waits_and_what_they_will_take(self):
        queue = scheduler(blocks=8, max_batch=2, expected_output=20)
        meter = VacancyMeter(queue)
        empty = meter.read(0.0)
        assert (empty.running, empty.waiting, empty.least_priority) == (0, 0, None)
        assert (empty.tpot_s, empty.max_batch) == (pytest.approx(0.098), 2)
        assert [(level.k, level.kv_tokens) for level in empty.levels] == [(2, 128)]
        for name, facts in (("a", {"priority": 3}), ("b", {}), ("c", {"tpot_s": 0.2})):
            queue.add(request(name, prompt=10, max_tokens=30, **facts))
        queue.next_step()
        read = meter.read(0.1)
        assert (read.running, read.waiting, read.least_priority) == (2, 1, 0)
        assert (read.running_tokens, read.waiting_tokens) == (2 * 32, 32)  # 30 each, whole blocks
        assert read.backlog_tokens == 30

    def test_what_k_may_still_free_is_reclaimable(self):
        queue = scheduler(blocks=8)
        queue.turning = Turning(k_min=2, k_most=lambda: 4, blocks_at=(0, 0, 8, 10, 12))
        read = VacancyMeter(queue).read(0.0)
        assert [(level.k, level.kv_tokens) for level in read.levels] == [(2, 128), (4, 192)]
        assert read.reclaimable_tokens == 64

    def test_it_says_whose_requests_it_includes(self):
        meter = VacancyMeter(scheduler())
        for sender, number in (("here", 4), ("there", 7), ("here", 3), ("", 99)):
            meter.hear(request(str(number), sender=sender, number=number))
        assert meter.read(0.0).heard == {"here": 4, "there": 7}

    def test_senders_that_are_gone_are_forgotten_some_day(self):
        meter = VacancyMeter(scheduler())
        for number in range(1000):
            meter.hear(request("a", sender=str(number), number=1))
            meter.hear(request("a", sender="stays", number=number))
        heard = meter.read(0.0).heard
        assert heard["stays"] == 999
        assert len(heard) <= 256

    def test_a_latency_that_was_learnt_shows_within_a_report(self):
        queue = scheduler()
        meter = VacancyMeter(queue)
        [before] = meter.read(0.0).levels
        queue.latency = replace(LATENCY, transfer_s=50 * MS)
        assert meter.read(0.01).levels == (before,)
        [after] = meter.read(0.06).levels
        assert after.step_s(0) > 2 * before.step_s(0)


class TestSlack:
    def test_before_the_first_token_the_target_is_that_of_ttft_or_its_own(self):
        clock = Clock()
        queue = scheduler(clock=clock)
        for asked in (request("a"), request("b", deadline_s=0.5)):
            queue.add(asked)
        clock.now_s += 0.25
        slack_s = {each.id: each.slack_s for each in queue.state().waiting}
        assert slack_s == pytest.approx({"a": 0.9 - 0.25, "b": 0.45 - 0.25})

    def test_every_token_earns_its_time_and_the_clock_spends_it(self):
        clock = Clock()
        queue = scheduler(clock=clock)
        queue.add(request("a"))
        advance(queue.next_step(), clock)
        (facts,) = queue.state().running
        assert facts.slack_s == pytest.approx(0.098)  # decisions aim at 0.98 of the target
        clock.now_s += 0.03
        advance(queue.next_step(), clock)
        (facts,) = queue.state().running
        assert facts.slack_s == pytest.approx(0.166)


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
        assert list(queue.waiting) == ["a", "c"]

    def test_a_request_that_is_not_live_is_nobody(self):
        assert scheduler().remove("a") is None


SLACK = SLO(tpot_s=10.0, ttft_s=1.0)
# Every prompt token costs, so that swapping pays; a step of one row takes 4 ms.
COSTLY = LatencyModel(4, 0.1 * MS, ComputeModel(((1, 1 * MS), (64, 20 * MS)), 0.0, 0.0, 0.0, 0.0))


def asked(
    name: str, prompt: int = 6, tokens: int = 10, *, text: str = "", common: int = 0, **facts
) -> Request:
    """The first `common` tokens of the prompt are those of `text`, the others its own."""
    seeds = [sum(map(ord, text if place < common else name)) for place in range(prompt)]
    ids = tuple((seed * 31 + place * 7) % VOCAB for place, seed in enumerate(seeds))
    return Request(name, ids, SamplingParams(max_tokens=tokens), **facts)


class TestPreemption:
    """Over an executor whose tokens are a hash of what lies in the blocks."""

    @pytest.mark.parametrize(
        ("changes", "swaps", "recomputes"),
        [
            ({"host_blocks": 20}, 1, 0),
            ({"host_blocks": 0}, 0, 1),
            ({"host_blocks": 20, "block_copy_s": 1.0}, 0, 1),
        ],
    )
    def test_when_blocks_run_out_the_last_waits_and_goes_on_exactly(
        self, changes, swaps, recomputes
    ):
        world = served(COSTLY, SLACK, [8], **changes)
        requests = [asked("first", tokens=20), asked("last", tokens=20)]
        for each in requests:
            world.engine.submit(each)
        world.run()
        assert (world.scheduler.swaps, world.scheduler.recomputes) == (swaps, recomputes)
        for each in requests:
            assert world.tokens[each.id] == expected_tokens(each)
            assert world.ends[each.id] is FinishReason.LENGTH

    def test_a_turn_of_k_preempts_no_more_than_is_in_the_way(self):
        world = served(COSTLY, SLACK, [4, 12], k=1, host_blocks=20)
        requests = [
            asked(name, prompt=10, tokens=6, priority=rank) for rank, name in enumerate("cba")
        ]
        for each in requests:
            world.engine.submit(each)
            world.step()
        assert len(world.scheduler.running) == 3
        world.engine.turn(0)
        assert list(world.scheduler.running) == ["a"]
        assert world.executor.blocks.blocks == 4
        world.check_blocks()
        world.run()
        for each in requests:
            assert world.tokens[each.id] == expected_tokens(each)

    def test_a_swapped_request_may_be_cancelled_and_leaves_nothing(self):
        world = served(COSTLY, SLACK, [8], host_blocks=20)
        for name in ("first", "last"):
            world.engine.submit(asked(name, tokens=20))
        while not world.host.holds("last"):
            world.step()
        world.engine.cancel("last")
        assert world.host.free_blocks == 20
        world.run()
        assert world.ends["last"] is FinishReason.CANCELLED
        assert world.tokens["first"] == expected_tokens(asked("first", tokens=20))

    def test_a_cache_that_is_on_its_way_back_arrives_before_its_blocks_move(self):
        world = served(COSTLY, SLACK, [8, 18], k=1, host_blocks=20, max_tokens=56)
        requests = {name: asked(name, prompt=20, tokens=12) for name in ("a", "b")}
        for each in requests.values():
            world.engine.submit(each)
        for _ in range(3):
            world.step()
        world.engine.turn(0)
        (away,), (stays,) = world.scheduler.waiting, world.scheduler.running
        assert world.host.holds(away)
        world.engine.turn(1)
        while not world.scheduler.find(away).coming_back:
            world.step()
        before = list(world.executor.blocks.table(away))
        world.engine.cancel(stays)
        world.engine.turn(0)
        assert world.executor.blocks.table(away) != before
        world.run()
        assert world.tokens[away] == expected_tokens(requests[away])

    def test_so_may_one_whose_cache_is_on_its_way_back(self):
        world = served(COSTLY, SLACK, [8], host_blocks=20)
        for name in ("first", "last"):
            world.engine.submit(asked(name, tokens=20))
        while not any(each.coming_back for each in world.scheduler.running.values()):
            world.step()
        world.engine.cancel("last")
        after = asked("after", prompt=20, tokens=5)
        world.engine.submit(after)
        world.run()
        assert world.tokens["after"] == expected_tokens(after)
        assert world.host.free_blocks == 20

    @pytest.mark.parametrize("copies", [1, 4])
    def test_a_link_that_fails_costs_time_and_no_token(self, copies, caplog):
        world = served(COSTLY, SLACK, [8], host_blocks=20)
        requests = [asked("first", tokens=20), asked("last", tokens=20)]
        for each in requests:
            world.engine.submit(each)
        while world.scheduler.swaps == world.scheduler.recomputes == 0:
            world.link.failing = copies
            world.step()
        world.run()
        assert world.scheduler.recomputes >= 1
        assert "the cable is out" in caplog.text
        for each in requests:
            assert world.tokens[each.id] == expected_tokens(each)

    def test_a_failing_way_back_is_a_recompute(self, caplog):
        world = served(COSTLY, SLACK, [8], host_blocks=20)
        requests = [asked("first", tokens=20), asked("last", tokens=20)]
        for each in requests:
            world.engine.submit(each)
        while not world.scheduler.swaps:
            world.step()
        world.link.failing = 1
        world.run()
        assert (world.scheduler.swaps, world.scheduler.recomputes) == (1, 1)
        assert "the cable is out" in caplog.text
        assert world.tokens["last"] == expected_tokens(requests[1])

    def test_one_that_outgrows_all_there_is_ends_alone_with_an_error_that_says_so(self):
        world = served(COSTLY, SLACK, [3, 8], k=1, max_tokens=32)
        large, small = asked("large", prompt=10, tokens=12), asked("small", prompt=5, tokens=4)
        world.engine.submit(large)
        world.step()
        world.engine.turn(0)
        world.executor.m = world.executor.cap = 0  # the lease is gone
        world.engine.submit(small)
        world.run()
        assert isinstance(world.errors["large"], DeviceMemoryError)
        assert "needs 4 KV blocks to go on, this replica has 3" in str(world.errors["large"])
        assert world.tokens["large"] == expected_tokens(large)[: len(world.tokens["large"])]
        assert world.tokens["small"] == expected_tokens(small)

    def test_as_long_as_k_may_rise_it_gets_the_room_instead(self):
        world = served(COSTLY, SLACK, [3, 3, 3, 5, 8], k=4, max_tokens=32)
        world.engine.turn(0)
        world.step()
        large = asked("large", prompt=22, tokens=8)
        world.engine.submit(large)
        world.run()
        assert world.tokens["large"] == expected_tokens(large)
        assert world.executor.k == 4


class TestFairness:
    def test_a_higher_class_is_served_first_and_the_lower_one_goes_on_after(self):
        world = served(COSTLY, SLACK, [8], max_batch=1)
        low, high = asked("low", tokens=12), asked("high", tokens=5, priority=1)
        world.engine.submit(low)
        world.step()
        world.step()
        world.engine.submit(high)
        world.run()
        assert list(world.ends) == ["high", "low"]
        assert world.tokens["low"] == expected_tokens(low)

    def test_a_flood_of_a_higher_class_starves_nobody(self):
        world = served(COSTLY, SLO(0.02, 0.05), [8], max_batch=1)  # patience is half a second
        patient = asked("patient", tokens=4, deadline_s=10.0)
        for number in range(400):
            world.engine.submit(asked(f"vip{number}", tokens=4, priority=1))
            if number == 0:
                world.engine.submit(patient)
            world.step()
            if "patient" in world.ends:
                break
        assert world.tokens["patient"] == expected_tokens(patient)
        assert 30 < number < 120

    def test_a_flood_of_small_requests_does_not_keep_a_large_one_out(self):
        world = served(COSTLY, SLACK, [8])
        world.engine.submit(asked("small", tokens=10))
        world.step()
        large = asked("large", prompt=26, tokens=5)
        world.engine.submit(large)
        for number in range(400):
            world.engine.submit(asked(f"small{number}", prompt=4, tokens=3))
            world.step()
            if "large" in world.ends:
                break
        assert world.tokens["large"] == expected_tokens(large)
        assert number < 150

    def test_tenants_of_one_weight_get_equal_tokens_however_many_requests_they_send(self):
        world = served(COSTLY, SLACK, [40], max_batch=2)
        for number in range(150):
            world.engine.submit(asked(f"many{number}", tokens=6, tenant="many", deadline_s=60.0))
        for number in range(20):
            world.engine.submit(asked(f"few{number}", tokens=6, tenant="few", deadline_s=60.0))
        while sum(name.startswith("few") for name in world.ends) < 20:
            world.step()
        many = sum(name.startswith("many") for name in world.ends)
        assert 15 <= many <= 25

    def test_tokens_that_are_computed_again_are_not_charged_again(self):
        world = served(COSTLY, SLACK, [8], host_blocks=0)
        for name in ("first", "last"):
            world.engine.submit(asked(name, tokens=20, tenant=name))
        while world.scheduler.recomputes == 0:
            world.step()
        last = world.scheduler.find("last")
        assert last.computed == 0
        charged = world.scheduler.state().levels["last"]
        while len(last.tokens) > last.computed + 1:
            world.step()
        assert world.scheduler.state().levels["last"] - charged <= 2 * 4  # a new block at most


@st.composite
def worlds(draw) -> Served:
    blocks_at = [draw(st.integers(2, 12))]
    for more in draw(st.lists(st.integers(0, 5), max_size=4)):
        blocks_at.append(blocks_at[-1] + more)
    return served(
        draw(st.sampled_from([LATENCY, COSTLY])),
        SLO(draw(st.sampled_from([1e-4, 5e-3, 2e-2, 10.0])), draw(st.sampled_from([0.05, 1.0]))),
        blocks_at,
        draw(st.integers(0, len(blocks_at) - 1)),
        host_blocks=draw(st.sampled_from([0, 3, 30])),
        block_copy_s=draw(st.sampled_from([1e-9, 1e-4, 1.0])),
        max_batch=draw(st.integers(1, 6)),
        salts=draw(st.sampled_from([None, Salts()])),
    )


class Histories(RuleBasedStateMachine):
    """Requests that begin alike come, go and are cancelled; k turns, copies fail, clocks jump."""

    @initialize(world=worlds())
    def make(self, world: Served) -> None:
        self.world = world
        self.asked: dict[str, Request] = {}
        self.cancelled: set[str] = set()

    @rule(
        prompt=st.integers(1, 30),
        tokens=st.integers(1, 30),
        common=st.integers(0, 30),
        text=st.sampled_from("pq"),
        tenant=st.sampled_from("ab"),
        priority=st.integers(0, 2),
    )
    def submit(self, prompt: int, tokens: int, **facts) -> None:
        most = self.world.scheduler.limits.max_tokens
        prompt = min(prompt, most - 1)
        tokens = min(tokens, most - prompt)
        name = str(len(self.asked))
        self.asked[name] = asked(name, prompt, tokens, **facts)
        self.world.engine.submit(self.asked[name])

    @rule(seconds=st.sampled_from([-1e6, -10.0, 10.0, 1e6]))
    def the_clock_jumps(self, seconds: float) -> None:
        self.world.clock.now_s += seconds

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: getattr(self, "asked", None))
    @rule(data=st.data())
    def cancel(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        if self.world.scheduler.find(name) is not None:
            self.world.engine.cancel(name)
            self.cancelled.add(name)

    @rule(data=st.data())
    def turn(self, data) -> None:
        self.world.engine.turn(data.draw(st.integers(0, self.world.executor.m)))

    @rule(copies=st.integers(1, 3))
    def break_the_link(self, copies: int) -> None:
        self.world.link.failing = copies

    @invariant()
    def every_block_is_free_or_has_its_owners(self) -> None:
        if hasattr(self, "world"):
            self.world.check_blocks()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.run()
        assert set(world.ends) == set(self.asked), "no request is lost"
        for name, request in self.asked.items():
            expected = expected_tokens(request)
            if name in self.cancelled:
                assert world.ends[name] is FinishReason.CANCELLED
                assert world.tokens[name] == expected[: len(world.tokens[name])]
            elif name in world.errors:
                assert isinstance(world.errors[name], OverloadedError)
                assert world.tokens[name] == [], "only those that were never let in are returned"
            else:
                assert world.ends[name] is FinishReason.LENGTH
                assert world.tokens[name] == expected
        assert world.executor.blocks.free_blocks == world.executor.blocks.blocks
        assert world.host.free_blocks == world.host.count


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase


@settings(deadline=None)
@given(worlds(), st.lists(st.integers(0, 2), min_size=2, max_size=12))
def test_whatever_the_classes_everyone_gets_the_tokens_asked_for(world, classes):
    requests = [
        asked(str(i), 3, 4, priority=rank, deadline_s=60.0) for i, rank in enumerate(classes)
    ]
    for each in requests:
        world.engine.submit(each)
    world.run(most=600)
    assert all(world.tokens[each.id] == expected_tokens(each) for each in requests)
