"""Where requests go: drawn by room, nobody left out, and no herd on old reports."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.facts import Reason
from select_n_core.decisions.latency import ComputeModel, LatencyModel
from select_n_core.decisions.routing import Candidate, Need, Sent, judge, plan_course
from select_n_core.decisions.vacancy import Vacancy, levels_of

MS = 1e-3
LATENCY = LatencyModel(
    24, 4 * MS, ComputeModel(((1, 1 * MS), (256, 16 * MS)), 2e-8, 0.0, 1 * MS, 0.01 * MS)
)
KV_AT = ((4, 4000), (12, 8000))
NEED = Need(prompt_tokens=100, most_output=256, ttft_s=30.0, tpot_s=0.1, max_wait_s=1.0)
END = 164  # tokens of such a request in the end


def vacancy(latency: LatencyModel = LATENCY, kv_at=KV_AT, **facts) -> Vacancy:
    empty = Vacancy(
        levels=levels_of(latency, 2, kv_at, 16, 128),
        max_batch=16,
        max_step_tokens=128,
        expected_output=64,
        tpot_s=0.1,
    )
    return replace(empty, **facts)


def busy(requests: int, **facts) -> Vacancy:
    """A replica with so many like `NEED`."""
    running = min(requests, 16)
    load = {
        "running": running,
        "waiting": requests - running,
        "running_tokens": running * END,
        "waiting_tokens": (requests - running) * END,
        "least_priority": 0 if requests else None,
    }
    return vacancy(**(load | facts))


def first_of(candidates, need=NEED, affinity="", tries=600, seed=0) -> Counter:
    draw = random.Random(seed)
    courses = (plan_course(candidates, need, draw, affinity) for _ in range(tries))
    return Counter(course.prefer[0] for course in courses)


class TestOneReplica:
    def test_an_empty_one_has_room_for_a_whole_batch(self):
        judged = judge(vacancy(), Sent(), NEED)
        assert judged.reason is None
        assert judged.headroom == pytest.approx(16, rel=0.01)

    def test_headroom_falls_by_one_with_each_request_that_was_sent(self):
        rooms = [
            judge(busy(2), Sent(count, count * END, count * 100), NEED).headroom
            for count in range(6)
        ]
        assert rooms == pytest.approx([14, 13, 12, 11, 10, 9])

    def test_what_k_may_rise_to_counts_as_room(self):
        small = replace(NEED, prompt_tokens=4500, ttft_s=60.0)
        assert judge(vacancy(), Sent(), small).reason is None
        judged = judge(vacancy(kv_at=((4, 4000),)), Sent(), small)
        assert judged.reason is Reason.KV

    def test_but_not_where_steps_would_then_take_too_long(self):
        slow = replace(LATENCY, transfer_s=20 * MS)  # 240 ms at k = 12, 80 ms at k = 4
        small = replace(NEED, prompt_tokens=4500, ttft_s=60.0)
        assert judge(vacancy(slow), Sent(), NEED).reason is None
        assert judge(vacancy(slow), Sent(), small).reason is Reason.KV

    def test_a_full_batch_is_no_place(self):
        judged = judge(busy(16), Sent(), NEED)
        assert judged.reason is Reason.QUEUE
        assert 0 < judged.fits_in_s < 64 * 0.1

    def test_who_waits_comes_before(self):
        waits = judge(busy(20), Sent(), NEED)
        assert waits.fits_in_s > judge(busy(16), Sent(), NEED).fits_in_s
        assert waits.first_in_s == pytest.approx(judge(busy(16), Sent(), NEED).first_in_s, rel=0.25)

    def test_a_backlog_of_prompts_makes_a_first_token_late(self):
        judged = judge(busy(2, backlog_tokens=20_000), Sent(), replace(NEED, ttft_s=2))
        assert judged.reason is Reason.TTFT
        assert judged.fits_in_s > 0
        assert (
            judge(busy(2, backlog_tokens=20_000), Sent(), replace(NEED, ttft_s=60)).reason is None
        )

    def test_the_tightest_promise_to_anyone_binds(self):
        loose, tight = busy(8, tpot_s=0.1), busy(8, tpot_s=0.045)
        assert judge(tight, Sent(), NEED).headroom < judge(loose, Sent(), NEED).headroom
        own = judge(loose, Sent(), replace(NEED, tpot_s=0.045))
        assert own.headroom == judge(tight, Sent(), NEED).headroom
        sent = Sent(0, 0, 0, 0.045)
        assert judge(loose, sent, NEED).headroom == own.headroom

    def test_one_that_is_too_slow_even_alone_breaks_its_promise(self):
        slow = vacancy(replace(LATENCY, transfer_s=60 * MS))
        judged = judge(slow, Sent(), NEED)
        assert (judged.breaks, judged.reason) == (True, Reason.TPOT)

    def test_a_class_with_short_answers_has_more_room(self):
        few = vacancy(kv_at=((4, 1000),))
        short = replace(NEED, expected_output=4)
        assert judge(few, Sent(), short).headroom > judge(few, Sent(), NEED).headroom


class TestTheDraw:
    def test_each_is_first_as_often_as_it_has_room(self):
        firsts = first_of([Candidate("a", busy(4)), Candidate("b", busy(12))])
        assert firsts["a"] / 600 == pytest.approx(0.75, abs=0.06)

    def test_a_seed_gives_the_same_course(self):
        candidates = [Candidate(name, vacancy()) for name in "abcd"]
        one, same = (plan_course(candidates, NEED, random.Random(7)) for _ in range(2))
        assert one == same

    def test_a_full_one_comes_after_all_that_have_room(self):
        firsts = first_of([Candidate("full", busy(30)), Candidate("last place", busy(15))])
        assert firsts == {"last place": 600}

    def test_where_all_are_full_the_one_that_is_free_sooner_is_asked_rather(self):
        firsts = first_of([Candidate("long", busy(60)), Candidate("short", busy(17))])
        assert firsts["short"] > 3 * firsts["long"] > 0

    def test_one_that_breaks_its_promise_gets_a_few_to_show_that_it_is_well_again(self):
        slow = vacancy(replace(LATENCY, transfer_s=60 * MS))
        firsts = first_of([Candidate("slow", slow), Candidate("well", vacancy())], tries=3000)
        assert 0 < firsts["slow"] < 0.01 * 3000
        with_one = replace(slow, running=1, running_tokens=END)
        assert first_of([Candidate("slow", with_one), Candidate("well", busy(8))])["slow"] == 0

    def test_where_nobody_keeps_the_promise_room_decides_all_the_same(self):
        slow = replace(LATENCY, transfer_s=60 * MS)
        some, more = (
            vacancy(slow, running=running, running_tokens=running * END) for running in (4, 12)
        )
        firsts = first_of([Candidate("some", some), Candidate("more", more)])
        assert firsts["some"] / 600 == pytest.approx(0.75, abs=0.06)

    def test_an_old_report_and_none_at_all_come_last_and_who_drains_is_avoided(self):
        candidates = [
            Candidate("old", vacancy(), age_s=5.0),
            Candidate("new", None),
            Candidate("leaving", vacancy(), draining=True),
            Candidate("full", busy(40)),
        ]
        course = plan_course(candidates, NEED, random.Random(0))
        assert course.prefer[0] == "full"
        assert set(course.prefer[1:]) == {"old", "new"}
        assert course.avoid == ("leaving",)

    def test_a_session_stays_where_it_is_among_equals(self):
        candidates = [Candidate(name, vacancy()) for name in "abcd"]
        homes = {
            session: first_of(candidates, affinity=session, tries=20)
            for session in map(str, range(40))
        }
        assert all(len(firsts) == 1 for firsts in homes.values())
        used = Counter(home for firsts in homes.values() for home in firsts)
        assert set(used) == set("abcd")

    def test_and_moves_only_if_its_own_replica_leaves(self):
        names = "abcd"
        home = {
            each: next(
                iter(first_of([Candidate(n, vacancy()) for n in names], affinity=each, tries=1))
            )
            for each in map(str, range(40))
        }
        for session, at in home.items():
            left = [Candidate(name, vacancy()) for name in names if name != "d"]
            now = next(iter(first_of(left, affinity=session, tries=1)))
            assert now == at or at == "d"

    def test_a_session_is_no_reason_to_crowd_a_replica(self):
        candidates = [Candidate("a", busy(12)), Candidate("b", busy(4))]
        for session in "xyz":
            assert first_of(candidates, affinity=session)["b"] / 600 == pytest.approx(
                0.75, abs=0.06
            )


class TestTurningAway:
    def test_where_all_are_full_for_longer_than_one_may_wait(self):
        need = replace(NEED, max_wait_s=0.01)
        course = plan_course(
            [Candidate("a", busy(17)), Candidate("b", busy(18))], need, random.Random(0)
        )
        assert course.turned_away is not None
        assert course.turned_away.reason is Reason.QUEUE
        sooner = judge(busy(17), Sent(), need).fits_in_s
        assert course.turned_away.fits_in_s == pytest.approx(sooner)
        assert set(course.prefer) == {"a", "b"}

    @pytest.mark.parametrize(
        "other",
        [
            Candidate("b", busy(15)),
            Candidate("b", None),
            Candidate("b", busy(17), age_s=3.0),
            Candidate("b", busy(17, least_priority=-1)),
            Candidate("b", busy(16)),
            Candidate("b", vacancy(replace(LATENCY, transfer_s=60 * MS))),
        ],
        ids=["has room", "unknown", "old", "has a lower class", "has no queue", "slow and empty"],
    )
    def test_not_where_one_may_let_it_in(self, other):
        need = replace(NEED, max_wait_s=0.01)
        course = plan_course([Candidate("a", busy(17)), other], need, random.Random(0))
        assert course.turned_away is None

    def test_not_for_those_that_wait_before_it(self):
        need = replace(NEED, max_wait_s=1.0)
        course = plan_course([Candidate("a", busy(60))], need, random.Random(0))
        assert judge(busy(60), Sent(), need).fits_in_s > 2.0
        assert course.turned_away is None  # its tenant's share may put it first

    def test_not_for_one_that_fits_nowhere(self):
        huge = replace(NEED, prompt_tokens=100_000, max_wait_s=0.0)
        course = plan_course([Candidate("a", vacancy())], huge, random.Random(0))
        assert course.turned_away is None  # a replica says what is wrong with it


@st.composite
def candidates(draw):
    found = []
    for number in range(draw(st.integers(1, 8))):
        levels = draw(st.sampled_from([KV_AT, ((0, 100),), ((4, 0), (6, 10**6)), ((12, 4000),)]))
        latency = replace(LATENCY, transfer_s=draw(st.sampled_from([0.1 * MS, 4 * MS, 1.0])))
        load = draw(st.integers(0, 100))
        known = vacancy(
            latency,
            levels,
            running=min(load, 16),
            waiting=max(0, load - 16),
            running_tokens=draw(st.integers(0, 10**6)),
            waiting_tokens=draw(st.integers(0, 10**6)),
            backlog_tokens=draw(st.integers(0, 10**6)),
            least_priority=draw(st.none() | st.integers(-2, 2)),
            tpot_s=draw(st.sampled_from([1e-6, 0.05, 10.0])),
        )
        sent = Sent(
            draw(st.integers(0, 50)),
            draw(st.integers(0, 10**5)),
            draw(st.integers(0, 10**5)),
            draw(st.sampled_from([math.inf, 0.01])),
        )
        found.append(
            Candidate(
                f"r{number}",
                draw(st.sampled_from([known, known, known, None, replace(known, levels=())])),
                draw(st.sampled_from([0.0, 0.5, 9.0])),
                draw(st.booleans()),
                sent,
            )
        )
    return found


@given(
    candidates(),
    st.integers(1, 10**5),
    st.integers(1, 10**4),
    st.sampled_from([0.0, 1e-3, 1.0]),
    st.sampled_from(["", "session"]),
    st.integers(0, 9),
)
def test_everybody_who_lives_is_asked_once(found, prompt, output, max_wait_s, affinity, seed):
    need = Need(prompt, output, ttft_s=1.0, tpot_s=0.1, max_wait_s=max_wait_s)
    course = plan_course(found, need, random.Random(seed), affinity)
    asked = [*course.prefer, *course.avoid]
    assert sorted(asked) == sorted(each.name for each in found)
    if course.turned_away is not None:
        assert 0 <= course.turned_away.fits_in_s < math.inf
