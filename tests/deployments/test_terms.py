"""Terms: a tenant's class, and headers that may lower it but never raise it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from deployments.calls import Terms
from deployments.tenants.gate import Caller
from deployments.tenants.terms import terms_of
from select_n_core.errors import RequestError
from select_n_core.live import LivePolicy, TenantConfig, parse_policy
from select_n_core.slo import SLO

OWN = SLO(tpot_s=0.1, ttft_s=2.0)
CLASSES = {
    "gold": {"tpot": "100ms", "ttft": "1s", "priority": 10, "max_wait": "300ms"},
    "plain": {"tpot": "200ms", "ttft": "3s", "max_queue": 8},
    "batch": {"tpot": "1s", "ttft": "60s", "priority": -5, "max_queue": 20},
    "eager": {"tpot": "5ms", "ttft": "9s"},
}


def policy(**fields) -> LivePolicy:
    return parse_policy({"classes": CLASSES, **fields})


def terms(slo_class: str | None = None, own: SLO = OWN, **headers: str) -> Terms:
    caller = Caller(TenantConfig(name="acme", slo_class=slo_class, weight=3), policy())
    named = {f"x-selectn-{name}": value for name, value in headers.items()}
    return terms_of(caller, Headers(named), own)


def test_without_classes_the_replicas_own_targets_hold():
    assert terms_of(Caller(None, LivePolicy()), Headers(), OWN) == Terms()
    assert terms() == Terms(tenant="acme", weight=3)


def test_a_tenant_has_its_class():
    assert terms("gold") == Terms(
        tenant="acme", weight=3, slo_class="gold", priority=10, slo=SLO(0.1, 1.0, 0.3)
    )


@pytest.mark.parametrize("slo_class", [None, "gold"])
def test_a_tenants_own_queue_is_bounded_whatever_its_class(slo_class):
    tenant = TenantConfig(name="acme", slo_class=slo_class, max_queue=3)
    assert terms_of(Caller(tenant, policy()), Headers(), OWN).max_tenant_queue == 3
    assert terms(slo_class).max_tenant_queue is None


def test_who_names_none_has_the_default():
    live = policy(default_class="plain")
    nobody = terms_of(Caller(None, live), Headers(), OWN)
    assert (nobody.slo_class, nobody.tenant, nobody.max_queue) == ("plain", "", 8)
    tenant = TenantConfig(name="acme")
    assert terms_of(Caller(tenant, live), Headers(), OWN).slo_class == "plain"
    tenant = TenantConfig(name="acme", slo_class="gold")
    assert terms_of(Caller(tenant, live), Headers(), OWN).slo_class == "gold"


def test_no_class_promises_more_than_the_model():
    assert terms("eager").slo == SLO(0.1, 9.0)
    assert terms("plain", own=SLO(tpot_s=0.5, ttft_s=1.0)).slo == SLO(0.5, 3.0)


def test_a_header_may_lower_the_class():
    lower = terms("gold", CLASS="batch")
    assert (lower.slo_class, lower.priority, lower.slo) == ("batch", -5, SLO(1.0, 60.0))
    assert lower.max_queue == 20
    assert terms("gold", TTFT="5s", TPOT="250ms").slo == SLO(0.25, 5.0, 0.3)


def test_a_header_never_raises_it():
    raised = terms("plain", CLASS="gold", TTFT="1ms", TPOT="1us")
    assert (raised.priority, raised.slo) == (0, SLO(0.2, 3.0, 0.3))
    # Those of its own class wait with it: it takes no place of the other's.
    assert (raised.slo_class, raised.max_queue) == ("plain", 8)


def test_headers_lower_the_models_own_targets_too():
    assert terms(TTFT="4s").slo == SLO(0.1, 4.0)
    assert terms(TTFT="1ms").slo == SLO(0.1, 2.0)
    assert terms(CLASS="gold").slo == SLO(0.1, 2.0, 0.3)
    assert (terms(CLASS="gold").priority, terms(CLASS="gold").slo_class) == (0, "")


@given(
    st.sampled_from([None, *CLASSES]),
    st.sampled_from([None, *CLASSES]),
    st.none() | st.integers(1, 10**5),
    st.none() | st.integers(1, 10**5),
)
def test_no_headers_make_anything_better(own_class, asked, ttft_ms, tpot_ms):
    headers = {name: f"{ms}ms" for name, ms in (("TTFT", ttft_ms), ("TPOT", tpot_ms)) if ms}
    headers |= {"CLASS": asked} if asked else {}
    plain, lowered = terms(own_class), terms(own_class, **headers)
    assert (lowered.slo or OWN).tpot_s >= (plain.slo or OWN).tpot_s
    assert (lowered.slo or OWN).ttft_s >= (plain.slo or OWN).ttft_s
    assert lowered.priority <= plain.priority
    assert (lowered.tenant, lowered.weight) == (plain.tenant, plain.weight)
    if lowered.slo_class != plain.slo_class:
        chosen = policy().classes[lowered.slo_class]
        assert (chosen.priority, lowered.max_queue) == (lowered.priority, chosen.max_queue)


@pytest.mark.parametrize(
    ("header", "value", "says"),
    [
        ("CLASS", "silver", "there is no class 'silver'; there is gold, plain, batch, eager"),
        ("CLASS", "", "there is no class ''"),
        ("TTFT", "fast", "must be a time with its unit, for example 500ms, got 'fast'"),
        ("TTFT", "-5s", "must be a time"),
        ("TTFT", "5", "must be a time"),
        ("TPOT", "9**9**9s", "must be a time"),
        ("TPOT", "1e9s", "must be a time"),
        ("TPOT", "", "must be a time"),
        ("TTFT", "61min", "must be an hour at most, got '61min'"),
    ],
)
def test_a_broken_header_is_named(header, value, says):
    with pytest.raises(RequestError) as caught:
        terms("gold", **{header: value})
    assert says in str(caught.value)
    assert caught.value.field == f"X-SelectN-{'Class' if header == 'CLASS' else header}"
