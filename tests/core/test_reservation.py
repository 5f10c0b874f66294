"""Reservations in one domain: never above capacity, whoever asks, dies or comes back."""

import mmap
import multiprocessing
import os
import random
import signal
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from select_n_core.decisions.lease import paged
from select_n_core.errors import HostMemoryError
from select_n_core.memory.audit import audit, mapped_files
from select_n_core.memory.domain import Domain
from select_n_core.memory.ledger_file import LedgerReader, domains_at, read_ledger
from select_n_core.memory.reservation import Reservation, file_of

PAGE = mmap.PAGESIZE
CAPACITY = 100 * PAGE
DOMAIN = Domain("test", 2 * CAPACITY, CAPACITY)
DEADLINE_S = 60.0


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "runtime"


@pytest.fixture
def opened(directory):
    """Opens reservations, each as another process would, and closes them with the test."""
    with ExitStack() as ends:

        def make(name: str, domain: Domain = DOMAIN) -> Reservation:
            reservation = Reservation(domain, name, directory=directory)
            ends.callback(reservation.close)
            return reservation

        yield make


def die(reservation: Reservation) -> None:
    """What is left when a process was killed: its files are closed, and that is all."""
    os.close(reservation._fd)
    reservation._fd = -1


class TestOneDomain:
    def test_what_fits_is_written_down_in_whole_pages(self, opened):
        one = opened("one")
        one.reserve("a", "unit 1", 3 * PAGE + 1)
        assert one.held_bytes == one.ledger().used_bytes == 4 * PAGE
        assert one.pins()["a"].what == "unit 1"

    def test_what_does_not_fit_is_refused_with_who_holds_what(self, opened):
        one, other = opened("one"), opened("other")
        one.set_floor(20 * PAGE)
        one.reserve("a", "unit 1", 90 * PAGE)
        who = (
            r"unit 2 of other takes 44 KiB of host memory, 40 KiB of 400 KiB are free "
            rf"\(one \(process {os.getpid()}\) 360 KiB, 80 KiB of it its floor\); lower"
        )
        with pytest.raises(HostMemoryError, match=who):
            other.reserve("b", "unit 2", 11 * PAGE)
        other.reserve("b", "unit 2", 10 * PAGE)
        assert other.ledger().free_bytes == 0

    def test_a_file_that_several_map_is_counted_once_until_the_last_one_releases(self, opened):
        one, other = opened("one"), opened("other")
        for each in (one, other, other):
            each.reserve("a", "unit 1", 90 * PAGE)
        assert one.ledger().used_bytes == 90 * PAGE
        one.release("a")
        other.release("a")
        assert other.ledger().used_bytes == other.held_bytes == 90 * PAGE
        other.release("a")
        assert other.ledger().used_bytes == other.held_bytes == 0

    def test_what_is_kept_aside_nobody_else_gets_and_pins_come_out_of_it(self, opened):
        one, other = opened("one"), opened("other")
        one.set_aside(60 * PAGE)
        with pytest.raises(HostMemoryError):
            other.reserve("b", "unit 2", 41 * PAGE)
        other.reserve("b", "unit 2", 40 * PAGE)
        one.reserve("a", "unit 1", 25 * PAGE)
        assert one.aside_bytes == 35 * PAGE
        assert one.ledger().used_bytes == CAPACITY
        one.set_aside(0)
        assert one.ledger().used_bytes == 65 * PAGE

    def test_what_another_pinned_already_is_not_taken_from_what_is_kept(self, opened):
        one, other = opened("one"), opened("other")
        one.reserve("a", "unit 1", 30 * PAGE)
        other.set_aside(30 * PAGE)
        other.reserve("a", "unit 1", 30 * PAGE)
        assert other.aside_bytes == 30 * PAGE

    def test_the_dead_hold_nothing_and_nobody_takes_their_place_for_theirs(self, opened):
        one, other = opened("one"), opened("other")
        one.reserve("a", "unit 1", 90 * PAGE)
        die(one)
        other.reserve("b", "unit 2", CAPACITY)
        third = opened("third")
        assert [each.name for each in third.ledger().holders] == ["other", "third"]
        assert third.held_bytes == 0

    def test_a_closed_reservation_gives_all_back_and_takes_nothing_more(self, opened):
        one, other = opened("one"), opened("other")
        one.reserve("a", "unit 1", 90 * PAGE)
        one.close()
        one.close()
        assert other.ledger().used_bytes == 0
        one.release("a")
        with pytest.raises(HostMemoryError, match="closed; open another"):
            one.reserve("b", "unit 2", PAGE)

    def test_a_budget_below_what_is_used_takes_nothing_away_and_lets_nothing_in(self, opened):
        one, other = opened("one"), opened("other")
        one.reserve("a", "unit 1", 50 * PAGE)
        other.set_budget(40 * PAGE)
        assert one.held_bytes == 50 * PAGE
        with pytest.raises(HostMemoryError, match="0 B of 160 KiB are free"):
            other.reserve("b", "unit 2", PAGE)
        one.release("a")
        other.reserve("b", "unit 2", 40 * PAGE)
        other.set_budget(None)
        other.reserve("c", "unit 3", 60 * PAGE)

    def test_a_budget_is_never_more_than_the_domain_has_and_ends_with_the_last_holder(self, opened):
        one = opened("one")
        one.set_budget(2 * CAPACITY)
        assert one.ledger().limit_bytes == CAPACITY
        one.set_budget(PAGE)
        die(one)
        assert opened("other").ledger().limit_bytes == CAPACITY

    def test_who_waits_is_seen_and_served_when_others_give_back(self, opened):
        one, other = opened("one"), opened("other")
        one.reserve("a", "unit 1", 90 * PAGE)
        seen = []

        def give_back(_: float) -> None:
            seen.extend(each.waiting_bytes for each in one.ledger().holders)
            one.release("a")

        other.wait_aside(lambda: 20 * PAGE, 1.0, clock=lambda: 0.0, pause=give_back)
        assert seen == [0, 20 * PAGE]
        assert other.aside_bytes == 20 * PAGE
        assert [each.waiting_bytes for each in other.ledger().holders] == [0, 0]

    def test_who_waits_in_vain_is_told_and_waits_no_more(self, opened):
        one, other = opened("one"), opened("other")
        one.reserve("a", "unit 1", 90 * PAGE)
        now_s = iter([0.0, 0.5, 1.0])
        with pytest.raises(HostMemoryError, match="one"):
            other.wait_aside(
                lambda: 20 * PAGE, 1.0, clock=lambda: next(now_s), pause=lambda _: None
            )
        assert [each.waiting_bytes for each in other.ledger().holders] == [0, 0]

    def test_what_a_group_shares_is_counted_once_and_groups_add_up(self, directory):
        with ExitStack() as ends:
            one, other, alone = (
                ends.enter_context(Reservation(DOMAIN, name, group=group, directory=directory))
                for name, group in (("one", "g"), ("other", "g"), ("alone", ""))
            )
            for each in (one, other):
                each.reserve("a", "unit 1", 10 * PAGE)
            one.set_aside(5 * PAGE)
            other.reserve("b", "host KV", 2 * PAGE)
            alone.reserve("c", "unit 1", 4 * PAGE)
            ledger = alone.ledger()
            place = ledger.holders[2].place
            assert ledger.held_bytes_by_group() == {"g": 17 * PAGE, f"place {place}": 4 * PAGE}
            assert ledger.used_bytes == 21 * PAGE

    def test_domains_do_not_share(self, opened):
        opened("one").reserve("a", "unit 1", CAPACITY)
        opened("other", Domain("another", CAPACITY, PAGE)).reserve("b", "unit 2", PAGE)


class TestFiles:
    def test_whoever_only_looks_is_no_holder(self, opened, directory):
        one = opened("one")
        one.reserve("a", "unit 1", PAGE)
        assert read_ledger(DOMAIN, directory) == one.ledger()

    def test_who_reads_again_and_again_sees_each_change_and_soon_each_death(
        self, opened, directory
    ):
        now_s = 0.0
        reader = LedgerReader(DOMAIN, directory, recheck_s=1.0, clock=lambda: now_s)
        assert reader.read().holders == ()
        one = opened("one")
        one.reserve("a", "unit 1", 3 * PAGE)
        assert reader.read().used_bytes == 3 * PAGE
        die(one)
        assert reader.read().used_bytes == 3 * PAGE, "nobody wrote that"
        now_s = 1.0
        assert reader.read().used_bytes == 0

    def test_the_ledgers_of_this_boot_are_found_and_a_damaged_one_is_said(self, directory):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        here = Domain(f"{boot}-node", 2 * CAPACITY, CAPACITY)
        before = Domain("another-boot-node", 2 * CAPACITY, CAPACITY)
        with ExitStack() as ends:
            for domain in (here, before):
                reservation = Reservation(domain, "one", directory=directory)
                ends.enter_context(reservation).reserve("a", "unit 1", PAGE)
            (found,) = domains_at(directory)
            assert (found.id, found.capacity_bytes) == (here.id, CAPACITY)
            assert read_ledger(found, directory).used_bytes == PAGE
            (directory / f"host-1-{here.id}.json").write_text("{")
            with pytest.raises(HostMemoryError, match="is damaged"):
                domains_at(directory)

    def test_files_that_were_cleaned_away_are_made_again_by_those_who_hold(
        self, opened, directory, caplog
    ):
        one, other = opened("one"), opened("other")
        one.reserve("a", "unit 1", 60 * PAGE)
        other.reserve("b", "unit 2", 30 * PAGE)
        for path in directory.glob("host-*"):
            path.unlink()
        for each in (one, other):
            each.keep()
        assert read_ledger(DOMAIN, directory).used_bytes == 90 * PAGE
        with pytest.raises(HostMemoryError):
            opened("third").reserve("c", "unit 3", 11 * PAGE)
        assert "its holders meet anew" in caplog.text

    def test_a_damaged_ledger_is_written_anew_and_not_in_silence(self, opened, directory, caplog):
        one = opened("one")
        one.reserve("a", "unit 1", 60 * PAGE)
        (path,) = directory.glob("host-*.json")
        path.write_text("{")
        assert one.ledger().used_bytes == 60 * PAGE
        assert "is damaged" in caplog.text

    def test_a_folder_that_others_can_enter_is_refused_with_the_mend(self, tmp_path):
        tmp_path.chmod(0o755)
        with pytest.raises(HostMemoryError, match="chmod 700"):
            Reservation(DOMAIN, "one", directory=tmp_path)

    def test_a_ledger_that_somebody_keeps_locked_is_an_error_that_says_so(self, opened, directory):
        one = opened("one")
        with one._files.locked(), pytest.raises(HostMemoryError, match="end the process"):
            Reservation(DOMAIN, "other", directory=directory, patience_s=0.05)

    def test_a_release_amid_another_call_is_struck_when_that_ends(self, opened):
        """As when the last view of a map is collected while its thread writes the ledger."""
        one = opened("one")
        one.reserve("a", "unit 1", PAGE)
        with one._change():
            one.release("a")
            assert one.held_bytes == PAGE
        assert one.held_bytes == one.ledger().used_bytes == 0

    def test_threads_of_one_holder_lose_nothing(self, opened):
        one = opened("one")

        def pin(thread: int) -> None:
            for number in range(8):
                one.reserve(f"{thread} {number}", "unit", PAGE)
                if number % 2:
                    one.release(f"{thread} {number}")

        threads = [threading.Thread(target=pin, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert one.held_bytes == one.ledger().used_bytes == 16 * PAGE


class Histories(RuleBasedStateMachine):
    """Any history of holders of one domain, against a model that only adds up."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.ends = ExitStack()
        temporary = self.ends.enter_context(tempfile.TemporaryDirectory())
        self.directory = Path(temporary) / "runtime"
        self.maps: dict[Reservation, dict[str, int]] = {}
        self.aside: dict[Reservation, int] = {}
        self.sizes: dict[str, int] = {}
        self.budget: int | None = None

    def teardown(self) -> None:
        for each in self.maps:
            each.close()
        self.ends.close()

    @property
    def used(self) -> int:
        files = {file for maps in self.maps.values() for file in maps}
        return sum(self.sizes[file] for file in files) + sum(self.aside.values())

    @property
    def limit(self) -> int:
        return CAPACITY if self.budget is None else min(CAPACITY, self.budget)

    @rule(target=holders)
    def come(self) -> Reservation:
        if not self.maps:
            self.budget = None
        new = Reservation(DOMAIN, "one", directory=self.directory)
        self.maps[new], self.aside[new] = {}, 0
        return new

    @rule(holder=holders, file=st.sampled_from("abcdef"), pages=st.integers(1, 70))
    def reserve(self, holder: Reservation, file: str, pages: int) -> None:
        known = any(file in maps for maps in self.maps.values())
        nbytes = self.sizes[file] if known else pages * PAGE
        drawn = min(self.aside[holder], nbytes)
        fits = known or nbytes <= drawn or self.used + nbytes - drawn <= self.limit
        if not fits:
            with pytest.raises(HostMemoryError):
                holder.reserve(file, "unit", nbytes)
            return
        holder.reserve(file, "unit", nbytes)
        self.sizes[file] = nbytes
        self.maps[holder][file] = self.maps[holder].get(file, 0) + 1
        if not known:
            self.aside[holder] -= drawn

    @rule(holder=holders, data=st.data())
    def release(self, holder: Reservation, data) -> None:
        maps = self.maps[holder]
        if maps:
            file = data.draw(st.sampled_from(sorted(maps)))
            holder.release(file)
            maps[file] -= 1
            if not maps[file]:
                del maps[file]

    @rule(holder=holders, pages=st.integers(0, 70))
    def set_aside(self, holder: Reservation, pages: int) -> None:
        more = pages * PAGE - self.aside[holder]
        if more > 0 and self.used + more > self.limit:
            with pytest.raises(HostMemoryError):
                holder.set_aside(pages * PAGE)
        else:
            holder.set_aside(pages * PAGE)
            self.aside[holder] = pages * PAGE

    @rule(holder=holders, pages=st.none() | st.integers(0, 120))
    def set_budget(self, holder: Reservation, pages: int | None) -> None:
        self.budget = None if pages is None else pages * PAGE
        holder.set_budget(self.budget)

    @rule(holder=consumes(holders), how=st.sampled_from([die, Reservation.close]))
    def end(self, holder: Reservation, how) -> None:
        del self.maps[holder], self.aside[holder]
        how(holder)

    @invariant()
    def the_ledger_is_what_the_living_hold_and_never_above_capacity(self) -> None:
        ledger = read_ledger(DOMAIN, self.directory)
        assert ledger.used_bytes == self.used <= CAPACITY
        assert {each.held_bytes for each in self.maps} == {
            each.held_bytes for each in ledger.holders
        }


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["select_n_core.memory.reservation", "select_n_core.memory.audit"])


def work(directory: Path, seed: int, connection) -> None:
    """Pin, release and keep aside at random until told to end; then what the audit finds."""
    chance = random.Random(seed)
    reservation = Reservation(DOMAIN, f"worker {seed}", directory=directory)
    maps: dict[str, mmap.mmap] = {}
    refused = 0
    connection.send("here")
    while not connection.poll(0):
        what = chance.random()
        try:
            if what < 0.4 and maps:
                file = chance.choice(sorted(maps))
                maps.pop(file).close()
                reservation.release(file)
            elif what < 0.5:
                reservation.set_aside(chance.randrange(20) * PAGE)
            else:
                fd = os.memfd_create("select-n:test")
                os.ftruncate(fd, nbytes := chance.randrange(1, 40 * PAGE))
                try:
                    reservation.reserve(file_of(fd), "test", nbytes)
                    maps[file_of(fd)] = mmap.mmap(fd, nbytes)
                finally:
                    os.close(fd)
        except HostMemoryError:
            refused += 1
    connection.recv()
    connection.send((refused, audit(reservation.ledger(), os.getpid())))
    connection.recv()  # which never comes: it is killed


class Worker:
    """A process that pins at random."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.connection, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=work, args=(directory, seed, theirs), daemon=True)
        self.process.start()
        theirs.close()
        assert self.answer() == "here"

    @property
    def pid(self) -> int:
        return self.process.pid

    def answer(self):
        assert self.connection.poll(DEADLINE_S), "the worker does not answer"
        return self.connection.recv()

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        while _state(self.pid) != "T":
            os.sched_yield()

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.join(DEADLINE_S)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_processes_that_pin_release_and_die_at_random_never_map_more_than_there_is(directory):
    """At instants when all of them stand still, the kernel's own count is taken."""
    chance = random.Random(0)
    workers = [Worker(directory, seed) for seed in range(3)]
    most = 0
    for instant in range(60):
        for _ in range(3):
            assert read_ledger(DOMAIN, directory).used_bytes <= CAPACITY  # they go on meanwhile
        for worker in workers:
            worker.stop()
        files = {}
        for worker in workers:
            files |= mapped_files(worker.pid)
        mapped = sum(each.nbytes for each in files.values())
        assert mapped <= CAPACITY
        most = max(most, mapped)
        killed = chance.choice(workers) if instant % 10 == 9 else None
        if killed is not None:
            killed.kill()
            workers.remove(killed)
        for worker in workers:
            worker.go_on()
        if killed is not None:
            workers.append(Worker(directory, instant))
    for worker in workers:
        worker.connection.send("end")
    ends = [worker.answer() for worker in workers]
    assert sum(refused for refused, _ in ends) > 0, "it was never full"
    assert most > CAPACITY // 2, "it was never nearly full"
    assert all(differences == () for _, differences in ends)
    for worker in workers:
        worker.kill()
    assert read_ledger(DOMAIN, directory).holders == ()


class TestAudit:
    def test_a_map_that_was_never_reserved_and_one_that_is_not_mapped_are_both_found(self, opened):
        one = opened("one")
        fd = os.memfd_create("select-n:wild")
        os.ftruncate(fd, 3 * PAGE + 1)
        with mmap.mmap(fd, 3 * PAGE + 1) as pages:
            (wild,) = audit(one.ledger(), os.getpid())
            assert (wild.what, wild.reserved_bytes, wild.mapped_bytes) == ("wild", 0, 4 * PAGE)
            pages[0] = 1
            assert mapped_files(os.getpid())[file_of(fd)].resident_bytes == PAGE
            one.reserve(file_of(fd), "tame", 3 * PAGE + 1)
            assert audit(one.ledger(), os.getpid()) == ()
        (gone,) = audit(one.ledger(), os.getpid())
        assert (gone.what, gone.reserved_bytes, gone.mapped_bytes) == ("tame", 4 * PAGE, 0)
        os.close(fd)

    def test_a_file_mapped_twice_counts_once(self, opened):
        one = opened("one")
        fd = os.memfd_create("select-n:twice")
        os.ftruncate(fd, PAGE)
        one.reserve(file_of(fd), "twice", PAGE)
        with mmap.mmap(fd, PAGE), mmap.mmap(fd, PAGE):
            assert audit(one.ledger(), os.getpid()) == ()
        os.close(fd)

    def test_a_size_is_in_whole_pages(self):
        assert [paged(nbytes) for nbytes in (0, 1, PAGE, PAGE + 1)] == [0, PAGE, PAGE, 2 * PAGE]
