"""The board between real processes: shares that follow who is there, and boards that are broken."""

import logging
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from select_n_core.config import LinkConfig
from select_n_core.decisions.bus import SHARED
from select_n_core.errors import LinkError
from select_n_core.links.board import Member
from select_n_core.links.mapped import MappedWords

SPAWN = multiprocessing.get_context("spawn")
CAPACITY = 1e9
WHOLE = SHARED * CAPACITY
DEADLINE_S = 20.0
TICK_S = 0.005


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


def ticking(directory: Path, connection, demand: float) -> None:
    """A replica: joins, ticks all the time, and tells its share when it is asked."""
    with Member("pcie0", CAPACITY, directory=directory) as member:
        connection.send("joined")
        while True:
            granted = member.tick(demand)
            if connection.poll(TICK_S):
                if connection.recv() == "leave":
                    return
                connection.send(granted)


class Peer:
    """A replica in another process."""

    def __init__(self, directory: Path, demand: float) -> None:
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=ticking, args=(directory, theirs, demand), daemon=True)
        self.process.start()
        theirs.close()

    def joined(self) -> None:
        assert self.connection.poll(DEADLINE_S)
        assert self.connection.recv() == "joined"

    def granted(self) -> float:
        self.connection.send("share?")
        assert self.connection.poll(DEADLINE_S)
        return self.connection.recv()

    def leave(self) -> None:
        self.connection.send("leave")
        self.process.join(DEADLINE_S)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@contextmanager
def peer(directory: Path, demand: float = math.inf) -> Iterator[Peer]:
    started = Peer(directory, demand)
    try:
        started.joined()
        yield started
    finally:
        if started.process.is_alive():
            started.process.kill()
        started.process.join()


def seconds_until(holds: Callable[[], bool]) -> float:
    begun_s = time.monotonic()
    while not holds():
        assert time.monotonic() < begun_s + DEADLINE_S, "it never came to that"
        time.sleep(TICK_S)
    return time.monotonic() - begun_s


def about(value: float) -> object:
    return pytest.approx(value, rel=1e-6)


# Processes.


def test_two_processes_share_the_bus_evenly_and_one_that_leaves_frees_its_share(directory):
    with Member("pcie0", CAPACITY, directory=directory) as ours:
        assert ours.tick(math.inf) == about(WHOLE)
        with peer(directory) as theirs:
            seconds_until(lambda: ours.tick(math.inf) == about(WHOLE / 2))
            seconds_until(lambda: theirs.granted() == about(WHOLE / 2))
            assert ours.members == 2
            theirs.leave()
            assert ours.tick(math.inf) == about(WHOLE)


def test_what_a_process_does_not_want_is_its_neighbours(directory):
    with (
        peer(directory, demand=WHOLE / 10) as theirs,
        Member("pcie0", CAPACITY, directory=directory) as ours,
    ):
        seconds_until(lambda: ours.tick(math.inf) == about(WHOLE * 0.9))
        seconds_until(lambda: theirs.granted() == about(WHOLE / 10))


def test_a_process_that_is_killed_frees_its_share_within_a_second(directory):
    with (
        Member("pcie0", CAPACITY, directory=directory) as ours,
        peer(directory) as theirs,
    ):
        seconds_until(lambda: ours.tick(math.inf) == about(WHOLE / 2))
        theirs.signal(signal.SIGKILL)
        assert seconds_until(lambda: ours.tick(math.inf) == about(WHOLE)) < 1.0


def test_a_process_that_is_frozen_frees_its_share_and_asks_anew_when_it_goes_on(directory):
    with (
        Member("pcie0", CAPACITY, directory=directory) as ours,
        peer(directory) as theirs,
    ):
        seconds_until(lambda: ours.tick(math.inf) == about(WHOLE / 2))
        theirs.signal(signal.SIGSTOP)
        seconds_until(lambda: ours.tick(math.inf) == about(WHOLE))
        theirs.signal(signal.SIGCONT)
        seconds_until(lambda: ours.tick(math.inf) == about(WHOLE / 2))
        seconds_until(lambda: theirs.granted() == about(WHOLE / 2))


def test_a_board_left_behind_by_dead_processes_is_used_again_from_the_start(directory):
    with peer(directory) as theirs:
        theirs.signal(signal.SIGKILL)
        theirs.process.join()
    (left,) = directory.glob("*.board1")
    before = left.stat().st_ino
    with Member("pcie0", CAPACITY / 2, directory=directory) as ours:
        assert left.stat().st_ino == before
        assert ours.members == 1
        assert ours.capacity_bytes_per_s == CAPACITY / 2
        assert ours.tick(math.inf) == about(WHOLE / 2)


# One process is enough for the rest: every member has a lock of its own.


@pytest.fixture
def pair(directory: Path) -> Iterator[tuple[Member, Member]]:
    with (
        Member("pcie0", CAPACITY, directory=directory) as first,
        Member("pcie0", CAPACITY / 7, directory=directory) as second,
    ):
        yield first, second


def test_who_joins_later_takes_over_what_is_known_of_the_bus(pair):
    assert pair[1].capacity_bytes_per_s == CAPACITY


def test_buses_of_other_names_have_nothing_to_do_with_each_other(directory, pair):
    with Member("pcie1", 3e9, directory=directory) as other:
        assert other.members == 1
        assert other.tick(math.inf) == about(SHARED * 3e9)


def test_an_idle_member_takes_nothing(pair):
    first, second = pair
    first.tick(math.inf)
    second.tick(math.inf)
    first.tick(0.0)
    assert second.tick(math.inf) == about(WHOLE)
    assert first.grant.copy_bytes_per_s == about(CAPACITY)  # second claimed nothing then
    first.tick(0.0)
    assert first.grant.copy_bytes_per_s == about(CAPACITY / 2)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def timed(directory: Path) -> Iterator[tuple[Clock, Member, Member]]:
    clock = Clock()
    with (
        Member("pcie0", CAPACITY, directory=directory, clock=clock) as first,
        Member("pcie0", CAPACITY, directory=directory, clock=clock) as second,
    ):
        yield clock, first, second


def iterate(timed, seconds: float, seen, **options) -> None:
    """Both members tick 20 times a second; each copy sees `seen`."""
    clock, *members = timed
    for _ in range(round(seconds * 20)):
        clock.now_s += 0.05
        for member in members:
            member.heartbeat()
            member.tick(math.inf, seen_bytes_per_s=seen, **options)


def test_members_that_both_copy_all_the_time_find_the_bus_and_its_slow_phase(timed):
    _, first, second = timed
    iterate(timed, 3, CAPACITY / 2, copying_share=1.0)
    assert first.capacity_bytes_per_s == second.capacity_bytes_per_s == CAPACITY
    iterate(timed, 1, CAPACITY / 4, copying_share=1.0)
    assert first.capacity_bytes_per_s == CAPACITY / 2
    assert first.grant.bytes_per_s == second.grant.bytes_per_s == about(WHOLE / 4)
    iterate(timed, 1, CAPACITY / 2, copying_share=1.0)
    assert first.capacity_bytes_per_s == CAPACITY


def test_without_a_copying_share_the_claim_tells_how_much_a_member_copies(timed):
    iterate(timed, 3, CAPACITY / 2)
    assert timed[1].capacity_bytes_per_s == pytest.approx(CAPACITY, rel=0.1)


def test_a_member_that_was_away_takes_only_what_the_others_have_left(timed):
    clock, first, second = timed
    assert first.tick(math.inf) == about(WHOLE)
    second.show(0.0, WHOLE)  # as it may have done, taking the other for dead
    clock.now_s += 2.0
    assert first.tick(math.inf) == 0.0
    second.show(0.0, 0.0)
    assert first.tick(math.inf) == about(WHOLE)


def test_a_member_that_stalls_for_a_second_leaves_the_bus_as_it_was(timed):
    clock, first, _ = timed
    iterate(timed, 3, CAPACITY / 2, copying_share=1.0)
    clock.now_s += 1.0
    first.heartbeat()
    first.tick(math.inf, seen_bytes_per_s=9e6, copying_share=1.0)
    assert first.capacity_bytes_per_s == CAPACITY
    iterate(timed, 0.1, CAPACITY / 2, copying_share=1.0)
    assert first.grant.bytes_per_s == about(WHOLE / 2)


@pytest.mark.parametrize("wrong", [math.nan, -1.0])
def test_numbers_that_cannot_be_are_left_out_and_said_once(timed, caplog, wrong):
    _, first, second = timed
    iterate(timed, 2, CAPACITY / 2, copying_share=1.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(30):
            granted = first.tick(wrong, seen_bytes_per_s=wrong, copying_share=wrong)
            second.tick(math.inf)
    assert granted == about(WHOLE / 2)
    assert first.capacity_bytes_per_s == CAPACITY
    assert len(caplog.records) == 3
    assert f"a demand of {wrong} is left out" in caplog.text


def test_a_capacity_that_cannot_be_is_refused(directory):
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(LinkError, match="measured bandwidth above 0"):
            Member("pcie0", wrong, directory=directory)


def test_leaving_twice_is_leaving_and_the_last_one_leaves_no_board(directory):
    member = Member("pcie0", CAPACITY, directory=directory)
    member.leave()
    member.leave()
    assert not list(directory.glob("*.board1"))
    with Member("pcie0", 2 * CAPACITY, directory=directory) as again:
        assert again.capacity_bytes_per_s == 2 * CAPACITY


# Broken boards.


def board_file(directory: Path) -> Path:
    with Member("pcie0", CAPACITY, directory=directory):
        (path,) = directory.glob("*.board1")
    path.touch(mode=0o600)
    return path


@pytest.mark.parametrize("left", [b"torn", b"\xff" * 4096, b""])
def test_a_torn_board_that_nobody_holds_is_made_anew_and_said(directory, caplog, left):
    board_file(directory).write_bytes(left)
    with Member("pcie0", CAPACITY, directory=directory) as member:
        assert member.tick(math.inf) == about(WHOLE)
    assert bool(left) == ("not whole" in caplog.text)


def test_a_board_that_living_processes_take_for_something_else_is_refused(directory):
    board_file(directory).unlink()
    other = MappedWords("pcie0", "board1", 9, 4, lambda numbers: None, directory=directory)
    try:
        with pytest.raises(LinkError, match="take it for something else"):
            Member("pcie0", CAPACITY, directory=directory)
    finally:
        other.close()
    with Member("pcie0", CAPACITY, directory=directory) as member:
        assert member.tick(math.inf) == about(WHOLE)


def test_a_board_that_is_a_link_to_another_file_is_refused(directory, tmp_path):
    path, elsewhere = board_file(directory), tmp_path / "precious"
    elsewhere.write_bytes(b"precious")
    path.unlink()
    path.symlink_to(elsewhere)
    with pytest.raises(LinkError, match="cannot share"):
        Member("pcie0", CAPACITY, directory=directory)
    assert elsewhere.read_bytes() == b"precious"


def test_a_folder_that_others_can_enter_is_refused(directory):
    directory.chmod(0o755)
    with pytest.raises(LinkError, match="chmod 700"):
        Member("pcie0", CAPACITY, directory=directory)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "x" * 65, ".hidden"])
def test_a_name_that_is_no_file_name_is_refused(directory, name):
    with pytest.raises(LinkError, match="a bus needs a name"):
        Member(name, CAPACITY, directory=directory)


def test_a_board_without_a_place_left_is_refused(directory):
    held = [
        MappedWords("pcie0", "small", 9, 2, lambda numbers: None, directory=directory)
        for _ in range(2)
    ]
    with pytest.raises(LinkError, match="all 2 places"):
        MappedWords("pcie0", "small", 9, 2, lambda numbers: None, directory=directory)
    assert [words.place for words in held] == [0, 1]
    assert [words.alone for words in held] == [True, False]
    held[0].close()
    third = MappedWords("pcie0", "small", 9, 2, lambda numbers: None, directory=directory)
    assert third.place == 0
    for words in (*held, third):
        words.close()


def test_members_whose_board_was_removed_meet_on_a_new_one(directory, pair, caplog):
    first, second = pair
    (path,) = directory.glob("*.board1")
    path.unlink()
    seconds_until(lambda: path.exists() and first.members == second.members == 2)

    def shared() -> bool:
        return first.tick(math.inf) == second.tick(math.inf) == about(WHOLE / 2)

    seconds_until(shared)
    assert "was removed" in caplog.text


# From the configuration.


def test_a_seat_follows_from_the_configuration(monkeypatch, tmp_path):
    from select_n_core.links.open import join_bus

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert join_bus(LinkConfig(kind="cuda"), 5e9, 1.0) is None
    alone = {"name": "pcie0", "coordinated": False}
    assert join_bus(LinkConfig(kind="cuda", bus=alone), 5e9, 1.0) is None
    with join_bus(LinkConfig(kind="cuda", bus={"name": "pcie0"}), 5e9, 1.0) as member:
        assert member.capacity_bytes_per_s == 5e9
    emulated = LinkConfig(
        kind="emulated", bandwidth="1GB/s", bus={"name": "pcie0", "bandwidth": "2GB/s"}
    )
    with join_bus(emulated, 0.9e9, 1.0) as member:
        assert member.capacity_bytes_per_s == 2e9
