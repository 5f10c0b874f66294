"""The pacer as a bus: exact times on a virtual clock, then two real processes."""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.errors import LinkError
from select_n_core.links.pacer import Pacer, flow

SPAWN = multiprocessing.get_context("spawn")
MB = 1_000_000
UP, DOWN = "d2h", "h2d"
DEADLINE_S = 30.0


class Time:
    """A clock that sleeping moves on, later than asked by `late_s`."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.late_s = 0.0
        self.sleeps = 0
        self.before_s: dict[float, object] = {}  # what happens while somebody sleeps

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        end_s = self.now_s + max(0.0, seconds)
        for at_s in sorted(self.before_s):
            if at_s <= end_s:
                self.now_s = at_s
                self.before_s.pop(at_s)()
        self.now_s = end_s + self.late_s


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def virtual() -> Time:
    return Time()


@pytest.fixture
def pair(directory: Path, virtual: Time) -> Iterator[tuple[Pacer, Pacer]]:
    """Two links on a bus of 10 MB/s."""
    pacers = tuple(
        Pacer("pcie0", 10 * MB, directory=directory, clock=virtual.clock, sleep=virtual.sleep)
        for _ in range(2)
    )
    yield pacers
    for pacer in pacers:
        pacer.close()


# The bus as a fluid.


def test_copies_share_the_bus_evenly_until_one_has_ended():
    under_way = {0: (10.0, math.inf), 1: (30.0, math.inf)}
    at_s, ends_s = flow(under_way, 10.0, at_s=0.0, until_s=math.inf)
    assert ends_s == pytest.approx({0: 2.0, 1: 4.0})
    assert at_s == pytest.approx(4.0)
    assert under_way == {}


def test_what_a_slow_link_cannot_take_is_its_neighbours():
    under_way = {0: (10.0, 2.0), 1: (40.0, math.inf)}
    assert flow(under_way, 10.0, 0.0, math.inf)[1] == pytest.approx({0: 5.0, 1: 5.0})


@given(
    st.dictionaries(
        st.integers(0, 9),
        st.tuples(st.floats(1, 1e9), st.floats(1e3, 1e9) | st.just(math.inf)),
        max_size=6,
    ),
    st.floats(1e3, 1e9),
    st.lists(st.floats(0, 1e3), max_size=6).map(sorted),
)
def test_however_often_one_looks_the_bus_carries_the_same_and_never_more(copies, rate, looks):
    at_once = dict(copies)
    ends_s = flow(at_once, rate, 0.0, math.inf)[1]
    under_way, at_s, seen_s = dict(copies), 0.0, {}
    for until_s in [*looks, math.inf]:
        before, start_s = sum(left for left, _ in under_way.values()), at_s
        at_s, ended = flow(under_way, rate, at_s, until_s)
        seen_s |= ended
        moved = before - sum(left for left, _ in under_way.values())
        assert moved <= rate * (at_s - start_s) * (1 + 1e-6) + 1e-6
    assert seen_s == pytest.approx(ends_s, rel=1e-6)
    assert set(ends_s) == set(copies)


# One timeline for all.


def test_a_copy_alone_takes_its_bytes_and_one_sleep(virtual, pair):
    first, _ = pair
    first.start(DOWN, MB, virtual.now_s)
    assert first.wait(DOWN) == pytest.approx(50.1)
    assert virtual.sleeps == 1


def test_copies_of_two_links_that_overlap_share_the_bus(virtual, pair):
    first, second = pair
    first.start(DOWN, MB, virtual.now_s)
    second.start(DOWN, MB, virtual.now_s)
    assert first.wait(DOWN) == pytest.approx(50.2)
    assert second.wait(DOWN) == pytest.approx(50.2)
    assert virtual.sleeps == 1  # the second's had ended too


def test_a_copy_that_begins_later_delays_the_first_only_from_then_on(virtual, pair):
    first, second = pair
    first.start(DOWN, MB, virtual.now_s)
    virtual.before_s[50.05] = lambda: second.start(DOWN, MB, virtual.now_s)
    assert first.wait(DOWN) == pytest.approx(50.15)
    assert second.wait(DOWN) == pytest.approx(50.2)


def test_directions_do_not_share(virtual, pair):
    first, second = pair
    first.start(DOWN, MB, virtual.now_s)
    second.start(UP, MB, virtual.now_s)
    assert first.wait(DOWN) == second.wait(UP) == pytest.approx(50.1)


def test_a_links_own_bandwidth_is_its_limit(virtual, pair):
    first, second = pair
    first.start(DOWN, MB, virtual.now_s, most_bytes_per_s=2 * MB)
    second.start(DOWN, 4 * MB, virtual.now_s)
    assert second.wait(DOWN) == pytest.approx(50.5)
    assert first.wait(DOWN) == pytest.approx(50.5)


def test_waking_late_does_not_add_up(virtual, pair):
    first, _ = pair
    virtual.late_s = 0.03
    ready_s = virtual.now_s
    for _ in range(10):
        first.start(DOWN, MB, ready_s)
        ready_s = first.wait(DOWN)
    assert ready_s == pytest.approx(51.0)
    assert virtual.sleeps == 10


def test_time_that_others_used_is_not_given_again(virtual, pair):
    """Ready since 50.0 and come at 50.08, when the other has the bus: nothing before counts."""
    first, second = pair
    second.start(DOWN, MB, virtual.now_s)
    virtual.now_s = 50.08
    first.start(DOWN, MB, 50.0)
    assert second.wait(DOWN) == pytest.approx(50.12)
    assert first.wait(DOWN) == pytest.approx(50.2)


def test_the_bandwidth_can_change_under_a_copy(virtual, pair):
    first, second = pair
    first.start(DOWN, MB, virtual.now_s)
    virtual.before_s[50.05] = lambda: second.set_bandwidth(5 * MB)
    assert first.wait(DOWN) == pytest.approx(50.15)
    assert first.bytes_per_s == 5 * MB
    first.start(DOWN, MB, virtual.now_s)
    virtual.before_s[50.2] = lambda: second.set_bandwidth(10 * MB)
    assert first.wait(DOWN) == pytest.approx(50.275, abs=0.1)  # noticed at the end of a sleep


def test_a_holder_that_is_gone_owes_nothing(virtual, pair):
    first, second = pair
    second.start(DOWN, MB, virtual.now_s)
    second.close()
    first.start(DOWN, 2 * MB, virtual.now_s)
    assert first.wait(DOWN) == pytest.approx(50.3)


def test_a_clock_that_jumps_back_holds_nobody_up(virtual, pair):
    first, _ = pair
    first.start(DOWN, MB, virtual.now_s)
    first.wait(DOWN)
    virtual.now_s = 10.0
    first.start(DOWN, MB, virtual.now_s)
    assert first.wait(DOWN) == pytest.approx(10.1)


def test_a_copy_of_no_bytes_ends_at_once(virtual, pair):
    first, _ = pair
    first.start(DOWN, 0, virtual.now_s)
    assert first.wait(DOWN) == pytest.approx(50.0)


def test_all_holders_of_a_bus_agree_on_its_bandwidth(directory, pair):
    pair[0].set_bandwidth(3 * MB)
    with pytest.raises(LinkError, match="same bandwidth"):
        Pacer("pcie0", 3 * MB, directory=directory)
    joined = Pacer("pcie0", 10 * MB, directory=directory)
    assert joined.bytes_per_s == 3 * MB
    joined.close()


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_bandwidth_is_refused(directory, pair, wrong):
    with pytest.raises(LinkError, match="bandwidth above 0"):
        Pacer("pcie1", wrong, directory=directory)
    with pytest.raises(LinkError, match="bandwidth above 0"):
        pair[0].set_bandwidth(wrong)
    assert pair[0].bytes_per_s == 10 * MB


# Processes.


def copying(directory: Path, connection, nbytes: int) -> None:
    """A link that always copies, until it is killed: tells when each copy ended."""
    pacer = Pacer("pcie0", 50 * MB, directory=directory)
    connection.send("ready")
    connection.recv()
    ready_s = time.perf_counter()
    while True:
        pacer.start(DOWN, nbytes, ready_s)
        ready_s = pacer.wait(DOWN)
        connection.send(ready_s)


class Copier:
    def __init__(self, directory: Path, nbytes: int) -> None:
        self.connection, theirs = SPAWN.Pipe()
        self.nbytes = nbytes
        self.ends_s: list[float] = []
        self.process = SPAWN.Process(target=copying, args=(directory, theirs, nbytes), daemon=True)
        self.process.start()
        theirs.close()

    def hear(self) -> object:
        assert self.connection.poll(DEADLINE_S)
        return self.connection.recv()

    def bytes_between(self, begin_s: float, end_s: float) -> int:
        return self.nbytes * sum(begin_s < at_s <= end_s for at_s in self.ends_s)


def test_two_processes_share_a_bus_and_one_that_is_killed_leaves_it_to_the_other(directory):
    copiers = [Copier(directory, MB), Copier(directory, 2 * MB)]
    doomed, survivor = copiers
    try:
        for copier in copiers:
            assert copier.hear() == "ready"
        for copier in copiers:
            copier.connection.send("go")
        for copier in copiers:
            copier.ends_s.append(copier.hear())
        begin_s = max(copier.ends_s[0] for copier in copiers)
        for copier in copiers:
            while copier.ends_s[-1] < begin_s + 1.0:
                copier.ends_s.append(copier.hear())
        moved = [copier.bytes_between(begin_s, begin_s + 1.0) for copier in copiers]
        edges = 2 * sum(copier.nbytes for copier in copiers)  # copies that the second cuts in two
        assert sum(moved) <= 50 * MB + edges
        assert moved[0] == pytest.approx(moved[1], rel=0.3)
        os.kill(doomed.process.pid, signal.SIGKILL)
        doomed.process.join()
        killed_s = time.perf_counter()
        # Alone, each copy takes half the time that it took beside the other.
        gap_s = math.inf
        while gap_s > 1.2 * survivor.nbytes / (50 * MB):
            survivor.ends_s.append(survivor.hear())
            gap_s = survivor.ends_s[-1] - survivor.ends_s[-2]
            assert time.perf_counter() < killed_s + DEADLINE_S
    finally:
        for copier in copiers:
            copier.process.kill()
            copier.process.join()
