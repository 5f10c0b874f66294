"""The iteration-time law against its bounds and against an event simulation."""

import heapq
from itertools import count, cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.law import UnitCost, iteration_s
from select_n_core.decisions.order import streamed_units

SECONDS = st.floats(0.01, 10)
OUTSIDE = st.one_of(st.just(0.0), st.floats(0.01, 100))


class Replica:
    """A copy engine and a compute engine, driven event by event; neither knows a recurrence."""

    def __init__(self, units, k, slots, cost, outside_s, transfer_s):
        self.streamed = set(streamed_units(units, k))
        self.program = [*range(units), "outside"]
        self.cost, self.outside_s = cost, outside_s
        each = transfer_s if isinstance(transfer_s, tuple) else (transfer_s,) * units
        self.transfers_s = cycle([each[unit] for unit in sorted(self.streamed)])
        self.free_slots, self.arrived = slots, 0
        self.at, self.blocked_since = 0, None
        self.copying = self.computing = False
        self.now_s, self.events, self.number = 0.0, [], count()

    def run(self, iterations):
        """The times at which iterations end."""
        ends_s = []
        self.go_on()
        while len(ends_s) < iterations:
            self.now_s, _, event = heapq.heappop(self.events)
            if event == "copied":
                self.copying, self.arrived = False, self.arrived + 1
            else:
                self.computing = False
                done = self.program[self.at]
                self.free_slots += done in self.streamed
                if done == "outside":
                    ends_s.append(self.now_s)
                self.at = (self.at + 1) % len(self.program)
            self.go_on()
        return ends_s

    def go_on(self):
        if self.streamed and not self.copying and self.free_slots:
            self.free_slots, self.copying = self.free_slots - 1, True
            self.after(next(self.transfers_s), "copied")
        if not self.computing:
            self.compute(self.program[self.at])

    def compute(self, step):
        if step == "outside":
            took_s = self.outside_s
        elif step not in self.streamed:
            took_s = self.cost.home_s
        elif not self.arrived:
            self.blocked_since = self.now_s if self.blocked_since is None else self.blocked_since
            return
        else:
            waited_s = 0.0 if self.blocked_since is None else self.now_s - self.blocked_since
            self.arrived, self.blocked_since = self.arrived - 1, None
            took_s = self.cost.after_wait(waited_s)
        self.computing = True
        self.after(took_s, "computed")

    def after(self, seconds, event):
        heapq.heappush(self.events, (self.now_s + seconds, next(self.number), event))


def simulated_s(units, k, slots, cost, outside_s, transfer_s):
    ends_s = Replica(units, k, slots, cost, outside_s, transfer_s).run(100)
    return (ends_s[-1] - ends_s[59]) / 40


@st.composite
def streaming(draw, most_units=40, least_k=0):
    units = draw(st.integers(max(1, least_k), most_units))
    return units, draw(st.integers(least_k, units)), draw(st.integers(1, 4))


@given(streaming(), SECONDS, OUTSIDE, SECONDS)
def test_the_recurrence_is_what_an_event_simulation_sees(shape, compute_s, outside_s, transfer_s):
    seen_s = simulated_s(*shape, UnitCost.uniform(compute_s), outside_s, transfer_s)
    assert iteration_s(*shape, compute_s, outside_s, transfer_s) == pytest.approx(seen_s, rel=1e-6)


@given(streaming(), SECONDS, OUTSIDE, st.data())
def test_it_sees_the_same_when_units_differ_in_size(shape, compute_s, outside_s, data):
    transfers_s = tuple(
        data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=shape[0], max_size=shape[0]))
    )
    seen_s = simulated_s(*shape, UnitCost.uniform(compute_s), outside_s, transfers_s)
    assert iteration_s(*shape, compute_s, outside_s, transfers_s) == pytest.approx(seen_s, rel=1e-3)


@given(streaming(), SECONDS, st.floats(0, 1), st.floats(0, 0.5), OUTSIDE, SECONDS)
def test_it_sees_the_same_when_streamed_units_compute_slower(
    shape, home_s, extra, stalled_extra, outside_s, transfer_s
):
    streamed_s = home_s * (1 + extra)
    # A stall costs less than half of itself on top: so it is on machines, and times settle.
    cost = UnitCost(home_s, streamed_s, streamed_s + stalled_extra * transfer_s, transfer_s)
    seen_s = simulated_s(*shape, cost, outside_s, transfer_s)
    assert iteration_s(*shape, cost, outside_s, transfer_s) == pytest.approx(seen_s, rel=1e-3)


@pytest.mark.parametrize(("slots", "most"), [(2, 1.11), (3, 1.04), (4, 1.01)])
@given(st.integers(8, 80), st.floats(0.02, 0.15), st.data(), st.floats(0.5, 2))
def test_near_balance_few_slots_cost_little_whatever_lies_outside_the_units(
    slots, most, units, outside, data, copies
):
    k = data.draw(st.integers(1, units // 2))
    took_s = iteration_s(units, k, slots, (1 - outside) / units, outside, copies / k)
    assert took_s <= most * max(1.0, copies)


@given(streaming(), SECONDS, OUTSIDE, SECONDS)
def test_nothing_streamed_is_compute_alone(shape, compute_s, outside_s, transfer_s):
    units, _, slots = shape
    alone_s = units * compute_s + outside_s
    assert iteration_s(units, 0, slots, compute_s, outside_s, transfer_s) == alone_s


@given(streaming(least_k=1), SECONDS, OUTSIDE, SECONDS)
def test_an_iteration_takes_at_least_its_compute_and_its_copies(
    shape, compute_s, outside_s, transfer_s
):
    units, k, slots = shape
    took_s = iteration_s(*shape, compute_s, outside_s, transfer_s)
    in_turn_s = k * (transfer_s + compute_s) / slots  # a slot is copied to and computed from
    assert took_s >= max(units * compute_s + outside_s, k * transfer_s, in_turn_s) * (1 - 1e-7)


@given(streaming(), st.tuples(SECONDS, OUTSIDE, SECONDS), st.integers(0, 2), st.floats(1, 3))
def test_no_time_gets_longer_for_free(shape, times, which, factor):
    longer = list(times)
    longer[which] *= factor
    assert iteration_s(*shape, *longer) >= iteration_s(*shape, *times) * (1 - 1e-7)


@given(streaming(), SECONDS, OUTSIDE, SECONDS)
def test_streaming_more_or_with_fewer_slots_is_never_faster(
    shape, compute_s, outside_s, transfer_s
):
    units, k, slots = shape
    took_s = iteration_s(units, k, slots, compute_s, outside_s, transfer_s) * (1 + 1e-7)
    if k:
        assert iteration_s(units, k - 1, slots, compute_s, outside_s, transfer_s) <= took_s
    assert iteration_s(units, k, slots + 1, compute_s, outside_s, transfer_s) <= took_s


def test_slots_filled_in_a_cold_stall_do_not_make_copies_faster_for_ever():
    cost = UnitCost(home_s=6.0, streamed_s=6.0, stalled_s=13.0, stall_s=7.0)
    assert iteration_s(1, 1, 3, cost, 0.0, 7.0) == pytest.approx(7.0)
    assert simulated_s(1, 1, 3, cost, 0.0, 7.0) == pytest.approx(7.0)


def test_a_wait_cools_a_unit_in_proportion_and_no_further():
    cost = UnitCost(home_s=1.0, streamed_s=1.5, stalled_s=2.5, stall_s=4.0)
    assert [cost.after_wait(wait_s) for wait_s in (0.0, 2.0, 4.0, 400.0)] == [1.5, 2.0, 2.5, 2.5]
