"""What a replica is asked for: by what comes, what runs and what waits; and for which class."""

import pytest

from deployments.control.demand import Demand
from select_n_core.decisions.lease import Ladder
from select_n_core.engine.messages import EngineStats

LADDER = Ladder(
    k_min=1,
    unit_bytes=(4096,) * 4,
    rates_per_s=(0.0, 2.0, 4.0, 6.0, 8.0),
    tokens=100,
    lifetime_s=2.0,
)


class Engine:
    """Statistics that a test sets, ten times per second."""

    def __init__(self, ttft_s: float = 1.0) -> None:
        self.demand = Demand(LADDER, ttft_s)
        self.now_s = 50.0
        self.offered: dict[int, float] = {}
        self.facts: dict[str, int] = {"kv_tokens": 1000, "kv_free_tokens": 1000}

    def run(self, seconds: float, per_s: float = 0.0, priority: int = 0, **facts: int) -> Demand:
        self.facts |= facts
        for _ in range(round(10 * seconds)):
            self.now_s += 0.1
            self.offered[priority] = self.offered.get(priority, 0) + 10 * per_s
            offered = {each: int(tokens) for each, tokens in self.offered.items()}
            self.demand.saw(self.now_s, EngineStats(offered_tokens=offered, **self.facts))
        return self.demand


@pytest.fixture
def engine() -> Engine:
    return Engine()


def gains(demand: Demand) -> list[float]:
    """At the load there is."""
    return [0.0 if rung.spare else rung.gain_per_s for rung in demand.rungs]


def test_mirrors_of_an_idle_model_gain_nothing(engine):
    assert gains(engine.demand) == [0.0, 0.0, 0.0]
    assert gains(engine.run(2)) == [0.0, 0.0, 0.0]


def test_a_loaded_models_mirrors_gain_as_far_as_the_load_goes(engine):
    first, second, third = gains(engine.run(2, per_s=7.0))
    assert (first, second) == (2.0, 2.0)
    assert 0 < third <= 1.0
    assert gains(engine.run(2, per_s=50.0)) == [2.0, 2.0, 2.0]


def test_load_that_ends_is_forgotten_in_a_second_but_for_those_who_still_run(engine):
    engine.run(2, per_s=8.0, running=6)
    six_that_live_two_seconds = 3.0
    assert engine.run(1.5).offered_per_s == pytest.approx(six_that_live_two_seconds, rel=0.1)
    assert gains(engine.demand)[1:] == [0.0, 0.0]
    assert gains(engine.run(0.2, running=0)) == [0.0, 0.0, 0.0]


def test_long_requests_that_run_count_by_their_kv(engine):
    assert engine.run(0.2, running=1, kv_free_tokens=200).offered_per_s == pytest.approx(4.0)


def test_who_waits_is_to_be_served_within_the_ttft():
    engine = Engine(ttft_s=0.5)
    assert engine.run(0.1, running=4, waiting=3).offered_per_s == pytest.approx(2.0 + 6.0)


def test_one_that_waits_wants_every_mirror_it_may_be_longer_than_they_think(engine):
    assert gains(engine.run(2, waiting=1)) == pytest.approx([1 / 3] * 3)


def test_a_demand_that_wavers_by_less_than_a_tenth_stands(engine):
    rungs = engine.run(3, per_s=5.0).rungs
    for number in range(20):
        assert engine.run(0.5, per_s=4.9 if number % 2 else 4.6).rungs is rungs
    assert engine.run(2, per_s=6.0).rungs is not rungs


def test_what_an_engine_served_before_it_was_looked_at_is_no_demand(engine):
    engine.offered[0] = 1_000_000
    assert engine.run(0.1).offered_per_s == 0.0


class TestPriority:
    def test_without_load_it_is_nobodys(self, engine):
        assert engine.demand.priority == engine.run(1).priority == 0

    def test_the_class_that_the_floor_does_not_reach_decides(self, engine):
        """The floor serves two per second: the high class takes one, the low one the rest."""
        for _ in range(100):
            engine.run(0.1, per_s=1.0, priority=10)
            engine.run(0.1, per_s=7.0, priority=3)
        assert engine.demand.priority == 3

    def test_a_high_class_that_needs_more_than_the_floor_decides(self, engine):
        assert engine.run(3, per_s=6.0, priority=10).priority == 10

    def test_where_the_floor_serves_all_it_is_the_lowest(self, engine):
        for _ in range(10):
            engine.run(0.1, per_s=0.5, priority=10)
            engine.run(0.1, per_s=0.5, priority=-2)
        assert engine.demand.priority == -2

    def test_while_nobody_comes_it_stays_theirs_who_came_last(self, engine):
        engine.run(3, per_s=6.0, priority=10, running=6)
        assert engine.run(30, running=6).priority == 10

    def test_who_came_long_ago_is_forgotten(self, engine):
        engine.run(3, per_s=6.0, priority=10)
        assert engine.run(11, per_s=6.0, priority=0).priority == 0
