"""The engine on a tiny model: tokens equal transformers', and every request has its own end."""

import random
from dataclasses import replace

import pytest
import torch
from running import BLOCK_TOKENS, BLOCKS, LATENCY, Heard, greedy, request, running_engine
from test_online import BusOfOne
from tiny import EOS_TOKEN_ID
from virtual import VirtualClock

from select_n_core.decisions.bus import SHARED, Grant
from select_n_core.decisions.facts import Cause, Reason
from select_n_core.engine.messages import FinishReason, Output, Request, SamplingParams
from select_n_core.engine.online import OnlineModel
from select_n_core.errors import (
    ContextLengthError,
    EngineError,
    InputError,
    OverloadedError,
    RequestError,
)
from select_n_core.kv.names import Salts

torch.set_num_threads(1)


@pytest.fixture
def engine():
    with running_engine() as built:
        yield built
        assert built.idle


@pytest.fixture(scope="module")
def oracle():
    return greedy


@pytest.fixture
def heard(engine):
    return Heard(engine)


class TestTokens:
    @pytest.mark.parametrize("k", [0, 3, 6])
    def test_a_continuous_batch_yields_what_transformers_does_one_by_one(self, oracle, k):
        """Requests join at different steps, prompts go in chunks, and more wait than fit."""
        requests = [
            request(str(number), length, tokens, text=number, ignore_eos=True)
            for number, (length, tokens) in enumerate(
                [(5, 20), (60, 12), (1, 9), (33, 1), (24, 15), (90, 10), (16, 16)]
            )
        ]
        with running_engine(k) as engine:
            heard = Heard(engine)
            for asked in requests:
                engine.submit(asked)
                heard.step()
                heard.step()
            heard.run()
            for asked in requests:
                assert heard.tokens(asked.id) == oracle(asked)
                assert heard.finish(asked.id) is FinishReason.LENGTH
            stats = engine.stats()
            assert stats.streamed_units == pytest.approx(stats.iterations * k, abs=k)

    def test_the_first_output_is_the_verdict_then_come_tokens_one_by_one(self, engine, heard):
        engine.submit(request("a", tokens=3, ignore_eos=True))
        heard.run()
        assert [len(output.tokens) for output in heard.outputs["a"]] == [0, 1, 1, 1]
        assert heard.outputs["a"][0] == Output("a")

    def test_a_shared_prefix_is_computed_once_and_no_token_changes(self, oracle):
        first = request("first", 70, 20, text=1, common=60, ignore_eos=True)
        others = [request(str(n), 61 + n, 12, n, common=60, ignore_eos=True) for n in range(2, 6)]
        with running_engine(k_min=1, salts=Salts()) as engine:
            heard = Heard(engine)
            engine.submit(first)
            for _ in range(4):
                heard.step()
            for asked in others:
                engine.submit(asked)
            heard.run()
            for asked in [first, *others]:
                assert heard.tokens(asked.id) == oracle(asked)
            stats = engine.stats()
            assert stats.prefix_hit_tokens == 4 * 48
            assert [heard.outputs[each.id][0].cached_tokens for each in others] == [48] * 4
            assert stats.kv_free_tokens == stats.kv_tokens > stats.kv_cached_tokens > 0

    def test_a_seed_gives_the_same_tokens_in_other_company(self, engine, heard):
        drawn = {"temperature": 1.0, "seed": 7, "ignore_eos": True}
        engine.submit(request("alone", **drawn))
        heard.run()
        engine.submit(request("neighbour", 30, text=4))
        engine.submit(request("together", **drawn))
        engine.submit(request("other", **{**drawn, "seed": 8}))
        heard.run()
        assert heard.tokens("alone") == heard.tokens("together") != heard.tokens("other")

    def test_logprobs_come_with_the_tokens_of_those_who_asked(self, engine, heard):
        engine.submit(request("with", logprobs=2, ignore_eos=True))
        engine.submit(request("without", ignore_eos=True))
        heard.run()
        assert heard.tokens("with") == heard.tokens("without")
        for output in heard.outputs["with"][1:]:
            (logprob,) = output.logprobs
            assert logprob.top[0] == (output.tokens[0], logprob.logprob)
            assert len(logprob.top) == 2
        assert all(not output.logprobs for output in heard.outputs["without"])


class TestEnds:
    def test_an_end_of_sequence_token_ends_the_text_and_is_not_part_of_it(self, oracle):
        asked = request("a", tokens=12)
        expected = oracle(asked)
        stop = expected[5]
        with running_engine(eos=(EOS_TOKEN_ID, stop)) as engine:
            heard = Heard(engine)
            engine.submit(asked)
            engine.submit(Request("b", asked.prompt, SamplingParams(12, ignore_eos=True)))
            heard.run()
            assert heard.tokens("a") == expected[: expected.index(stop)]
            assert heard.finish("a") is FinishReason.STOP
            assert heard.tokens("b") == expected
            assert heard.finish("b") is FinishReason.LENGTH

    def test_a_stop_token_ends_only_the_request_that_named_it(self, engine, heard, oracle):
        plain = request("plain", tokens=12, ignore_eos=True)
        expected = oracle(plain)
        engine.submit(plain)
        engine.submit(request("stops", tokens=12, stop_token_ids=(expected[4],), ignore_eos=True))
        heard.run()
        assert heard.tokens("plain") == expected
        assert heard.tokens("stops") == expected[: expected.index(expected[4])]
        assert heard.finish("stops") is FinishReason.STOP

    def test_it_says_whom_it_has_heard_and_what_is_left(self, engine):
        engine.submit(replace(request("a"), sender="here", number=5))
        vacancy = engine.step().stats.vacancy
        assert vacancy.heard == {"here": 5}
        assert (vacancy.running, vacancy.waiting) == (1, 0)
        engine.submit(replace(request("a"), sender="there", number=1))  # refused, but heard
        assert engine.step().stats.vacancy.heard == {"here": 5, "there": 1}
        engine.cancel("a")
        engine.step()

    def test_a_cancelled_request_frees_its_blocks_at_once_and_says_so(self, engine, heard):
        engine.submit(request("a", tokens=100, ignore_eos=True))
        engine.submit(request("b", tokens=10, ignore_eos=True))
        for _ in range(4):
            heard.step()
        held = engine.executor.blocks.free_blocks
        engine.cancel("a")
        assert engine.executor.blocks.free_blocks == held + 1
        heard.run()
        assert heard.finish("a") is FinishReason.CANCELLED
        assert len(heard.tokens("b")) == 10

    def test_a_request_may_be_cancelled_before_it_ran(self, engine, heard):
        engine.submit(request("a"))
        engine.cancel("a")
        heard.run()
        assert [output.finish for output in heard.outputs["a"]] == [FinishReason.CANCELLED]

    def test_cancelling_nobody_is_no_event(self, engine, heard):
        engine.cancel("nobody")
        heard.run()
        assert heard.outputs == {}

    def test_aborting_ends_everyone_running_and_waiting_with_the_error(self, engine, heard):
        for number in range(6):
            engine.submit(request(str(number), tokens=50, ignore_eos=True))
        heard.step()
        assert engine.stats().waiting > 0
        error = EngineError("closing time")
        engine.abort(error)
        heard.run()
        assert {name: heard.error(name) for name in heard.outputs} == {
            str(number): error for number in range(6)
        }


class TestRefusals:
    def test_a_request_that_can_never_fit_is_told_the_limit(self, engine, heard):
        engine.submit(request("a", length=200, tokens=57))
        heard.run()
        assert isinstance(heard.error("a"), ContextLengthError)
        assert "is 257; this model serves at most 256 tokens" in str(heard.error("a"))

    def test_a_full_queue_turns_the_next_one_away_and_keeps_the_others(self, engine, heard):
        room = 4 + 8  # the batch and the queue
        for number in range(room + 1):
            engine.submit(request(str(number), tokens=2, ignore_eos=True))
        heard.run()
        assert isinstance(heard.error(str(room)), OverloadedError)
        assert heard.error(str(room)).reason == Reason.QUEUE
        assert heard.error(str(room)).retry_after_s > 0
        assert all(heard.finish(str(number)) is FinishReason.LENGTH for number in range(room))

    def test_the_verdict_comes_when_a_request_enters_and_before_the_step_is_computed(
        self, engine, monkeypatch
    ):
        told, seen_by_the_step = [], []
        step = engine.executor.step

        def looked_at(rows):
            seen_by_the_step.append([report.outputs for report in told])
            return step(rows)

        monkeypatch.setattr(engine.executor, "step", looked_at)
        for number in range(5):
            engine.submit(request(str(number), ignore_eos=True))
        report = engine.step(told.append)
        assert seen_by_the_step == [[tuple(Output(str(number)) for number in range(4))]]
        assert all(output.tokens for output in report.outputs)
        assert engine.stats().admitted == 4
        assert engine.stats().waiting == 1
        Heard(engine).run()
        assert engine.stats().admitted == 5

    def test_one_that_waits_too_long_is_returned_with_the_reason_and_costs_nobody_a_token(
        self, oracle
    ):
        now_s = [0.0]
        large, late = request("large", 100, 20, ignore_eos=True), request("late", 30)
        with running_engine(blocks=8, clock=lambda: now_s[0], expected_output=20) as engine:
            heard = Heard(engine)
            engine.submit(large)
            heard.step()
            engine.submit(late)
            heard.step()
            assert "late" not in heard.outputs
            now_s[0] += 10.0  # what the first token may take
            heard.run()
            (verdict,) = heard.outputs["late"]
            assert isinstance(verdict.error, OverloadedError)
            assert verdict.error.reason == Reason.KV
            assert verdict.error.retry_after_s > 0
            assert heard.tokens("large") == oracle(large)
            assert engine.stats().returned == {"kv": 1}

    def test_an_id_in_use_is_refused_and_its_owner_runs_on(self, engine, heard):
        engine.submit(request("a", tokens=4, ignore_eos=True))
        heard.step()
        engine.submit(request("a", tokens=4, ignore_eos=True))
        refusal, token = engine.step().outputs
        assert isinstance(refusal.error, RequestError)
        assert len(token.tokens) == 1
        heard.run()
        assert len(heard.tokens("a")) == 3
        assert heard.finish("a") is FinishReason.LENGTH

    def test_a_request_the_sampler_refuses_leaves_nothing_behind(self, engine, heard, monkeypatch):
        def refuse(asked: Request) -> None:
            raise RequestError(f"no sampling for {asked.id}", field="prompt")

        monkeypatch.setattr(engine._sampler, "add", refuse)
        engine.submit(request("a"))
        assert engine.scheduler.idle
        heard.run()
        assert heard.finish("a") is FinishReason.ERROR


class TestFailures:
    def test_a_forward_that_fails_on_one_request_ends_only_that_one(
        self, engine, heard, oracle, monkeypatch
    ):
        bad = request("bad", 30, 20, text=5)
        good = [request(str(n), 10 + n, 12, text=n, ignore_eos=True) for n in range(3)]
        step = engine.executor.step

        def fails_late(rows):
            if any(row.context > 32 and bad_block in row.blocks for row in rows):
                raise RuntimeError("a kernel did not like this row")
            return step(rows)

        for asked in [good[0], bad, *good[1:]]:
            engine.submit(asked)
        heard.step()
        bad_block = engine.executor.blocks.table("bad")[0]
        monkeypatch.setattr(engine.executor, "step", fails_late)
        heard.run()
        assert isinstance(heard.error("bad"), EngineError)
        assert str(heard.error("bad")) == "the forward failed: a kernel did not like this row"
        assert 0 < len(heard.tokens("bad")) < 20
        for asked in good:
            assert heard.tokens(asked.id) == oracle(asked)

    def test_nan_logits_of_one_request_end_only_that_one(self, engine, heard, oracle, monkeypatch):
        bad = request("bad", 20, 20, text=5)
        good = [request(str(n), 10 + n, 12, text=n, ignore_eos=True) for n in range(3)]
        step = engine.executor.step

        def poisoned(rows):
            logits = step(rows).clone()
            wanted = [row for row in rows if row.logits]
            for index, row in enumerate(wanted):
                if row.context > 22 and bad_block in row.blocks:
                    logits[index] = float("nan")
            return logits

        for asked in [good[0], bad, *good[1:]]:
            engine.submit(asked)
        heard.step()
        bad_block = engine.executor.blocks.table("bad")[0]
        monkeypatch.setattr(engine.executor, "step", poisoned)
        heard.run()
        assert isinstance(heard.error("bad"), EngineError)
        for asked in good:
            assert heard.tokens(asked.id) == oracle(asked)

    def test_one_failure_is_not_the_end_of_the_engine(self, engine, heard, oracle, monkeypatch):
        def fails(_rows):
            raise RuntimeError("once")

        with monkeypatch.context() as patch:
            patch.setattr(engine.executor, "step", fails)
            engine.submit(request("a"))
            heard.run()
        after = request("b", ignore_eos=True)
        engine.submit(after)
        heard.run()
        assert heard.finish("a") is FinishReason.ERROR
        assert heard.tokens("b") == oracle(after)


SWAP = {"host_blocks": 40}
# With time on the link dear, or no host blocks at all, everything is computed again.
WAYS = [SWAP, {"host_blocks": 40, "block_copy_s": 10.0}, {"host_blocks": 0}]


class TestPreemption:
    @pytest.mark.parametrize("way", WAYS)
    def test_tokens_are_the_same_when_blocks_run_out(self, oracle, way):
        requests = [
            request(str(number), 9 + number, 40, text=number, ignore_eos=True)
            for number in range(5)
        ]
        with running_engine(blocks=8, **way) as engine:
            heard = Heard(engine)
            for asked in requests:
                engine.submit(asked)
            heard.run()
            for asked in requests:
                assert heard.tokens(asked.id) == oracle(asked)
            stats = engine.stats()
            assert stats.recomputes + stats.swaps > 0
            assert (stats.swaps > 0) == (way == SWAP)

    @pytest.mark.parametrize("way", WAYS)
    def test_a_seed_goes_on_where_it_was(self, way):
        drawn = {"temperature": 1.0, "ignore_eos": True, "repetition_penalty": 1.2}
        requests = [request(str(n), 12, 40, text=n, seed=n, **drawn) for n in range(4)]
        found = []
        for facts in ({}, {"blocks": 7, **way}):
            with running_engine(**facts) as engine:
                heard = Heard(engine)
                for asked in requests:
                    engine.submit(asked)
                heard.run()
                found.append([heard.tokens(asked.id) for asked in requests])
                stats = engine.stats()
        assert stats.recomputes + stats.swaps > 0
        assert found[0] == found[1]

    def test_a_turn_of_k_takes_effect_at_once_and_costs_nobody_a_token(self, oracle):
        requests = [request(str(n), 20, 30, text=n, ignore_eos=True) for n in range(4)]
        with running_engine(6, k_min=1, blocks=6, **SWAP) as engine:
            heard = Heard(engine)
            for asked in requests:
                engine.submit(asked)
            for k in (6, 1, 6, 3, 1, 5):
                engine.turn(k)
                assert engine.stats().k == k
                for _ in range(6):
                    heard.step()
                    stats = engine.stats()
                assert stats.kv_tokens == len(engine.executor.layout.kv_ids(k)) * BLOCK_TOKENS
            assert engine.stats().swaps > 0
            heard.run()
            for asked in requests:
                assert heard.tokens(asked.id) == oracle(asked)

    def test_from_k_0_homes_are_lent_to_those_who_wait_and_go_back_and_no_token_changes(
        self, oracle
    ):
        requests = [request(str(n), 70, 24, text=n, ignore_eos=True) for n in range(4)]
        now_s = [0.0]
        with running_engine(0, k_min=0, blocks=20, clock=lambda: now_s[0], max_batch=8) as engine:
            heard, executor = Heard(engine), engine.executor
            assert executor.layout.blocks_at[0] // 6 == 3  # blocks of a request
            engine.scheduler.latency = replace(LATENCY, transfer_s=2.5e-4)  # k = 0 is faster
            now_s[0] = 1000.0  # it was calm for long
            for asked in requests:
                engine.submit(asked)
            turns, most = [], 0
            for _ in range(100):
                if not engine.scheduler.waiting and executor.k:
                    now_s[0] += 100.0  # it is calm for long, and nobody waits for KV
                report = engine.step()
                heard.hear(report)
                turns += [turn[1:] for turn in report.turned]
                most = max(most, len(engine.scheduler.running))
            assert engine.idle
            assert turns == [(0, 3, Cause.KV), (3, 0, Cause.SPARE)]
            assert most == 4
            assert engine.stats().recomputes == engine.stats().swaps == 0
            for asked in requests:
                assert heard.tokens(asked.id) == oracle(asked)

    def test_a_turn_out_of_range_is_refused_and_preempts_nobody(self):
        with running_engine(3, k_min=1, blocks=6) as engine:
            heard = Heard(engine)
            engine.submit(request("a", ignore_eos=True))
            heard.step()
            with pytest.raises(InputError, match="k must be between 1 and 6"):
                engine.turn(0)
            assert list(engine.scheduler.running) == ["a"]
            heard.run()

    @pytest.mark.parametrize("least", [0, 1])
    @pytest.mark.parametrize(
        ("salts", "seed"),
        [*((None, seed) for seed in range(2)), *((Salts(), seed) for seed in range(6))],
        ids=[*("alone-0", "alone-1"), *(f"sharing-{seed}" for seed in range(6))],
    )
    def test_parity_under_random_turns_preemptions_cancellations_and_failures(
        self, oracle, seed, least, salts, monkeypatch
    ):
        """Blocks are short, k jumps about, some are cancelled, one ends in a failing forward.

        With salts k moves before every step, and prompts begin alike: prefixes are shared, found
        again, given up and spoiled.
        """
        draw = random.Random(seed)
        restless = 0.3 if salts is None else 1.0
        bad = request("bad", 30, 20, text=99, common=20, ignore_eos=True)
        requests = {
            str(n): request(
                str(n),
                draw.randint(1, 60),
                draw.randint(1, 40),
                text=n,
                common=draw.choice([0, 20, 40]),
                ignore_eos=True,
            )
            for n in range(10)
        }
        cancelled = set()
        host_blocks = draw.choice([0, 4, 60])
        blocks = 7 if least else 13  # at k = 0 the ring takes twelve of them
        with running_engine(
            4, k_min=least, blocks=blocks, host_blocks=host_blocks, max_batch=6, salts=salts
        ) as engine:
            heard, step = Heard(engine), engine.executor.step

            def fails_on_the_bad_one(rows):
                blocks = engine.executor.blocks
                table = blocks.table("bad") if blocks.owned_blocks("bad") else None
                if any(row.blocks == table and row.context >= 30 for row in rows):
                    raise RuntimeError("a kernel did not like this row")
                return step(rows)

            monkeypatch.setattr(engine.executor, "step", fails_on_the_bad_one)
            left = [*requests.values(), bad]
            draw.shuffle(left)
            for _ in range(120):
                if left and draw.random() < 0.3:
                    engine.submit(left.pop())
                if draw.random() < restless:
                    engine.turn(draw.randint(least, 6))
                if draw.random() < 0.05:
                    name = draw.choice([*requests])
                    if engine.scheduler.find(name) is not None:
                        engine.cancel(name)
                        cancelled.add(name)
                heard.step()
            for asked in left:
                engine.submit(asked)
            heard.run()
            assert isinstance(heard.error("bad"), EngineError)
            assert engine.stats().swaps + engine.stats().recomputes > 0
            assert (engine.stats().prefix_hit_tokens > 0) == (salts is not None)
            for name, asked in requests.items():
                expected = oracle(asked)
                if name in cancelled:
                    assert heard.finish(name) is FinishReason.CANCELLED
                    assert heard.tokens(name) == expected[: len(heard.tokens(name))]
                else:
                    assert heard.tokens(name) == expected


class TestOnABus:
    def test_steps_of_one_that_others_need_the_bus_more_than_come_at_its_share(self):
        """Three of six layers streamed at one step per second are 3 units per second."""
        clock = VirtualClock()
        unit_bytes = 1000
        seat = BusOfOne(Grant(3 * unit_bytes * SHARED, 3 * unit_bytes * SHARED, 1e9))
        online = OnlineModel(LATENCY, 2, unit_bytes, seat, tpot_s=10.0)
        with running_engine(clock=clock, online=online, sleep=clock.sleep) as engine:
            began_s = clock()
            engine.submit(request("a", tokens=8))
            while not engine.idle:
                engine.step()
            assert clock() - began_s == pytest.approx(6.0, abs=1.0)  # of 8 steps, one came early
            assert engine.rest_s == 0, "who has nothing to do owes nothing"
            assert seat.heard[-1][0] > 0
            engine.step()
            assert seat.heard[-1][0] == 0, "an idle replica leaves the bus to others"


class TestStats:
    def test_they_count_what_is_there(self, engine, heard):
        idle = engine.stats()
        assert (idle.k, idle.interval) == (3, 2.0)
        assert idle.kv_free_tokens == idle.kv_tokens == BLOCKS * BLOCK_TOKENS
        assert idle.ttft_headroom is idle.tpot_headroom is None
        for number in range(5):
            engine.submit(request(str(number), ignore_eos=True))
        heard.step()
        busy = engine.stats()
        assert (busy.running, busy.waiting) == (4, 1)
        assert busy.kv_free_tokens == idle.kv_tokens - 3 * BLOCK_TOKENS, "24 tokens a step"
        heard.run()
        done = engine.stats()
        assert (done.running, done.waiting) == (0, 0)
        assert done.iterations > 8
        assert done.link_bytes >= done.streamed_units * engine.executor.memory.slot_bytes > 0
        assert done.ttft_headroom == done.tpot_headroom == 1.0

    def test_a_replica_that_returns_requests_has_no_headroom(self, engine, heard):
        for number in range(20):  # four run and eight may wait
            engine.submit(request(str(number)))
        heard.step()
        assert heard.finish("12") is FinishReason.ERROR
        assert engine.stats().ttft_headroom <= 0
        heard.run()
