"""Sharing a bus, on virtual clocks: shares, claims in any interleaving, what the bus carries."""

import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from select_n_core.decisions.bus import SHARED, Claim, Grant, Shown, Vitals, allocate
from select_n_core.decisions.bus_capacity import Sightings, combined, copying_beside
from select_n_core.decisions.grant import Ration, streamed_bytes, within_grant
from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.decisions.order import offload_order
from select_n_core.decisions.pace import pace_of
from select_n_core.errors import InputError

demands = st.lists(
    st.floats(0, 1e12) | st.sampled_from([0.0, 1e9, math.inf]), min_size=1, max_size=8
)
capacities = st.floats(1.0, 1e12)


# Shares.


def test_what_one_does_not_ask_for_goes_to_those_who_want_more():
    assert allocate([10.0, 80.0, 50.0], 100.0) == pytest.approx((10.0, 42.5, 42.5))
    assert allocate([10.0, 20.0], 100.0) == (10.0, 20.0)
    assert allocate([math.inf], 100.0) == (95.0,)


@given(demands, capacities)
def test_shares_fit_the_bus_and_nobody_gets_more_than_it_wants(wanted, capacity):
    shares = allocate(wanted, capacity)
    assert sum(shares) <= SHARED * capacity * (1 + 1e-12)
    assert all(0 <= share <= want for share, want in zip(shares, wanted, strict=True))
    assert sum(shares) == pytest.approx(min(sum(wanted), SHARED * capacity))


@given(demands, capacities)
def test_who_gets_less_than_it_wants_gets_no_less_than_anybody(wanted, capacity):
    shares = allocate(wanted, capacity)
    for share, want in zip(shares, wanted, strict=True):
        assert share == want or share >= max(shares) * (1 - 1e-9)


@given(demands, capacities, st.floats(0, 1), st.floats(1, 10))
def test_nobody_loses_by_a_faster_bus_or_by_others_that_want_less(wanted, capacity, less, more):
    before = allocate(wanted, capacity)
    for share, faster in zip(before, allocate(wanted, capacity * more), strict=True):
        assert faster >= share * (1 - 1e-9)
    modest = [wanted[0] * less if less else 0.0, *wanted[1:]]
    for share, now in zip(before[1:], allocate(modest, capacity)[1:], strict=True):
        assert now >= share * (1 - 1e-9)


@given(demands, capacities, st.randoms())
def test_members_that_see_the_same_words_agree_to_the_last_bit(wanted, capacity, random):
    order = list(range(len(wanted)))
    random.shuffle(order)
    shuffled = allocate([wanted[member] for member in order], capacity)
    assert [allocate(wanted, capacity)[member] for member in order] == list(shuffled)


@pytest.mark.parametrize("wrong", [-1.0, math.nan])
def test_a_demand_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match="demand must be 0 or more"):
        allocate([1.0, wrong], 100.0)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_capacity_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match="bandwidth above 0"):
        allocate([1.0], wrong)


# Claims.


class Board:
    """Words in memory; every access of a member may be the moment at which others go on."""

    def __init__(self, members: int) -> None:
        self.words = [Shown(0.0, 0.0)] * members
        self.alive = [False] * members
        self.now_s = 0.0


class Seat:
    """A member's view of the board."""

    def __init__(self, board: Board, place: int, pause: Callable[[], None] = lambda: None) -> None:
        self.board, self.place, self.pause = board, place, pause

    def show(self, demand: float, claim: float) -> None:
        self.pause()
        self.board.words[self.place] = Shown(demand, self.board.words[self.place].claim)
        self.pause()
        self.board.words[self.place] = Shown(demand, claim)

    def others(self) -> list[Shown]:
        found = []
        for place in range(len(self.board.words)):
            self.pause()
            if place != self.place and self.board.alive[place]:
                found.append(self.board.words[place])
        return found


class Actor:
    """A member that runs from one access to the next, when it is told to."""

    def __init__(
        self, board: Board, place: int, deeds: list[float | None], lifetime_s: float
    ) -> None:
        self.board, self.place, self.deeds = board, place, deeds
        self.lifetime_s = lifetime_s
        self.claim = Claim(lifetime_s)
        self.over = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def in_use(self) -> float:
        return self.claim.in_use if self.board.alive[self.place] else 0.0

    def step(self) -> None:
        if not self.over:
            self._go.release()
            self._stopped.acquire()

    def end(self) -> None:
        while not self.over:
            self.step()
        self._thread.join()

    def _pause(self) -> None:
        self._stopped.release()
        self._go.acquire()

    def _run(self) -> None:
        self._go.acquire()
        for deed in self.deeds:
            if deed is None:  # dies, with its words as they are; another takes the place
                self.board.alive[self.place] = False
                self._pause()
                self.claim = Claim(self.lifetime_s)
                self.board.words[self.place] = Shown(0.0, 0.0)
                self._pause()
                self.board.alive[self.place] = True
            else:
                self.board.alive[self.place] = True
                seat = Seat(self.board, self.place, self._pause)
                self.claim.tick(seat, deed, 100.0, self.board.now_s)
        self.over = True
        self._stopped.release()


deeds = st.lists(
    st.sampled_from([0.0, 10.0, 40.0, 60.0, 95.0, math.inf, None]), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(deeds, min_size=2, max_size=4),
    st.lists(st.integers(0, 3), max_size=300),
    st.sampled_from([0.0, 1.0]),
)
def test_in_any_interleaving_what_is_in_use_never_exceeds_what_is_shared_out(
    all_deeds, turns, lifetime_s
):
    board = Board(len(all_deeds))
    actors = [Actor(board, place, mine, lifetime_s) for place, mine in enumerate(all_deeds)]
    try:
        for turn in itertools.chain(turns, itertools.cycle(range(4))):
            board.now_s += 0.01
            actors[turn % len(actors)].step()
            assert sum(actor.in_use for actor in actors) <= 95.0 * (1 + 1e-9)
            if all(actor.over for actor in actors):
                break
    finally:
        for actor in actors:
            actor.end()


@given(st.lists(st.floats(0, 200), min_size=1, max_size=6), st.integers(0, 5))
def test_after_two_rounds_everybody_has_its_share(wanted, first):
    board = Board(len(wanted))
    claims = [Claim() for _ in wanted]
    places = [(first + place) % len(wanted) for place in range(len(wanted))]
    for place in places:
        board.alive[place] = True
        claims[place].tick(Seat(board, place), 95.0, 100.0, 0.0)  # before, each wanted everything
    for _ in range(2):
        for place in places:
            claims[place].tick(Seat(board, place), wanted[place], 100.0, 0.0)
    assert [claim.in_use for claim in claims] == pytest.approx(list(allocate(wanted, 100.0)))


def test_a_share_shrinks_at_once_and_grows_when_who_gives_way_has():
    board = Board(2)
    board.alive = [True, True]
    old, new = Claim(), Claim()
    assert old.tick(Seat(board, 0), 100.0, 100.0, 0.0).bytes_per_s == 95.0
    assert new.tick(Seat(board, 1), 30.0, 100.0, 0.0).bytes_per_s == pytest.approx(0.0)
    assert old.tick(Seat(board, 0), 100.0, 100.0, 0.0).bytes_per_s == pytest.approx(65.0)
    assert new.tick(Seat(board, 1), 30.0, 100.0, 0.0).bytes_per_s == pytest.approx(30.0)


def test_a_share_that_was_promised_is_given_back_over_a_lifetime():
    board = Board(2)
    board.alive = [True, True]
    old, new = Claim(lifetime_s=4.0), Claim(lifetime_s=4.0)
    assert old.tick(Seat(board, 0), 95.0, 100.0, 0.0).bytes_per_s == 95.0
    for now_s, kept in ((0.0, 95.0), (0.4, 85.0), (1.2, 65.0), (4.0, 47.5)):
        assert old.tick(Seat(board, 0), 95.0, 100.0, now_s).bytes_per_s == pytest.approx(kept)
        granted = new.tick(Seat(board, 1), 95.0, 100.0, now_s)
        assert granted.bytes_per_s == pytest.approx(95.0 - kept)
        assert granted.usable_bytes_per_s == pytest.approx(47.5)  # nobody starves meanwhile


def test_what_is_no_longer_wanted_and_what_a_slower_bus_cannot_carry_is_given_back_at_once():
    board = Board(2)
    board.alive = [True, True]
    old, new = Claim(lifetime_s=4.0), Claim(lifetime_s=4.0)
    old.tick(Seat(board, 0), 95.0, 100.0, 0.0)
    assert old.tick(Seat(board, 0), 20.0, 100.0, 0.0).bytes_per_s == 20.0
    assert new.tick(Seat(board, 1), 95.0, 100.0, 0.0).bytes_per_s == 75.0
    assert new.tick(Seat(board, 1), 95.0, 50.0, 0.0).bytes_per_s == pytest.approx(37.5)


def test_a_bus_found_slower_is_shared_anew_once_everybody_has_ticked():
    board = Board(2)
    board.alive = [True, True]
    claims = [Claim(), Claim()]
    for _ in range(2):
        for place, claim in enumerate(claims):
            claim.tick(Seat(board, place), 100.0, 100.0, 0.0)
    for place, claim in enumerate(claims):
        claim.tick(Seat(board, place), 100.0, 50.0, 0.0)
    assert [claim.in_use for claim in claims] == pytest.approx([23.75, 23.75])


def test_a_copy_runs_at_what_the_others_leave_and_never_below_an_even_part():
    board = Board(3)
    board.alive = [True, False, False]
    claim = Claim()

    def granted() -> Grant:
        return claim.tick(Seat(board, 0), 10.0, 100.0, 0.0)

    assert granted() == Grant(10.0, 95.0, 100.0)
    board.alive[1], board.words[1] = True, Shown(30.0, 30.0)
    assert granted() == Grant(10.0, 65.0, 70.0)
    board.words[1] = Shown(math.inf, 85.0)
    assert granted() == Grant(10.0, pytest.approx(10.0), 50.0)
    board.alive[2] = True  # a member that copies nothing takes no part
    assert granted() == Grant(10.0, pytest.approx(10.0), 50.0)


# Who lives.


def looked(vitals: Vitals, beats: list[int], until_s: float, held=None, from_s=0.0) -> list[int]:
    """Look five times a second; who lives then."""
    for tenth in range(round(from_s * 5), round(until_s * 5) + 1):
        vitals.look(beats, held or [True] * len(beats), tenth / 5)
    return vitals.living(beats)


def test_a_counter_that_stands_still_for_a_second_is_a_dead_members():
    vitals = Vitals(patience_s=1.0)
    assert looked(vitals, [7, 0, 9], until_s=1.0) == [0, 2]
    assert looked(vitals, [7, 0, 10], from_s=1.2, until_s=1.2) == [2]


def test_a_member_whose_lock_is_free_is_dead_at_once():
    assert looked(Vitals(), [7, 9], until_s=0.0, held=[True, False]) == [0]


def test_a_counter_that_turns_again_is_alive_before_anybody_looks():
    vitals = Vitals()
    assert looked(vitals, [7, 9], until_s=2.0) == []
    assert vitals.living([7, 10]) == [1]
    assert vitals.living([8, 9]) == [0]


def test_one_look_after_the_clock_has_jumped_kills_nobody():
    vitals = Vitals()
    vitals.look([7], [True], 0.0)
    vitals.look([7], [True], 3600.0)
    assert vitals.living([7]) == [0]
    vitals.look([8], [True], 3600.2)
    vitals.look([9], [True], -1e6)
    vitals.look([10], [True], 0.0)
    assert vitals.living([10]) == [0]


# What the bus carries.


def found(sightings: Sightings, now_s: float) -> float:
    capacity = sightings.capacity(now_s)
    assert capacity is not None
    return capacity


def fed(sightings, bandwidth, from_s, until_s, every_s, beside=()) -> float:
    """Sightings of a bandwidth at a steady pace; what is found at the end."""
    steps = round((until_s - from_s) / every_s)
    for step in range(steps):
        assert sightings.add(bandwidth, beside, from_s + (step + 1) * every_s)
    return found(sightings, until_s)


@given(st.lists(st.floats(0, 1), max_size=5))
def test_the_part_of_the_bus_is_the_mean_over_who_copies_beside(shares):
    expected = 0.0
    for copying in itertools.product([False, True], repeat=len(shares)):
        chance = math.prod(
            share if copies else 1 - share for share, copies in zip(shares, copying, strict=True)
        )
        expected += chance / (1 + sum(copying))
    assert copying_beside(shares) == pytest.approx(expected)


def test_members_that_always_copy_find_the_whole_bus_together():
    sightings = Sightings()
    assert fed(sightings, 100e6, 0, 2, 0.05, beside=[1.0, 1.0]) == pytest.approx(300e6)


@pytest.mark.parametrize("every_s", [0.01, 0.05, 0.2])
def test_a_bus_at_half_its_bandwidth_is_found_within_a_second_and_again_when_it_recovers(every_s):
    sightings = Sightings()
    assert fed(sightings, 1e9, 0, 5, every_s) == 1e9
    assert fed(sightings, 0.5e9, 5, 6, every_s) == 0.5e9
    assert fed(sightings, 1e9, 6, 7, every_s) == 1e9


def test_a_copy_that_stalls_for_a_second_changes_nothing():
    sightings = Sightings()
    fed(sightings, 1e9, 0, 5, 0.05)
    sightings.add(9e6, (), 6.05)  # 9 MB in a second
    assert found(sightings, 6.05) == 1e9
    assert fed(sightings, 1e9, 6.05, 7, 0.05) == 1e9


@pytest.mark.parametrize("wrong", [math.nan, -1.0, 0.0, math.inf, -math.inf])
def test_what_is_no_bandwidth_is_forgotten(wrong):
    sightings = Sightings()
    for _ in range(100):
        assert not sightings.add(wrong, (), 0.0)
    assert sightings.capacity(0.0) is None
    fed(sightings, 1e9, 0, 1, 0.05)
    for _ in range(100):
        assert not sightings.add(wrong, (), 1.0)
    assert found(sightings, 1.0) == 1e9


def test_what_was_found_stays_while_it_is_about_right():
    sightings = Sightings()
    fed(sightings, 1e9, 0, 2, 0.05)
    assert fed(sightings, 0.98e9, 2, 4, 0.05) == 1e9
    assert fed(sightings, 0.95e9, 4, 6, 0.05) == 0.95e9


def test_too_little_or_nothing_lately_is_no_finding():
    sightings = Sightings()
    for step in range(4):
        sightings.add(1e9, (), step / 10)
    assert sightings.capacity(0.4) is None
    sightings.add(1e9, (), 0.5)
    assert found(sightings, 0.5) == 1e9
    assert sightings.capacity(60.0) is None


def test_the_bus_is_the_median_of_what_its_members_found():
    assert combined([1.0, 100.0, 101.0], last=7.0) == 100.0
    assert combined([], last=7.0) == 7.0


# What a grant means.

S = 10_000_000
UNITS, SLOTS = 12, 2
ONE = StepShape(decode_rows=1)


def model(transfer_s: float = 0.01, compute_s: float = 0.004) -> LatencyModel:
    compute = ComputeModel(
        token_grid=((1, compute_s),),
        per_context_token_s=0.0,
        per_pair_s=0.0,
        outside_s=0.002,
        outside_per_row_s=0.0,
    )
    return LatencyModel(units=UNITS, transfer_s=transfer_s, streaming=compute)


LINK = S / 0.01  # bytes/s of the model's link


def step_s(latency: LatencyModel, k: int) -> float:
    return pace_of(latency, k, SLOTS).step_s(ONE)


def test_units_move_their_own_bytes():
    assert streamed_bytes(model(), 0, S) == 0
    assert streamed_bytes(model(), 3, S) == pytest.approx(3 * S)
    first, second, *_ = offload_order(UNITS)
    shares = tuple(0.5 if unit in (first, second) else 1.0 for unit in range(UNITS))
    assert streamed_bytes(replace(model(), unit_shares=shares), 3, S) == pytest.approx(2 * S)


def test_alone_on_the_bus_the_model_is_the_recorded_one():
    recorded = model()
    assert within_grant(recorded, S, Grant(SHARED * LINK, LINK, LINK)) is recorded
    assert within_grant(recorded, S, Grant(0.0, 2 * LINK, 2 * LINK)) is recorded


def test_a_small_share_slows_nobody_who_wants_no_more():
    """The share of k = 2 spreads its copies over an iteration; each still runs at link speed."""
    wanted = 2 * S / step_s(model(), 2)
    within = within_grant(model(), S, Grant(wanted, wanted, LINK))
    assert step_s(within, 2) == pytest.approx(step_s(model(), 2), rel=0.04)
    assert step_s(within, 4) >= 1.9 * step_s(model(), 2)


def test_on_a_crowded_bus_copies_take_longer():
    crowded = Grant(0.45 * LINK, 0.45 * LINK, 0.5 * LINK)
    within = within_grant(model(), S, crowded)
    assert 0.02 <= within.transfer_s <= 0.02 * 1.04
    assert step_s(within, UNITS) >= UNITS * S / (0.45 / SHARED * LINK)
    assert within_grant(model(), S, crowded) is within  # so that tables are shared


def test_who_asked_for_nothing_is_slowed_as_its_copies_are():
    within = within_grant(model(), S, Grant(0.0, 0.0, 0.5 * LINK))
    assert step_s(within, UNITS) == pytest.approx(UNITS * S / (0.5 * LINK), rel=0.06)


# When the next step may begin.


def test_steps_come_as_often_as_their_bytes_fit_the_grant():
    ration, now_s, moved = Ration(), 100.0, 0.0
    grant = Grant(0.2 * LINK, 0.2 * LINK, LINK)
    for _ in range(50):
        ration.moved(2 * S, now_s, grant)
        moved += 2 * S
        now_s += 0.01
        now_s += ration.rest_s(now_s)
    assert moved / (now_s - 100.0) == pytest.approx(0.2 / SHARED * LINK, rel=0.05)


def test_a_step_that_takes_longer_than_its_share_does_not_rest():
    ration, grant = Ration(), Grant(0.2 * LINK, 0.2 * LINK, LINK)
    for step in range(5):
        ration.moved(2 * S, 0.2 * step, grant)
        assert ration.rest_s(0.2 * step + 0.2) == 0


def test_after_a_pause_one_step_may_come_early_and_no_more():
    ration, grant = Ration(), Grant(0.1 * LINK, 0.1 * LINK, LINK)
    ration.moved(S, 0.0, grant)
    ration.moved(S, 10.0, grant)
    assert ration.rest_s(10.0) == 0
    ration.moved(S, 10.0, grant)
    assert ration.rest_s(10.0) == pytest.approx(0.1 * SHARED)


def test_nothing_moved_is_never_waited_for():
    ration = Ration()
    ration.moved(0.0, 0.0, Grant(0.0, 0.0, LINK))
    assert ration.rest_s(0.0) == 0
