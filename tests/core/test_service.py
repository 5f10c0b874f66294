"""Who goes first: class within shares, then deadline, then fair in tokens; nobody starves."""

from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.service import ServiceOrder, ServicePolicy, TenantLedger

POLICY = ServicePolicy(quantum_s=0.1, patience_s=20.0, overtaken_s=1.0, share_tokens=100.0)


class Live(NamedTuple):
    id: str
    tenant: str = "a"
    priority: int = 0
    waited_s: float = 0.0
    slack_s: float = 1.0
    arrived_s: float = 0.0


def in_order(*live: Live, policy=POLICY, **levels: float) -> list[str]:
    return [each.id for each in sorted(live, key=ServiceOrder(policy, levels).key)]


class TestOrder:
    def test_the_higher_class_goes_first_however_urgent_the_others_are(self):
        assert in_order(Live("low", slack_s=-5), Live("high", priority=1)) == ["high", "low"]

    def test_a_tenant_above_its_share_yields_to_any_below_it(self):
        greedy, modest = Live("greedy", "a", priority=9), Live("modest", "b")
        assert in_order(greedy, modest, a=100, b=0) == ["greedy", "modest"]
        assert in_order(greedy, modest, a=101, b=0) == ["modest", "greedy"]

    def test_within_a_class_the_earlier_deadline_goes_first(self):
        assert in_order(Live("later", slack_s=0.9), Live("sooner", slack_s=0.5)) == [
            "sooner",
            "later",
        ]

    def test_deadlines_of_one_quantum_are_equal_and_the_less_served_tenant_goes_first(self):
        served, other = Live("served", "a", slack_s=0.51), Live("other", "b", slack_s=0.59)
        assert in_order(served, other, a=50, b=10) == ["other", "served"]

    def test_among_the_late_fairness_decides_at_once(self):
        very_late, late = Live("very", "a", slack_s=-50), Live("late", "b", slack_s=-1)
        assert in_order(very_late, late, a=50, b=10) == ["late", "very"]

    def test_between_equals_the_first_to_arrive_goes_first(self):
        assert in_order(Live("a", arrived_s=2), Live("b", arrived_s=1)) == ["b", "a"]

    def test_waiting_lifts_a_request_over_any_class_in_the_end(self):
        patient = Live("patient", waited_s=3 * POLICY.patience_s)
        assert in_order(patient, Live("high", priority=2)) == ["patient", "high"]
        assert in_order(patient, Live("higher", priority=4)) == ["higher", "patient"]

    def test_between_twins_the_one_given_first_goes_first(self):
        assert in_order(Live("b"), Live("a")) == ["b", "a"]

    def test_a_deadline_that_never_comes_is_no_trouble(self):
        assert in_order(Live("never", slack_s=float("inf")), Live("soon")) == ["soon", "never"]


lives = st.builds(
    Live,
    id=st.just("one"),
    tenant=st.sampled_from("abc"),
    priority=st.integers(-3, 3),
    waited_s=st.floats(0, 100),
    slack_s=st.floats(-10, 10),
    arrived_s=st.floats(0, 100),
)
levels = st.fixed_dictionaries({name: st.floats(0, 1000) for name in "abc"})


@given(lives, lives, levels)
def test_the_order_is_by_share_then_class_then_deadline(one, two, served):
    order = ServiceOrder(POLICY, served)
    first, second = sorted([one, two], key=order.key)
    above = [order.above_share(each.tenant) for each in (first, second)]
    assert above in ([False, False], [False, True], [True, True])
    if above[0] == above[1]:
        assert order.rank(first) >= order.rank(second)
        if order.rank(first) == order.rank(second):
            assert max(first.slack_s, 0) <= max(second.slack_s, 0) + POLICY.quantum_s


@given(lives, levels, st.floats(0, 100))
def test_waiting_longer_never_sets_a_request_back(one, served, more_s):
    order = ServiceOrder(POLICY, served)
    assert order.key(one._replace(waited_s=one.waited_s + more_s)) <= order.key(one)


@given(st.lists(lives, max_size=12), levels, st.integers(-4, 6))
def test_a_part_of_the_order_is_the_order_of_a_part(some, served, rank):
    order = ServiceOrder(POLICY, served)
    everyone = sorted(some, key=order.key)
    assert list(order.first_to_last(some)) == everyone
    assert list(order.last_to_first(some)) == everyone[::-1]
    lower = [each for each in some if order.rank(each) < rank]
    assert order.below(some, rank) == lower
    assert order.has_below(some, rank) == bool(lower)


class TestLedger:
    def test_a_newcomer_starts_at_the_least_level_of_the_active(self):
        ledger = TenantLedger()
        for name in "ab":
            ledger.join(name)
        ledger.charge("a", 300)
        ledger.charge("b", 120)
        ledger.join("new")
        assert ledger.levels() == {"a": 300, "b": 120, "new": 120}

    def test_idling_earns_no_credit_and_leaving_forgives_nothing(self):
        ledger = TenantLedger()
        for name in "ab":
            ledger.join(name)
        ledger.charge("a", 50)
        ledger.leave("a")
        ledger.charge("b", 20)
        ledger.join("a")
        assert ledger.levels() == {"a": 50, "b": 20}
        ledger.leave("a")
        ledger.charge("b", 500)
        ledger.join("a")
        assert ledger.levels() == {"a": 520, "b": 520}

    def test_after_an_idle_spell_everyone_starts_level(self):
        ledger = TenantLedger()
        ledger.join("a")
        ledger.charge("a", 80)
        ledger.leave("a")
        ledger.join("b")
        ledger.join("a")
        assert ledger.levels() == {"a": 80, "b": 80}

    def test_a_tenant_of_twice_the_weight_gets_twice_the_tokens(self):
        ledger = TenantLedger()
        ledger.join("heavy", 2.0)
        ledger.join("light")
        ledger.charge("heavy", 100)
        ledger.charge("light", 50)
        assert ledger.levels() == {"heavy": 50, "light": 50}

    def test_a_weight_holds_from_the_tenants_next_request_on(self):
        ledger = TenantLedger()
        ledger.join("a")
        ledger.charge("a", 100)
        ledger.join("a", 4.0)
        ledger.charge("a", 100)
        assert ledger.levels() == {"a": 125}
        ledger.leave("a")
        ledger.charge("a", 100)
        assert ledger.levels() == {"a": 150}

    def test_tenants_that_went_away_are_forgotten_once_that_changes_nothing(self):
        ledger = TenantLedger()
        ledger.join("stays")
        for number in range(1000):
            ledger.join(str(number))
            ledger.charge(str(number), 5)
            ledger.charge("stays", 10)
            ledger.leave(str(number))
        assert len(ledger._levels) < 10

    @given(st.lists(st.tuples(st.sampled_from("jlc"), st.sampled_from("abc"), st.integers(1, 90))))
    def test_levels_never_fall_and_only_the_live_have_one(self, events):
        ledger, live, before = TenantLedger(), {}, {}
        for kind, name, tokens in events:
            if kind == "j":
                ledger.join(name)
                live[name] = live.get(name, 0) + 1
            elif kind == "l" and live.get(name):
                ledger.leave(name)
                live[name] -= 1
            elif kind == "c" and live.get(name):
                ledger.charge(name, tokens)
            now = ledger.levels()
            assert set(now) == {name for name, count in live.items() if count}
            assert all(now[name] >= before.get(name, 0.0) for name in now)
            before |= now


@pytest.mark.parametrize("weights", [{}, {"a": 3.0}])
def test_serving_in_order_shares_tokens_by_weight_whatever_a_request_costs(weights):
    """The fairness bound: tenants with work drift apart by no more than the largest request."""
    policy = replace(POLICY, share_tokens=1e9)
    ledger = TenantLedger()
    cost = {"a": 7, "b": 60, "c": 23}
    served = dict.fromkeys(cost, 0.0)
    for name in cost:
        ledger.join(name, weights.get(name, 1.0))
    for _ in range(500):
        order = ServiceOrder(policy, ledger.levels())
        first = min((Live(name, name) for name in cost), key=order.key)
        ledger.charge(first.tenant, cost[first.tenant])
        served[first.tenant] += cost[first.tenant] / weights.get(first.tenant, 1.0)
    assert max(served.values()) - min(served.values()) <= max(cost.values())
