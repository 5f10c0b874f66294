"""Prefixes: found again by whoever begins with the same tokens, in the same tenant's name."""

from array import array

import pytest
from fake_executor import BLOCK_TOKENS, Served, expected_tokens, served
from test_scheduler import COSTLY, SLACK, asked

from select_n_core.engine.messages import FinishReason, Request, SamplingParams
from select_n_core.errors import EngineError
from select_n_core.kv.names import Salts, extend
from select_n_core.slo import SLO

SALTS = Salts()


def names_of(tokens, tenant: str = "", block_tokens: int = 4) -> list[bytes]:
    names: list[bytes] = []
    extend(names, array("q", tokens), block_tokens, len(tokens) // block_tokens, SALTS.of(tenant))
    return names


class TestNames:
    def test_a_name_stands_for_all_tokens_up_to_its_blocks_end(self):
        first, second = names_of([1, 2, 3, 4, 5, 6, 7, 8])
        assert names_of([1, 2, 3, 4, 5, 6, 7, 8, 9]) == [first, second]
        assert names_of([1, 2, 3, 4, 5, 6, 7, 9])[0] == first
        assert names_of([1, 2, 3, 4, 5, 6, 7, 9])[1] != second
        assert second not in names_of([9, 2, 3, 4, 5, 6, 7, 8])
        assert names_of([5, 6, 7, 8])[0] not in (first, second)

    def test_names_may_be_told_bit_by_bit(self):
        tokens = list(range(12))
        names = names_of(tokens[:4])
        extend(names, array("q", tokens), 4, 3, SALTS.of(""))
        assert names == names_of(tokens)

    def test_another_tenant_has_other_names(self):
        assert not set(names_of(range(8))) & set(names_of(range(8), "a"))

    def test_every_tenant_of_every_engine_has_a_key_of_its_own(self):
        here, there = Salts(), Salts()
        of = [
            salts.of(tenant).digest()
            for salts in (here, there)
            for tenant in ("", "a", "b", "\ud800")
        ]
        assert len(set(of)) == len(of)
        assert here.of("a").digest() == of[1]

    def test_the_secret_is_not_shown(self):
        salts = Salts()
        assert salts._secret.hex() not in repr(salts) + str(vars(Salts))


def world(blocks: int = 40, latency=COSTLY, slo=SLACK, *, salts: Salts | None = None, **changes):
    return served(latency, slo, [blocks], salts=salts or Salts(), **changes)


def serve(world: Served, *requests: Request) -> None:
    """One after another."""
    for request in requests:
        world.engine.submit(request)
        world.run()
        assert world.tokens[request.id] == expected_tokens(request)


def hits(world: Served) -> tuple[int, int]:
    stats = world.engine.stats()
    return stats.prefix_hit_tokens, stats.prefix_queried_tokens


class TestHits:
    def test_what_was_computed_before_is_not_computed_again(self):
        of = world()
        serve(of, asked("a", prompt=20, text="t", common=16))
        before = of.executor.computed
        serve(of, asked("b", prompt=22, text="t", common=16, tokens=3))
        assert of.executor.computed - before == 22 - 16 + 2
        assert hits(of) == (16, 42)

    def test_the_last_token_of_a_prompt_is_always_computed(self):
        of = world()
        twice = [asked(name, prompt=16, text="t", common=16, tokens=1) for name in "ab"]
        serve(of, *twice)
        assert hits(of) == (12, 32)

    def test_an_answer_is_a_prefix_too(self):
        of = world()
        first = asked("a", prompt=10, tokens=11)
        serve(of, first)
        said = first.prompt + tuple(expected_tokens(first))
        serve(of, Request("b", (*said, 5), SamplingParams(max_tokens=3)))
        assert hits(of) == (20, 10 + 22)  # the last token of an answer is never computed

    def test_those_that_run_share_their_blocks(self):
        of = world()
        of.engine.submit(asked("a", prompt=20, text="t", common=20, tokens=20))
        of.step()
        before = of.executor.blocks.free_blocks
        of.engine.submit(asked("b", prompt=20, text="t", common=20, tokens=20))
        of.step()
        tables = [of.executor.blocks.table(name) for name in "ab"]
        assert tables[0][:4] == tables[1][:4]
        assert not set(tables[0][4:]) & set(tables[1][4:])
        assert before - of.executor.blocks.free_blocks <= 2
        of.engine.cancel("a")
        of.run()
        assert of.tokens["b"] == expected_tokens(
            asked("b", prompt=20, text="t", common=20, tokens=20)
        )

    def test_what_two_compute_at_the_same_time_is_kept_once(self):
        of = world()
        twice = [asked(name, prompt=12, text="t", common=12, tokens=9) for name in "ab"]
        for each in twice:
            of.engine.submit(each)
        of.step()
        of.step()
        tables = [of.executor.blocks.table(name) for name in "ab"]
        assert tables[0][:3] == tables[1][:3]
        assert of.executor.blocks.blocks - of.executor.blocks.free_blocks == 5
        of.run()
        assert all(of.tokens[each.id] == expected_tokens(each) for each in twice)

    def test_without_salts_nothing_is_kept_and_nothing_counted(self):
        of = served(COSTLY, SLACK, [40])
        serve(of, *(asked(name, prompt=20, text="t", common=16) for name in "ab"))
        assert hits(of) == (0, 0)
        assert of.engine.stats().kv_cached_tokens == 0

    def test_the_verdict_says_how_much_was_cached_and_no_other_output_does(self):
        of, outputs = world(), []
        for name in "ab":
            of.engine.submit(asked(name, prompt=9, text="t", common=8, tokens=2))
            while not of.engine.idle:
                outputs += of.engine.step().outputs
        assert [(each.request_id, each.cached_tokens) for each in outputs] == [
            *[("a", 0)] * 3,
            ("b", 8),
            *[("b", 0)] * 2,
        ]


class TestTenants:
    def test_nobody_finds_what_another_tenant_sent(self):
        of = world()
        serve(
            of,
            asked("a", prompt=20, text="t", common=20, tenant="a"),
            asked("b", prompt=20, text="t", common=20, tenant="b"),
            asked("nobody", prompt=20, text="t", common=20),
        )
        assert hits(of) == (0, 60)
        serve(of, asked("a2", prompt=20, text="t", common=20, tenant="a"))
        serve(of, asked("nobody2", prompt=20, text="t", common=20))
        assert hits(of) == (32, 100)

    def test_two_tenants_that_send_the_same_at_once_share_no_block(self):
        of = world()
        for name in "ab":
            of.engine.submit(asked(name, prompt=20, text="t", common=20, tenant=name))
        of.step()
        of.step()
        assert not of.executor.blocks._others
        of.run()

    def test_a_tenant_is_not_charged_for_what_is_not_computed(self):
        of = world()
        serve(of, asked("a", prompt=20, text="t", common=16, tenant="x"))
        of.engine.submit(asked("b", prompt=20, text="t", common=16, tokens=8, tenant="x"))
        of.engine.submit(asked("c", prompt=20, tokens=8, tenant="y"))
        before = of.scheduler.state().levels
        of.step()
        after = of.scheduler.state().levels
        assert (after["x"] - before["x"], after["y"] - before["y"]) == (4, 20)


class TestMemory:
    def test_what_is_cached_counts_as_free_and_is_there_for_whoever_needs_it(self):
        of = world(8, max_tokens=32)
        serve(of, asked("a", prompt=20, tokens=8))
        stats = of.engine.stats()
        assert (stats.kv_free_tokens, stats.kv_cached_tokens) == (32, 24)
        serve(of, asked("b", prompt=26, tokens=6))
        assert (of.scheduler.swaps, of.scheduler.recomputes) == (0, 0)
        assert of.engine.stats().kv_cached_tokens == 7 * BLOCK_TOKENS

    def test_the_least_recently_used_goes_first_and_the_end_before_the_beginning(self):
        of = world(8, max_tokens=32)
        old, new = (asked(name, prompt=13, tokens=1) for name in ("old", "new"))
        serve(of, old, new)  # three cached blocks each, two never used
        serve(of, Request("old2", old.prompt, SamplingParams(max_tokens=1)))  # used again
        serve(of, asked("large", prompt=13, tokens=3))
        serve(of, Request("new2", new.prompt, SamplingParams(max_tokens=1)))
        assert hits(of)[0] == 12 + 4

    def test_one_that_is_computed_again_finds_what_is_left_of_its_own(self):
        of = world(8, host_blocks=0)
        requests = [asked("first", tokens=20), asked("last", tokens=20)]
        for each in requests:
            of.engine.submit(each)
        while not of.scheduler.recomputes:
            of.step()
        again = of.scheduler.find("last")
        known = len(again.tokens) - 1
        while "last" not in of.scheduler.running:
            of.step()
        assert 0 < of.scheduler.find("last").named * BLOCK_TOKENS <= known
        of.run()
        assert hits(of) == (0, 12), "what one finds of its own is no hit of a prompt"
        for each in requests:
            assert of.tokens[each.id] == expected_tokens(each)

    def test_a_swapped_cache_comes_back_without_what_the_device_still_holds(self):
        of = world(8, host_blocks=20)
        requests = [asked("first", tokens=20), asked("last", tokens=20)]
        for each in requests:
            of.engine.submit(each)
        while not of.host.holds("last"):
            of.step()
        kept = len(of.host._kept["last"].blocks)
        before = of.link.counters.copies.total()
        of.engine.cancel("first")
        of.step()
        assert of.scheduler.find("last").named > 0
        assert of.link.counters.copies.total() - before == kept - of.scheduler.find("last").named
        of.run()
        assert of.tokens["last"] == expected_tokens(requests[1])

    def test_a_turn_of_k_drops_what_is_cached_where_weights_come_and_moves_none_of_it(self):
        of = served(COSTLY, SLACK, [4, 12], k=1, salts=Salts(), max_tokens=48)
        serve(of, asked("a", prompt=40, text="t", common=40, tokens=2))
        assert of.executor.blocks.cached_blocks == 10
        of.engine.turn(0)
        assert of.executor.moved == 0
        assert (of.executor.blocks.cached_blocks, of.executor.blocks.blocks) == (4, 4)
        of.engine.turn(1)
        serve(of, asked("b", prompt=40, text="t", common=40, tokens=2))
        assert hits(of) == (16, 80)

    def test_nobody_is_preempted_for_blocks_that_are_only_cached(self):
        of = served(COSTLY, SLACK, [8, 16], k=1, salts=Salts(), max_tokens=32)
        serve(of, asked("a", prompt=30, tokens=2))
        of.engine.submit(asked("b", prompt=20, tokens=10))
        of.step()
        of.engine.turn(0)
        assert list(of.scheduler.running) == ["b"]
        of.run()
        assert of.tokens["b"] == expected_tokens(asked("b", prompt=20, tokens=10))


class TestFailures:
    def test_nobody_goes_on_from_what_a_failed_request_computed(self):
        of = world()
        bad = asked("bad", prompt=21, text="t", common=20)
        of.executor.fails_on = expected_tokens(bad)[0]
        of.engine.submit(bad)
        of.run()
        assert isinstance(of.errors["bad"], EngineError)
        of.executor.fails_on = None
        serve(of, asked("good", prompt=21, text="t", common=20))
        assert hits(of) == (0, 42)

    def test_nor_from_what_stands_behind_it_in_blocks_of_others(self):
        of = world()
        serve(of, asked("before", prompt=29, text="t", common=28, tokens=1))
        good = asked("good", prompt=33, text="t", common=28, tokens=30)
        of.engine.submit(good)
        of.step()
        bad = asked("bad", prompt=21, text="t", common=20)
        of.executor.fails_on = expected_tokens(bad)[0]
        of.engine.submit(bad)
        of.step()
        of.step()
        assert isinstance(of.errors["bad"], EngineError)
        of.executor.fails_on = None
        found = hits(of)[0]
        serve(of, asked("after", prompt=33, text="t", common=28, tokens=2))
        assert hits(of)[0] == found
        of.run()
        assert of.tokens["good"] == expected_tokens(good)
        assert of.ends["good"] is FinishReason.LENGTH


class TestPromises:
    """A step of one row takes 4 ms, of 24 prompt tokens 33 ms."""

    @pytest.mark.parametrize("cached", [True, False])
    def test_one_comes_in_for_whose_whole_prompt_there_would_be_no_time(self, cached):
        of = world(60, slo=SLO(tpot_s=0.05, ttft_s=0.2), max_tokens=160, step_s=0.0)
        long = {"prompt": 120, "text": "t", "common": 118, "tokens": 4}
        if cached:
            serve(of, asked("a", **long))
        busy = asked("busy", prompt=60, tokens=4)
        of.engine.submit(busy)
        of.engine.submit(asked("b", **long))
        of.step()
        assert ("b" in of.scheduler.running) == cached

    @pytest.mark.parametrize("cached", [True, False])
    def test_the_budget_of_a_step_is_spent_on_what_is_left_of_a_prompt(self, cached):
        of = world(max_step_tokens=24)
        if cached:
            serve(of, asked("a", prompt=40, text="t", common=40))
        of.engine.submit(asked("b", prompt=40, text="t", common=40, tokens=3))
        of.engine.submit(asked("c", prompt=10, tokens=3))
        steps = 0
        while not (of.tokens.get("b") and of.tokens.get("c")):
            of.step()
            steps += 1
        assert steps == (1 if cached else 3)
        of.run()
