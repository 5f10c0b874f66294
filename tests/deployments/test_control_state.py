"""What the controller knows, on a virtual clock: who reports, who is gone, what a watcher lacks."""

import pytest
from clocks import Clock
from hypothesis import given
from hypothesis import strategies as st
from reports import report

from deployments.control.messages import IngressReport, Known, ReportBatch, Snapshot
from deployments.control.state import ClusterState
from select_n_core.live import LivePolicy, parse_policy

NOTHING = Snapshot(0, 0)


@pytest.fixture
def state(clock):
    return ClusterState(epoch=3, clock=clock, ttl_s=2.0)


def batch(*reports, epoch=0) -> ReportBatch:
    return ReportBatch(epoch, reports)


def policy(**classes: str) -> LivePolicy:
    return parse_policy({"classes": {name: {"tpot": tpot} for name, tpot in classes.items()}})


def test_a_report_is_in_the_snapshot_and_its_receipt_names_the_epoch(state):
    receipt = state.take(batch(report("a", k=5)))
    assert (receipt.epoch, receipt.refused) == (3, ())
    snapshot = state.snapshot()
    assert (snapshot.epoch, snapshot.version) == (3, state.version)
    assert snapshot.replicas == {"a": report("a", k=5)}


def test_a_report_that_was_overtaken_is_refused_and_changes_nothing(state):
    state.take(batch(report("a", 7, k=5)))
    before = state.version
    assert state.take(batch(report("a", 6, k=4), report("a", 7, k=4))).refused == ("a", "a")
    assert state.version == before
    assert state.snapshot().replicas["a"].k == 5


def test_one_refused_report_keeps_no_other_of_its_batch_out(state):
    state.take(batch(report("a", 7)))
    assert state.take(batch(report("a", 1), report("b", 1))).refused == ("a",)
    assert set(state.snapshot().replicas) == {"a", "b"}


def test_a_silent_replica_is_dropped_after_its_ttl_and_not_before(state, clock):
    state.take(batch(report("a"), report("b")))
    clock.now_s += 1.5
    state.take(batch(report("b", 1)))
    state.expire()
    assert set(state.snapshot().replicas) == {"a", "b"}
    clock.now_s += 0.6
    state.expire()
    assert set(state.snapshot().replicas) == {"b"}


def test_a_dropped_replica_comes_back_with_its_next_report_but_not_with_a_late_one(state, clock):
    state.take(batch(report("a", 5)))
    clock.now_s += 3
    state.expire()
    assert state.take(batch(report("a", 4))).refused == ("a",)
    assert not state.snapshot().replicas
    assert state.take(batch(report("a", 6))).refused == ()
    assert set(state.snapshot().replicas) == {"a"}


def test_a_sender_that_knows_a_later_controller_is_refused_and_says_who_took_over(state):
    receipt = state.take(batch(report("a"), report("b"), epoch=4))
    assert receipt.refused == ("a", "b")
    assert state.snapshot().replicas == {}
    assert state.succeeded_by == 4


def test_a_sender_that_knows_an_earlier_controller_is_welcome(state):
    assert state.take(batch(report("a"), epoch=2)).refused == ()
    assert state.succeeded_by == 0


def test_a_watcher_hears_only_of_what_changed_since(state):
    state.take(batch(report("a"), report("b")))
    known = state.snapshot().known
    state.take(batch(report("b", 1, k=9)))
    changes = state.changes(known)
    assert not changes.whole
    assert [each.replica for each in changes.reports] == ["b"]
    assert changes.policy is None
    assert state.changes(state.snapshot().known).reports == ()


@pytest.mark.parametrize("known", [Known(), Known(2, 1), Known(4, 1), Known(3, 10**6)])
def test_a_watcher_of_another_controller_hears_everything(state, known):
    state.set_policy(policy(chat="50ms"))
    state.take(batch(report("a"), report("b")))
    changes = state.changes(known)
    assert changes.whole
    assert len(changes.reports) == 2
    assert changes.policy == policy(chat="50ms")


def test_a_policy_travels_once_and_again_only_when_it_changed(state):
    state.set_policy(policy(chat="50ms"))
    first = state.snapshot()
    state.set_policy(policy(chat="50ms"))
    assert state.version == first.version
    state.take(batch(report("a")))
    assert first.after(state.changes(first.known)).policy == policy(chat="50ms")
    state.set_policy(policy(chat="80ms"))
    later = first.after(state.changes(first.known))
    assert later.policy == policy(chat="80ms")
    assert later.policy_version == first.policy_version + 1


def test_changes_of_an_earlier_controller_are_ignored(state, clock):
    snapshot = state.snapshot()
    earlier = ClusterState(epoch=2, clock=clock)
    earlier.take(batch(report("a")))
    assert snapshot.after(earlier.changes(Known())) is snapshot


def test_what_an_earlier_controller_said_stands_until_the_later_one_has_heard_everybody(
    state, clock
):
    state.set_policy(policy(chat="50ms"))
    state.take(batch(report("back", k=5), report("gone"), report("slow")))
    snapshot = state.snapshot()
    later = ClusterState(epoch=4, clock=clock, ttl_s=2.0)
    later.set_policy(policy(chat="80ms"))
    later.take(batch(report("back", 1, k=6)))
    snapshot = snapshot.after(later.changes(snapshot.known))
    assert snapshot.epoch == 4
    assert set(snapshot.replicas) == {"back", "gone", "slow"}
    assert snapshot.replicas["back"].k == 6
    assert snapshot.policy == policy(chat="80ms")
    clock.now_s += 1.9
    later.take(batch(report("back", 2), report("slow", 1)))
    later.expire()
    snapshot = snapshot.after(later.changes(snapshot.known))
    assert set(snapshot.replicas) == {"back", "gone", "slow"}
    clock.now_s += 0.1
    later.expire()
    snapshot = snapshot.after(later.changes(snapshot.known))
    assert snapshot == later.snapshot()
    assert set(snapshot.replicas) == {"back", "slow"}


def test_replicas_and_ingresses_are_told_apart_and_expire_alike(state, clock):
    state.take(batch(report("a"), IngressReport("i", 0, 0.0, {"acme": (1.0, 2.0)})))
    snapshot = state.snapshot()
    assert (set(snapshot.replicas), set(snapshot.ingresses)) == ({"a"}, {"i"})
    clock.now_s += 1.5
    state.take(batch(report("a", 1)))
    clock.now_s += 1.5
    state.expire()
    later = snapshot.after(state.changes(snapshot.known))
    assert (set(later.replicas), set(later.ingresses)) == ({"a"}, set())


REPLICAS = st.sampled_from("abc")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("report"), REPLICAS, st.integers(0, 30), st.integers(0, 9)),
        st.tuples(st.just("pass"), st.floats(0, 1.5)),
        st.tuples(st.just("policy"), st.sampled_from(["50ms", "60ms"])),
        st.tuples(st.just("look"), st.integers(0, 2)),
    ),
    max_size=60,
)


@given(STEPS)
def test_whenever_a_watcher_looks_its_changes_add_up_to_the_snapshot(steps):
    clock = Clock()
    state = ClusterState(epoch=1, clock=clock, ttl_s=2.0)
    watchers = [NOTHING] * 3
    for step in steps:
        match step:
            case ("report", name, sequence, k):
                state.take(batch(report(name, sequence, k=k)))
            case ("pass", seconds):
                clock.now_s += seconds
                state.expire()
            case ("policy", tpot):
                state.set_policy(policy(chat=tpot))
            case ("look", watcher):
                before = watchers[watcher]
                watchers[watcher] = before.after(state.changes(before.known))
                assert watchers[watcher] == state.snapshot()
    for watcher in watchers:
        assert watcher.after(state.changes(watcher.known)) == state.snapshot()


def test_who_watched_since_before_forgotten_departures_still_ends_with_the_truth(state, clock):
    state.take(batch(report("stays"), report("early")))
    before = state.snapshot()
    for number in range(1100):
        clock.now_s += 1.5
        state.take(batch(report("stays", number + 1), report(f"left-{number}")))
        state.expire()
    assert before.after(state.changes(before.known)) == state.snapshot()
    assert "early" not in state.snapshot().replicas
