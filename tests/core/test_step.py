"""One step's decision: who computes how many tokens now."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import Cause, Preemption, RequestFacts, StepState, Way
from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.decisions.pace import pace_of
from select_n_core.decisions.service import ServiceOrder, ServicePolicy
from select_n_core.decisions.step import plan_step

MS = 1e-3
# One token costs 1 ms over 10 units, 0.1 ms more for each that joins; a copy takes 2 ms.
MODEL = LatencyModel(
    units=10,
    transfer_s=2 * MS,
    streaming=ComputeModel(((1, 0.1 * MS), (257, 2.66 * MS)), 0.0, 0.0, 0.0, 0.0),
)
LATE = -1.0
LESS = (7, Cause.LINK)


SIZE = 16
POLICY = ServicePolicy(quantum_s=0.01, patience_s=20.0, overtaken_s=0.5, share_tokens=1000.0)


def decoding(
    name: str, slack_s: float = 10.0, context: int = 50, blocks: int = 4, **facts
) -> RequestFacts:
    return RequestFacts(name, context, 0, slack_s, blocks, **facts)


def prompting(name: str, left: int, computed: int = 0, blocks: int = 0, **facts) -> RequestFacts:
    return RequestFacts(name, computed, left, float("inf"), blocks, **facts)


def waiting(name: str, prompt: int = 10, expected: int = 0, **facts) -> RequestFacts:
    facts = {"slack_s": 1.0, **facts}
    return RequestFacts(name, 0, prompt, expected_tokens=expected or prompt, **facts)


def swapped(name: str, context: int, **facts) -> RequestFacts:
    facts = {"slack_s": 0.0, **facts}
    return RequestFacts(name, context, 0, in_host=True, **facts)


def cached(name: str, context: int, prompt: int, **facts) -> RequestFacts:
    """The cache holds `context` tokens of its prompt."""
    facts = {"slack_s": 1.0, "expected_tokens": prompt, **facts}
    return RequestFacts(name, context, prompt - context, **facts)


def state(running=(), waiting=(), **changes) -> StepState:
    facts = StepState(
        running=tuple(running),
        waiting=tuple(waiting),
        free_blocks=100,
        blocks=1000,
        block_tokens=SIZE,
        max_batch=8,
        max_step_tokens=64,
        least_chunk=16,
        k=0,
        slots=2,
        tpot_s=1.0,
        policy=POLICY,
        blocks_at=(1000,) * 20,
    )
    return replace(facts, **changes)


def plan(running=(), waiting=(), **changes):
    return plan_step(state(running, waiting, **changes), MODEL)


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


def test_prompts_get_their_tokens_in_service_order():
    old = prompting("old", 40, computed=64, blocks=4)
    assert rows([old], [waiting("new", prompt=500, slack_s=float("inf"), arrived_s=1.0)]) == {
        "old": 40,
        "new": 24,
    }
    assert rows([old], [waiting("new", prompt=60, priority=1)]) == {"new": 60, "old": 4}


def test_prompts_take_only_the_time_that_decoding_requests_can_spare():
    spare = rows([decoding("d", slack_s=4 * MS)], [waiting("p", prompt=60)])
    assert spare == {"d": 1, "p": 30}  # 1 ms for d, 0.1 ms for each of 30
    assert rows([decoding("d")], [waiting("p", prompt=60)]) == {"d": 1, "p": 60}


def test_the_tightest_request_sets_the_budget():
    assert rows([decoding("a"), decoding("b", slack_s=4.1 * MS)], [waiting("p", 60)])["p"] == 30


def test_a_late_request_that_can_catch_up_is_not_delayed_further():
    late = decoding("d", slack_s=LATE, most_tokens=60)
    assert rows([late], [waiting("p", prompt=60)]) == {"d": 1}


def test_one_whose_promise_is_lost_holds_up_nobody():
    late = decoding("d", slack_s=LATE, most_tokens=51)
    assert rows([late], [waiting("p", prompt=60)]) == {"d": 1, "p": 60}


def test_where_no_promise_can_be_kept_prompts_make_a_little_progress():
    late = decoding("d", slack_s=LATE, most_tokens=60)
    hopeless = {"tpot_s": MS / 2, "k": 0}
    assert rows([late], [waiting("p", prompt=60)], **hopeless) == {"d": 1, "p": 16}


def test_what_predictions_may_miss_by_is_kept_back():
    now = {"slack_s": 8 * MS}
    free = rows([decoding("d", **now)], [waiting("p", prompt=60)])["p"]
    assert 0 < rows([decoding("d", **now)], [waiting("p", prompt=60)], reserve=0.5)["p"] < free


def test_tokens_that_the_copies_hide_are_taken_even_when_promises_are_broken():
    taken = rows([decoding("d", slack_s=LATE)], [waiting("p", prompt=60)], k=5, least_chunk=1)
    free = pace_of(MODEL, 5, 2).free_tokens(StepShape(1, 50), 63)
    assert free > 16
    assert taken == {"d": 1, "p": min(60, free)}


def test_a_full_step_of_decoding_requests_leaves_no_room_and_takes_none():
    running = [decoding(str(number), slack_s=LATE) for number in range(8)]
    full = rows([*running, prompting("p", 10)], max_step_tokens=8, max_batch=9)
    assert "p" not in full
    assert sum(full.values()) == 8


class TestAdmission:
    def test_requests_come_in_in_order_while_places_and_blocks_last(self):
        queue = [waiting(name, prompt=40, arrived_s=index) for index, name in enumerate("abc")]
        assert plan(waiting=queue).admit == ("a", "b", "c")
        assert plan(waiting=queue, free_blocks=8).admit == ("a", "b")
        assert plan(waiting=queue, max_batch=2).admit == ("a", "b")
        assert plan([decoding("r")], queue, max_batch=2).admit == ("a",)

    def test_room_is_kept_for_the_answer_that_is_expected(self):
        queue = [waiting("a", prompt=16, expected=64)]
        assert plan([decoding("r")], queue, free_blocks=4).admit == ("a",)
        assert plan([decoding("r")], queue, free_blocks=3).admit == ()

    def test_room_is_kept_for_what_those_that_run_are_expected_to_become(self):
        queue = [waiting("a", prompt=16)]
        running = decoding("r", context=50, blocks=4, expected_tokens=100)
        assert plan([running], queue, free_blocks=4).admit == ("a",)
        assert plan([running], queue, free_blocks=3).admit == ()

    def test_one_that_is_alone_need_not_leave_room_for_anyone(self):
        queue = [waiting("a", prompt=16, expected=200), waiting("b", arrived_s=1)]
        assert plan(waiting=queue, free_blocks=1).admit == ("a",)

    def test_a_cached_prefix_is_not_computed_and_takes_its_blocks_at_once(self):
        decision = plan(waiting=[cached("c", 48, prompt=60)], free_blocks=4)
        assert (decision.admit, decision.rows) == (("c",), (("c", 12),))
        both = [cached("c", 48, prompt=60), waiting("w", prompt=40, arrived_s=1)]
        decision = plan([decoding("r", context=64, blocks=5)], both, free_blocks=7)
        assert dict(decision.rows) == {"r": 1, "c": 12, "w": 40}
        assert plan([decoding("r", context=64, blocks=5)], both, free_blocks=6).admit == ("c",)

    def test_blocks_that_others_own_need_not_be_free(self):
        running = decoding("r", context=64, blocks=5)
        queue = [cached("c", 48, prompt=60, shared=3)]
        assert plan([running], queue, free_blocks=1).admit == ("c",)
        assert plan([running], queue, free_blocks=0).admit == ()
        assert plan([running], [cached("c", 48, prompt=60, shared=2)], free_blocks=1).admit == ()

    def test_one_that_has_but_its_last_token_to_compute_decodes_from_the_next_step_on(self):
        recomputed = RequestFacts("c", 48, 0, slack_s=0.0, expected_tokens=60)
        decision = plan(waiting=[recomputed], free_blocks=4)
        assert (decision.admit, decision.rows) == (("c",), ())

    def test_a_small_one_passes_a_large_one_that_has_time(self):
        queue = [waiting("large", prompt=90), waiting("small", arrived_s=1)]
        assert plan([decoding("r")], queue, free_blocks=3).admit == ("small",)

    @pytest.mark.parametrize("facts", [{"slack_s": 0.4}, {"waited_s": 20.0}])
    def test_nobody_passes_one_that_is_due_soon_or_has_waited_long(self, facts):
        queue = [waiting("large", prompt=90, **facts), waiting("small", arrived_s=1)]
        assert plan([decoding("r", priority=9)], queue, free_blocks=3).admit == ()

    def test_nobody_comes_in_who_makes_steps_longer_than_promised(self):
        running = [decoding(str(number)) for number in range(4)]  # 1.3 ms a step
        assert plan(running, [waiting("a")], tpot_s=1.45 * MS).admit == ("a",)
        assert plan(running, [waiting("a")], tpot_s=1.35 * MS).admit == ()

    def test_where_even_one_row_takes_too_long_time_keeps_nobody_out(self):
        running = [decoding(str(number)) for number in range(4)]
        assert plan(running, [waiting("a")], tpot_s=0.5 * MS).admit == ("a",)

    def test_a_cache_in_host_memory_comes_back_during_the_step(self):
        decision = plan([decoding("r")], [swapped("s", 40)], free_blocks=10)
        assert decision.admit == ("s",)
        assert decision.rows == (("r", 1),)

    def test_its_blocks_are_not_given_to_prompts_of_the_same_step(self):
        queue = [swapped("s", 40, expected_tokens=41), waiting("p", prompt=30)]
        decision = plan(waiting=queue, free_blocks=5)
        assert decision.admit == ("s", "p")
        assert dict(decision.rows) == {"p": 30}
        assert plan(waiting=queue, free_blocks=4).admit == ("s",)

    def test_a_higher_class_takes_the_places_of_the_last_of_a_lower_one(self):
        running = [decoding("a", arrived_s=1), decoding("b", arrived_s=2)]
        decision = plan(running, [waiting("vip", priority=1)], max_batch=2)
        assert decision.preempt == (Preemption("b", Way.RECOMPUTE),)
        assert decision.admit == ("vip",)
        assert dict(decision.rows) == {"a": 1, "vip": 10}

    def test_it_takes_as_many_as_it_needs_blocks_of_and_no_more(self):
        running = [decoding(name, arrived_s=index) for index, name in enumerate("abc")]
        vip = waiting("vip", prompt=100, priority=1)
        decision = plan(running, [vip], free_blocks=0)
        assert [victim.id for victim in decision.preempt] == ["c", "b"]
        too_large = waiting("vip", prompt=300, priority=1)
        assert plan(running, [too_large], free_blocks=0).preempt == ()

    def test_equals_and_tenants_above_their_share_take_nobodys_place(self):
        running = [decoding("a", tenant="x")]
        assert plan(running, [waiting("b")], max_batch=1).preempt == ()
        greedy = waiting("b", priority=9, tenant="y")
        levels = {"x": 0.0, "y": 1001.0}
        assert plan(running, [greedy], max_batch=1, levels=levels).preempt == ()

    def test_one_that_waited_long_enough_takes_a_place_in_the_end(self):
        queue = [waiting("old", waited_s=20.0)]
        assert [each.id for each in plan([decoding("a")], queue, max_batch=1).preempt] == ["a"]


class TestBlocks:
    def test_everyone_who_decodes_gets_the_block_it_needs(self):
        full = [decoding(name, context=64, blocks=4) for name in "ab"]
        decision = plan(full, free_blocks=2)
        assert decision.preempt == ()
        assert dict(decision.rows) == {"a": 1, "b": 1}

    def test_the_last_in_service_order_gives_its_blocks_to_the_others(self):
        full = [decoding(name, context=64, blocks=4, priority=-i) for i, name in enumerate("abc")]
        decision = plan(full, free_blocks=1)
        assert [victim.id for victim in decision.preempt] == ["c"]
        assert dict(decision.rows) == {"a": 1, "b": 1}

    def test_shared_blocks_do_not_come_free_when_one_of_their_owners_leaves(self):
        full = [decoding(name, context=64, blocks=4, priority=-i) for i, name in enumerate("abc")]
        shared = {"b": 3, "c": 3}
        decision = plan(full, free_blocks=1, shared_of=lambda name: shared.get(name, 0))
        assert [victim.id for victim in decision.preempt] == ["c"]
        decision = plan(full, free_blocks=0, shared_of=lambda _: 4)
        assert [victim.id for victim in decision.preempt] == ["c", "b", "a"]

    def test_what_one_shares_with_those_it_evicts_must_be_free_for_it(self):
        running = [decoding("r", context=64, blocks=5)]
        vip = cached("vip", 48, prompt=64, shared=3, priority=1)
        assert plan(running, [vip], free_blocks=1).preempt == ()
        taken = plan(running, [vip], free_blocks=0)
        assert ([victim.id for victim in taken.preempt], taken.admit) == (["r"], ("vip",))
        larger = replace(vip, prompt_left=33, expected_tokens=81)
        assert plan(running, [larger], free_blocks=0).preempt == ()

    def test_it_may_be_the_one_that_needs_a_block_itself(self):
        roomy, full = decoding("a", priority=1), decoding("b", context=64, blocks=4)
        decision = plan([roomy, full], free_blocks=0)
        assert [victim.id for victim in decision.preempt] == ["b"]
        assert dict(decision.rows) == {"a": 1}

    def test_who_makes_room_is_not_let_in_again_at_once_nor_is_anyone_else(self):
        full = [decoding(name, context=64, blocks=4) for name in "ab"]
        assert plan(full, [waiting("w", prompt=1)], free_blocks=0).admit == ()

    def test_a_prompt_is_cut_to_the_blocks_that_are_left(self):
        half = prompting("p", left=60, computed=16, blocks=1)
        assert rows([half], free_blocks=2) == {"p": 32}
        full = decoding("d", context=64, blocks=4)
        assert rows([full, half], free_blocks=2) == {"d": 1, "p": 16}

    def test_a_prompt_without_a_block_waits_for_those_who_decode(self):
        stuck = prompting("p", left=60, computed=16, blocks=1)
        decision = plan([decoding("d"), stuck], free_blocks=0)
        assert (decision.preempt, decision.rows) == ((), (("d", 1),))

    def test_where_only_prompts_are_stuck_the_last_makes_room_for_the_first(self):
        stuck = [
            prompting(name, left=60, computed=16, blocks=1, arrived_s=index)
            for index, name in enumerate("abc")
        ]
        decision = plan(stuck, free_blocks=0)
        assert [victim.id for victim in decision.preempt] == ["c"]
        assert dict(decision.rows) == {"a": 16}

    def test_one_that_can_never_fit_is_told_so_and_holds_up_nobody(self):
        queue = [waiting("huge", prompt=200), waiting("b", arrived_s=1)]
        decision = plan([decoding("r")], queue, blocks=10)
        assert (decision.fail, decision.admit) == (("huge",), ("b",))

    def test_as_long_as_k_can_give_it_room_it_is_not_hopeless(self):
        queue = [waiting("huge", prompt=200)]
        decision = plan(waiting=queue, blocks=10, free_blocks=10, k=3, k_up=5)
        assert (decision.fail, decision.admit, decision.change) == ((), (), (5, Cause.KV))

    def test_room_that_is_on_its_way_is_waited_for(self):
        decision = plan(waiting=[waiting("w", prompt=160)], blocks=10, free_blocks=4, k=3, k_up=5)
        assert (decision.fail, decision.admit, decision.change) == ((), (), None)


class TestPace:
    """10 units: 1 ms a step for a row, 0.1 ms more for the next; at k = 8 copies take 16 ms."""

    def test_a_step_in_time_changes_nothing(self):
        decision = plan([decoding("d")], k=8)
        assert (decision.change, decision.missed, decision.preempt) == (None, False, ())

    def test_on_a_predicted_miss_a_unit_comes_home(self):
        decision = plan([decoding("d", slack_s=15 * MS)], k=8, tpot_s=15 * MS)
        assert (decision.change, decision.missed, decision.preempt) == (LESS, True, ())

    def test_one_late_token_is_no_miss_while_steps_are_faster_than_promised(self):
        decision = plan([decoding("d", slack_s=1 * MS)], k=8, tpot_s=17 * MS)
        assert (decision.change, decision.missed, decision.preempt) == (None, False, ())

    def test_slower_steps_than_promised_are_no_miss_while_everyone_has_slack(self):
        decision = plan([decoding("d", slack_s=100 * MS)], k=8, tpot_s=15 * MS)
        assert (decision.change, decision.missed, decision.preempt) == (None, False, ())

    def test_fewer_prompt_tokens_come_first(self):
        decision = plan([decoding("d", slack_s=17 * MS)], [waiting("p", prompt=500)], k=8)
        assert (decision.change, decision.missed) == (None, False)
        assert dict(decision.rows)["p"] < 500

    def test_one_that_is_late_already_catches_up_by_itself_if_steps_are_fast_enough(self):
        late = decoding("d", slack_s=LATE)
        assert plan([late], k=8, tpot_s=17 * MS).change is None
        assert plan([late], k=8, tpot_s=15 * MS).change == LESS

    def test_k_stays_at_its_least(self):
        assert plan([decoding("d", slack_s=15 * MS)], k=8, k_min=8, tpot_s=15 * MS).change is None

    def test_no_unit_comes_home_that_does_not_make_steps_faster(self):
        many = [decoding(str(number), slack_s=MS) for number in range(60)]  # 6.9 ms of compute
        assert plan(many, k=3, max_batch=60, tpot_s=6 * MS).change is None
        assert plan(many, k=4, max_batch=60, tpot_s=6 * MS).change == (3, Cause.LINK)

    def test_no_unit_comes_home_that_takes_the_room_somebody_will_need(self):
        late = decoding("d", slack_s=15 * MS, most_tokens=160)
        slow = {"k": 8, "tpot_s": 15 * MS}
        assert plan([late], **slow, blocks_at=(10,) * 9).change == LESS
        assert plan([late], **slow, blocks_at=(9,) * 9).change is None
        other = [waiting("w", prompt=20, most_tokens=177)]
        assert plan([late], other, **slow, blocks_at=(11,) * 9).change is None

    def test_at_the_least_k_the_last_go_so_that_the_others_are_in_time(self):
        running = [decoding(str(number), slack_s=MS, priority=-number) for number in range(5)]
        decision = plan(running, tpot_s=1.25 * MS)
        assert [victim.id for victim in decision.preempt] == ["3", "4"]
        assert dict(decision.rows) == {"0": 1, "1": 1, "2": 1}

    def test_nobody_goes_for_a_miss_that_will_pass(self):
        running = [decoding(str(number), slack_s=MS) for number in range(5)]
        decision = plan(running, tpot_s=1.45 * MS)
        assert (decision.missed, decision.preempt) == (False, ())

    def test_nobody_goes_where_even_one_alone_would_be_late(self):
        running = [decoding(str(number), slack_s=MS) for number in range(5)]
        assert plan(running, tpot_s=0.9 * MS).preempt == ()

    def test_one_turn_brings_home_as_many_units_as_the_promise_takes(self):
        decision = plan([decoding("d", slack_s=9 * MS)], k=8, tpot_s=9 * MS)
        assert decision.change == (4, Cause.LINK)

    def test_where_no_k_keeps_the_promise_the_fastest_is_taken(self):
        decision = plan([decoding("d", slack_s=MS)], k=8, k_min=3, tpot_s=MS / 2)
        assert decision.change == (3, Cause.LINK)

    def test_a_home_is_lent_to_those_who_wait_for_kv_in_a_calm_while(self):
        queue = [waiting("w", prompt=100)]
        calm = {"free_blocks": 2, "k": 3, "k_up": 4, "calm_s": 10.0, "dwell_s": 2.0}
        assert plan([decoding("d")], queue, **calm).change == (4, Cause.KV)
        assert plan([decoding("d")], queue, **{**calm, "calm_s": 9.9}).change is None
        assert plan([decoding("d")], queue, **{**calm, "dwell_s": 1.9}).change is None
        assert plan([decoding("d")], queue, **{**calm, "k_up": None}).change is None
        assert plan([decoding("d")], queue, **{**calm, "free_blocks": 7}).change is None
        assert plan([decoding("d")], queue, **calm, tpot_s=8.2 * MS).change is None
        assert plan([decoding("d")], queue, **calm, max_batch=1).change is None

    def test_no_home_is_lent_where_more_requests_at_a_time_serve_fewer_per_second(self):
        running = [decoding(str(number)) for number in range(6)]
        calm = {"free_blocks": 2, "calm_s": 10.0, "dwell_s": 2.0, "tpot_s": 100 * MS}
        queue = [waiting("w", prompt=100, expected=2000)]
        assert plan(running, queue, **calm, k=8, k_up=9).change == (9, Cause.KV)  # 7/6 > 9/8
        assert plan(running, queue, **calm, k=8, k_up=10).change is None  # 7/6 < 10/8

    def test_no_home_is_lent_where_prompts_would_not_find_the_time(self):
        calm = {"free_blocks": 2, "calm_s": 10.0, "dwell_s": 2.0, "k": 3, "k_up": 4}
        short = [waiting("w", prompt=100, expected=110)]  # 20 prompt tokens a step: 3.1 ms
        assert plan([decoding("d")], short, **calm, tpot_s=9 * MS).change == (4, Cause.KV)
        shorter = [waiting("w", prompt=100, expected=102)]  # 100 of them: 11.1 ms
        assert plan([decoding("d")], shorter, **calm, tpot_s=9 * MS).change is None

    def test_what_nobody_needs_goes_back_after_a_while_if_steps_gain_by_it(self):
        spare = {"k": 6, "blocks": 100, "free_blocks": 96, "dwell_s": 20.0}
        assert plan([decoding("d")], **spare).change == (5, Cause.SPARE)
        assert plan([decoding("d")], **{**spare, "dwell_s": 19.0}).change is None
        assert plan([decoding("d")], **spare, k_min=6).change is None
        assert plan([decoding("d")], **spare, blocks_at=(4,) * 7).change is None
        wants_kv = [waiting("w", prompt=1560)]  # 98 of the 96 blocks that are free
        assert plan([decoding("d")], wants_kv, **spare).change is None
        assert plan([decoding("d")], **{**spare, "k": 0}).change is None
        assert plan([], **spare).change is None


@st.composite
def states(draw):
    max_batch = draw(st.integers(1, 12))
    count = draw(st.integers(0, max_batch))
    common = {
        "tenant": st.sampled_from("xyz"),
        "priority": st.integers(0, 2),
        "waited_s": st.floats(0, 60),
        "arrived_s": st.floats(0, 100),
    }
    running, shared = [], {}
    for number in range(count):
        context = draw(st.integers(0, 300))
        left = draw(st.one_of(st.just(0), st.integers(1, 200)))
        blocks = -(-context // SIZE) + draw(st.integers(0, 1))
        facts = {name: draw(value) for name, value in common.items()}
        shared[f"r{number}"] = draw(st.integers(0, context // SIZE))
        expected = context + max(1, left) + draw(st.integers(0, 100))
        running.append(
            RequestFacts(
                f"r{number}",
                context,
                left,
                draw(st.floats(-1, 1)),
                blocks,
                expected,
                expected + draw(st.integers(0, 50)),
                **facts,
            )
        )
    queue = []
    for number in range(draw(st.integers(0, 6))):
        context = draw(st.one_of(st.just(0), st.integers(1, 300)))
        facts = {name: draw(value) for name, value in common.items()}
        facts["in_host"] = context > 0 and draw(st.booleans())
        if not facts["in_host"]:
            context -= context % SIZE
        facts["shared"] = draw(st.integers(0, context // SIZE)) if running else 0
        left = draw(st.integers(0 if context else 1, 300))
        expected = context + max(1, left) + draw(st.integers(0, 100))
        queue.append(
            RequestFacts(f"w{number}", context, left, draw(st.floats(-1, 1)), 0, expected, **facts)
        )
    cached = [each.context_tokens // SIZE - each.shared for each in queue if not each.in_host]
    free = max([draw(st.integers(0, 40)), *cached])
    k = draw(st.integers(0, 10))
    return StepState(
        running=tuple(running),
        waiting=tuple(queue),
        free_blocks=free,
        blocks=free + sum(request.blocks for request in running),
        block_tokens=SIZE,
        max_batch=max_batch,
        max_step_tokens=draw(st.integers(max_batch, 256)),
        least_chunk=draw(st.integers(1, 64)),
        k=k,
        slots=draw(st.integers(1, 3)),
        tpot_s=draw(st.floats(1e-3, 1)),
        policy=POLICY,
        k_min=draw(st.integers(0, k)),
        k_up=draw(st.integers(k + 1, 10)) if k < 10 and draw(st.booleans()) else None,
        blocks_at=tuple(sorted(draw(st.lists(st.integers(0, 60), min_size=11, max_size=11)))),
        host_blocks=draw(st.integers(0, 60)),
        block_copy_s=draw(st.floats(0, 1e-2)),
        calm_s=draw(st.floats(0, 20)),
        dwell_s=draw(st.floats(0, 40)),
        reserve=draw(st.floats(0, 0.5)),
        levels={name: draw(st.floats(0, 3000)) for name in "xyz"},
        shared_of=shared.__getitem__,
    )


def left_of(now: StepState, decision) -> list[RequestFacts]:
    gone = {victim.id for victim in decision.preempt}
    return [request for request in now.running if request.id not in gone]


@given(states(), st.data())
def test_a_batch_that_some_leave_is_the_batch_of_those_who_stay(now, data):
    leaving = data.draw(st.lists(st.sampled_from(now.running), unique=True)) if now.running else []
    staying = [each for each in now.running if each not in leaving]
    left, fresh = Batch(now.running, now).without(leaving, now), Batch(staying, now)
    for name in Batch.__slots__:
        assert getattr(left, name) == getattr(fresh, name), name


@settings(deadline=None)
@given(states())
def test_a_step_never_breaks_its_limits_and_never_forgets_who_decodes(now):
    decision = plan_step(now, MODEL)
    taken = dict(decision.rows)
    assert len(taken) == len(decision.rows)
    assert sum(taken.values()) <= now.max_step_tokens

    staying = left_of(now, decision)
    decoders = [request.id for request in staying if not request.prompt_left]
    assert sorted(name for name, _ in decision.rows[: len(decoders)]) == sorted(decoders)
    assert all(taken[name] == 1 for name in decoders)
    assert len(staying) + len(decision.admit) <= now.max_batch

    queue = {request.id: request for request in now.waiting}
    assert set(decision.admit) | set(decision.fail) <= set(queue)
    assert not set(decision.admit) & set(decision.fail)
    left = {r.id: r.prompt_left for r in staying if r.prompt_left}
    left |= {name: queue[name].prompt_left for name in decision.admit}
    assert all(0 < taken[name] <= left[name] for name in taken if name not in decoders)
    assert set(taken) <= {*decoders, *left}


@settings(deadline=None)
@given(states())
def test_the_blocks_that_a_step_takes_are_there(now):
    decision = plan_step(now, MODEL)
    facts = {request.id: request for request in (*now.running, *now.waiting)}
    free = now.free_blocks + sum(now.freed_by(facts[victim.id]) for victim in decision.preempt)
    need = sum(now.blocks_of(facts[name].context_tokens) for name in decision.admit)
    if not decision.preempt:  # what is shared with one that leaves may be among what comes free
        need -= sum(facts[name].shared for name in decision.admit)
    for name, tokens in decision.rows:
        request = facts[name]
        owned = request.blocks or (name in decision.admit and now.blocks_of(request.context_tokens))
        need += max(0, now.blocks_of(request.context_tokens + tokens) - owned)
    assert need <= free
    swaps = [victim.id for victim in decision.preempt if victim.way is Way.SWAP]
    assert sum(now.blocks_of(facts[name].context_tokens) for name in swaps) <= now.host_blocks


@settings(deadline=None)
@given(states())
def test_whenever_somebody_is_there_a_step_gets_somebody_on(now):
    decision = plan_step(now, MODEL)
    if not now.running and not now.waiting:
        return
    moves = decision.rows or decision.admit or decision.fail or decision.preempt
    assert moves or decision.change is not None


@settings(deadline=None)
@given(states(), st.floats(0, 1))
def test_more_than_a_little_progress_is_only_made_in_time_or_for_free(now, slack_s):
    now = replace(now, running=tuple(replace(r, slack_s=slack_s) for r in now.running))
    decision = plan_step(now, MODEL)
    taken = dict(decision.rows)
    decoders = [r for r in left_of(now, decision) if not r.prompt_left]
    prompt_tokens = sum(taken.values()) - len(decoders)
    if not decoders or prompt_tokens <= now.least_chunk:
        return
    shape = StepShape(len(decoders), sum(r.context_tokens for r in decoders))
    free_s = MODEL.iteration_s(shape, now.k, now.slots) * 1.03
    took_s = MODEL.iteration_s(shape.with_chunk(0, prompt_tokens), now.k, now.slots)
    assert took_s <= max(slack_s * 1.001, free_s) + 1e-6


@settings(deadline=None)
@given(states())
def test_nobody_gives_way_to_one_behind_it(now):
    """Whoever is preempted stands behind everyone that stays, or behind a class that came in."""
    decision = plan_step(now, MODEL)
    order = ServiceOrder(now.policy, now.levels)
    gone = {victim.id for victim in decision.preempt}
    victims = [request for request in now.running if request.id in gone]
    staying = left_of(now, decision)
    came = [request for request in now.waiting if request.id in decision.admit]
    if not victims:
        return
    if came:
        assert max(map(order.rank, came)) > max(map(order.rank, victims))
        lowest = [each for each in staying if order.rank(each) < max(map(order.rank, came))]
    else:
        lowest = staying
    assert all(order.key(one) <= order.key(two) for one in lowest for two in victims)


def test_two_equal_states_get_the_same_decision():
    now = state([decoding("d"), prompting("p", 9)], [waiting("w")])
    assert plan_step(now, MODEL) == plan_step(replace(now), MODEL)


@pytest.mark.parametrize("k", [0, 3, 10])
def test_the_budget_counts_what_streaming_takes(k):
    spare = rows([decoding("d", slack_s=21 * MS)], [waiting("p", prompt=60)], k=k, least_chunk=1)
    took_s = MODEL.iteration_s(StepShape(1, 50).with_chunk(0, spare["p"]), k, 2)
    assert took_s <= 21 * MS
