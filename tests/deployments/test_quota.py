"""Quotas: never more than a minute's worth ahead, nothing lost on the way, one sum for all."""

import math

import pytest
from clocks import Clock
from hypothesis import given
from hypothesis import strategies as st

from deployments.calls import Call, Message
from deployments.tenants.charges import Demand, Quotas, expected_tokens
from deployments.tenants.quota import Bucket, filled, part_of, taken, wait_s
from select_n_core.errors import QuotaError
from select_n_core.live import TenantConfig

amounts = st.floats(0, 1e6)


def tenant(requests: float | None = None, tokens: float | None = None, name: str = "a"):
    return TenantConfig(name=name, requests_per_minute=requests, tokens_per_minute=tokens)


def refusal(quotas: Quotas, who: TenantConfig, tokens: int = 1) -> QuotaError:
    with pytest.raises(QuotaError) as caught:
        quotas.charge(who, tokens)
    assert "\n" not in str(caught.value)
    return caught.value


class TestBucket:
    @given(
        st.floats(1, 1e4),
        st.lists(st.tuples(st.floats(0, 120), st.floats(0, 1)), min_size=1, max_size=60),
    )
    def test_no_window_sees_more_than_the_quota_and_a_minutes_worth(self, per_minute, asked):
        now_s, bucket, took = 0.0, Bucket(per_minute, 0.0), []
        for gap_s, share in asked:
            now_s += gap_s
            bucket = filled(bucket, per_minute, now_s)
            if wait_s(bucket, share * per_minute, per_minute) == 0:
                bucket = taken(bucket, share * per_minute, per_minute)
                took.append((now_s, share * per_minute))
        for first, (begin_s, _) in enumerate(took):
            total = 0.0
            for end_s, amount in took[first:]:
                total += amount
                assert total <= per_minute * (1 + (end_s - begin_s) / 60) * (1 + 1e-6)

    @given(st.floats(0.1, 1e6), st.floats(-2, 1), st.floats(0, 3))
    def test_after_the_wait_it_is_there_and_not_before(self, per_minute, level, share):
        bucket, amount = Bucket(level * per_minute, 5.0), share * per_minute
        waits_s = wait_s(bucket, amount, per_minute)
        assert wait_s(filled(bucket, per_minute, 5.0 + waits_s), amount, per_minute) == 0
        if waits_s > 1e-3:
            early = filled(bucket, per_minute, 5.0 + waits_s * 0.99)
            assert wait_s(early, amount, per_minute) > 0

    @given(st.floats(1, 1e4), st.floats(0, 1), st.floats(0, 1))
    def test_what_comes_back_never_fills_it_above_the_brim(self, per_minute, level, back):
        bucket = Bucket(level * per_minute, 0.0)
        again = taken(taken(bucket, back * per_minute, per_minute), -back * per_minute, per_minute)
        assert again.level == pytest.approx(bucket.level)
        assert taken(bucket, -2 * per_minute, per_minute).level == per_minute

    def test_a_smaller_quota_holds_at_once(self):
        assert filled(Bucket(100.0, 0.0), 10.0, 0.0).level == 10.0

    def test_a_clock_that_stands_still_fills_nothing(self):
        assert filled(Bucket(1.0, 9.0), 60.0, 3.0) == Bucket(1.0, 3.0)


class TestParts:
    @given(st.floats(1, 1e6), st.lists(amounts, min_size=1, max_size=8))
    def test_they_add_up_to_the_quota(self, quota, wants):
        parts = [part_of(quota, own, wants[:at] + wants[at + 1 :]) for at, own in enumerate(wants)]
        assert math.fsum(parts) == pytest.approx(quota)
        assert min(parts) >= 0

    @given(st.floats(1, 1e6), amounts, st.lists(amounts, max_size=8))
    def test_nobody_who_wants_an_even_part_gets_less(self, quota, own, others):
        even = quota / (1 + len(others))
        assert part_of(quota, own, others) >= min(own, even) * (1 - 1e-9)

    def test_alone_it_is_all(self):
        assert part_of(60, 0, ()) == 60

    def test_a_busy_ingress_borrows_what_an_idle_one_does_not_use(self):
        assert part_of(60, 100, (10,)) == 50
        assert part_of(60, 10, (100,)) == 10
        assert part_of(60, 0, (0, 0)) == 20


class TestCharges:
    def test_requests_run_out_and_come_back_with_time(self):
        clock = Clock()
        quotas, who = Quotas(clock=clock), tenant(requests=2)
        quotas.charge(who, 5)
        quotas.charge(who, 5)
        error = refusal(quotas, who)
        assert error.retry_after_s == pytest.approx(30)
        assert str(error) == "tenant a has used up its requests per minute"
        clock.now_s += 30
        quotas.charge(who, 5)
        refusal(quotas, who)

    def test_tokens_are_reserved_first_and_settled_by_what_was_used(self):
        quotas, who = Quotas(clock=Clock()), tenant(tokens=100)
        first = quotas.charge(who, 80)
        assert refusal(quotas, who, 30).retry_after_s == pytest.approx(6)
        first.settle(60)
        quotas.charge(who, 40)
        assert "its tokens per minute" in str(refusal(quotas, who, 1))

    def test_more_than_was_reserved_is_paid_for_afterwards(self):
        quotas, who = Quotas(clock=Clock()), tenant(tokens=100)
        quotas.charge(who, 50).settle(150)
        assert refusal(quotas, who, 10).retry_after_s == pytest.approx(36)

    def test_a_refused_request_takes_nothing(self):
        quotas, who = Quotas(clock=Clock()), tenant(requests=10, tokens=100)
        quotas.charge(who, 90)
        for _ in range(20):
            refusal(quotas, who, 20)
        for _ in range(9):
            quotas.charge(who, 1)

    def test_a_request_ends_once(self):
        quotas, who = Quotas(clock=Clock()), tenant(requests=2, tokens=100)
        charge = quotas.charge(who, 100)
        charge.refund()
        charge.settle(0)
        charge.refund()
        quotas.charge(who, 100)
        refusal(quotas, who, 1)

    def test_one_that_was_not_served_gives_its_request_back_too(self):
        quotas, who = Quotas(clock=Clock()), tenant(requests=1)
        quotas.charge(who, 5).refund()
        quotas.charge(who, 5).settle(0)
        refusal(quotas, who)

    def test_one_above_the_whole_quota_is_told_never_to_come_again(self):
        quotas, who = Quotas(clock=Clock()), tenant(tokens=100)
        error = refusal(quotas, who, 101)
        assert error.retry_after_s is None
        assert "lower max_tokens" in str(error)
        quotas.charge(who, 100)

    def test_without_a_quota_there_is_no_end(self):
        quotas = Quotas(clock=Clock())
        for _ in range(1000):
            quotas.charge(tenant(), 10**6)

    def test_tenants_do_not_pay_for_each_other(self):
        quotas = Quotas(clock=Clock())
        quotas.charge(tenant(requests=1), 1)
        quotas.charge(tenant(requests=1, name="b"), 1)

    def test_a_quota_that_changes_holds_at_once(self):
        quotas = Quotas(clock=Clock())
        for _ in range(3):
            quotas.charge(tenant(requests=100), 1)
        quotas.charge(tenant(requests=2), 1)
        quotas.charge(tenant(requests=2), 1)
        refusal(quotas, tenant(requests=2))
        quotas.charge(tenant(), 1)

    def test_two_ingresses_share_a_quota_by_what_they_are_asked_for(self):
        clock = Clock()
        busy = Quotas(lambda _: [calm.demands().get("a", Demand())], clock)
        calm = Quotas(lambda _: [busy.demands().get("a", Demand())], clock)
        who = tenant(requests=60)
        served = {"busy": 0, "calm": 0}
        for step in range(6000):
            clock.now_s += 0.1
            for name, quotas, every in (("busy", busy, 1), ("calm", calm, 60)):
                if step % every == 0:
                    try:
                        quotas.charge(who, 1)
                    except QuotaError:
                        continue
                    if step >= 1200:
                        served[name] += 1
        # Of eight minutes: what the calm one is asked for is let in, the rest is the busy one's.
        assert served["calm"] == 80
        assert 0.95 * 400 <= served["busy"] <= 1.02 * 400


class TestExpectation:
    def test_a_prompt_counts_once_and_every_choice_its_output(self):
        calls = [Call(str(n), "x" * 40, max_tokens=7) for n in range(3)]
        assert expected_tokens(calls, 3) == 10 + 3 * 7
        assert expected_tokens(calls, 1) == 3 * 10 + 3 * 7

    def test_ids_are_counted_text_is_guessed_and_no_limit_is_the_replicas(self):
        assert expected_tokens([Call("a", (1, 2, 3))], 1) == 3 + 256
        turns = (Message("system", "abcd"), Message("user", "abcde"))
        assert expected_tokens([Call("a", turns, max_tokens=1)], 1) == 3 + 1
        assert expected_tokens([Call("a", "\ud800", max_tokens=1)], 1) == 1 + 1
