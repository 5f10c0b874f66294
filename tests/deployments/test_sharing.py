"""A policy and quotas over several ingresses, whatever becomes of the controller."""

import pytest
from clocks import Clock

from deployments.control.cache import SnapshotCache
from deployments.control.messages import Changes, IngressReport, Snapshot
from deployments.control.policy import HeardPolicy
from deployments.control.sharing import SharedQuotas
from select_n_core.errors import QuotaError
from select_n_core.live import LivePolicy, TenantConfig

ACME = TenantConfig(name="acme", requests_per_minute=60)


@pytest.fixture
def cache(clock):
    return SnapshotCache(None, clock=clock)


def hear(cache: SnapshotCache, *reports: IngressReport, policy: LivePolicy | None = None) -> None:
    """What the controller would say of these ingresses."""
    version = 1 if cache.snapshot is None else cache.snapshot.version + 1
    cache.take(Changes(1, version, True, True, 1, policy, reports))


def other(name: str, requests: float) -> IngressReport:
    return IngressReport(name, 0, 0.0, {"acme": (requests, 0.0)})


def in_a_minute(shared: SharedQuotas, clock: Clock) -> int:
    """How many requests are let in, of ten per second, once all have settled."""
    let_in = 0
    for step in range(900):
        clock.now_s += 0.1
        shared._cache._heard_s += 0.1  # it is heard of all the time
        try:
            shared.quotas.charge(ACME, 1)
            let_in += step >= 300
        except QuotaError:
            pass
    return let_in


@pytest.fixture
def shared(cache, clock):
    return SharedQuotas("a", cache, clock=clock)


class TestSharing:
    def test_alone_an_ingress_has_it_all(self, shared, cache, clock):
        assert in_a_minute(shared, clock) == pytest.approx(60, abs=1)
        hear(cache, other("a", 500))
        assert in_a_minute(shared, clock) == pytest.approx(60, abs=1)

    def test_two_that_are_asked_for_more_have_half_each(self, shared, cache, clock):
        hear(cache, other("b", 600))
        assert in_a_minute(shared, clock) == pytest.approx(30, abs=1)

    def test_what_others_are_not_asked_for_is_borrowed(self, shared, cache, clock):
        hear(cache, other("b", 12), IngressReport("c", 0, 0.0, {}))
        assert in_a_minute(shared, clock) == pytest.approx(48, abs=1)

    def test_it_reports_what_it_was_asked_for_let_in_or_not(self, shared, clock):
        assert in_a_minute(shared, clock) < 100
        report = shared.report(7)
        assert (report.ingress, report.sequence) == ("a", 7)
        assert report.demands["acme"] == pytest.approx((600, 600), rel=0.05)

    def test_while_the_others_are_not_heard_of_each_keeps_to_an_even_part(
        self, shared, cache, clock
    ):
        hear(cache, other("b", 1))
        assert in_a_minute(shared, clock) == pytest.approx(59, abs=1)
        clock.now_s += 60
        assert in_a_minute(shared, clock) == pytest.approx(30, abs=1)
        hear(cache, other("b", 1))
        assert in_a_minute(shared, clock) == pytest.approx(59, abs=1)


class TestPolicy:
    async def find_out(self, monkeypatch, cache, *, controller: bool) -> HeardPolicy:
        monkeypatch.setattr("deployments.control.policy.has_controller", lambda: controller)
        policy = HeardPolicy(cache)
        await policy.find_out()
        return policy

    async def test_without_a_controller_everybody_is_let_in(self, monkeypatch, cache):
        policy = await self.find_out(monkeypatch, cache, controller=False)
        assert policy() == LivePolicy()

    async def test_with_one_nothing_is_known_before_it_is_heard(self, monkeypatch, cache):
        policy = await self.find_out(monkeypatch, cache, controller=True)
        assert policy() is None
        hear(cache)  # it has no policy yet
        assert policy() is None
        hear(cache, policy=LivePolicy())
        assert policy() == LivePolicy()

    async def test_a_controller_that_comes_later_counts(self, monkeypatch, cache):
        policy = await self.find_out(monkeypatch, cache, controller=False)
        closed = LivePolicy(tenants=(ACME,), keys_file="/keys")
        hear(cache, policy=closed)
        assert policy() is closed

    async def test_a_later_controller_without_a_policy_opens_nothing(self, monkeypatch, cache):
        policy = await self.find_out(monkeypatch, cache, controller=True)
        closed = LivePolicy(tenants=(ACME,), keys_file="/keys")
        hear(cache, policy=closed)
        assert policy() is closed
        hear(cache)
        assert cache.snapshot == Snapshot(1, 2, 1)
        assert policy() is closed
