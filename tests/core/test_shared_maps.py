"""Shared maps between real processes: filled once, charged once, alive until the last holder ends.

A peer is a process that does what it is told and answers. Peers are forked from a server that
has torch loaded already, so that many of them are cheap.
"""

import ctypes
import errno
import json
import logging
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from select_n_core.errors import HostMemoryError
from select_n_core.memory.room import runtime_directory
from select_n_core.memory.shared import SharedMap, SharedMaps
from select_n_core.memory.unit_maps import UnitMaps

torch.set_num_threads(1)

KEY = "llama-3f2a bfloat16 unit 7"
NBYTES = 300_001  # no whole number of pages
PAGED = -(-NBYTES // mmap.PAGESIZE) * mmap.PAGESIZE
DEADLINE_S = 60.0
NOBODY = 65534
PR_SET_DUMPABLE = 4

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["select_n_core.memory.shared"])


def write(value: int, bytes_: Tensor) -> None:
    bytes_.fill_(value)


def holds(bytes_: Tensor, value: int) -> bool:
    return bytes_.numel() == NBYTES and bool((bytes_ == value).all())


class Deeds:
    """What a peer can be told to do."""

    def __init__(self, directory: Path, connection) -> None:
        self.maps = SharedMaps(directory)
        self.connection = connection
        self.map: SharedMap | None = None
        self.logged: list[logging.LogRecord] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = self.logged.append
        logging.getLogger("select_n_core").addHandler(handler)

    def attach(self, value: int, key: str = KEY) -> bool:
        self.map = self.maps.attach(key, NBYTES, partial(write, value))
        return self.map.filled

    def attach_and_hang(self, value: int) -> None:
        """Write half of the bytes, say so, and never come back."""

        def fill(bytes_: Tensor) -> None:
            bytes_[: NBYTES // 2].fill_(value)
            self.connection.send("half")
            signal.pause()

        self.maps.attach(KEY, NBYTES, fill)

    def holds(self, value: int) -> bool:
        return holds(self.map.bytes, value)

    def holders(self) -> tuple[int, ...]:
        return self.map.holders()

    def key(self) -> str:
        return self.map.key

    def pages(self) -> dict[str, int]:
        """Bytes of the map by smaps field, once every page was read."""
        self.map.bytes.sum()
        text = Path("/proc/self/smaps").read_text()
        (found,) = re.findall(rf"memfd:select-n:{KEY}.*\n((?:\w+: .*\n)*)", text)
        return {name: int(kib) * 1024 for name, kib in re.findall(r"(\w+): +(\d+) kB", found)}

    def overwrite(self) -> None:
        self.map.bytes[0] = 1

    def close(self) -> None:
        self.map.close()

    def warnings(self) -> list[str]:
        return [record.getMessage() for record in self.logged]

    def hide(self) -> None:
        """Be a process that others of this user may not look into; root first becomes nobody."""
        if os.geteuid() == 0:
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)


def serve(directory: Path, connection, hidden: bool) -> None:
    if hidden:
        Deeds.hide(None)
    deeds = Deeds(directory, connection)
    while (told := connection.recv()) is not None:
        name, arguments = told
        connection.send(getattr(deeds, name)(*arguments))


class Peer:
    """Another process that has the maps of a directory."""

    def __init__(self, directory: Path, hidden: bool = False) -> None:
        self._connection, theirs = FORKS.Pipe()
        self._process = FORKS.Process(target=serve, args=(directory, theirs, hidden), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, deed: str, *arguments) -> None:
        self._connection.send((deed, arguments))

    def answer(self):
        assert self._connection.poll(DEADLINE_S), "the peer does not answer"
        return self._connection.recv()

    def do(self, deed: str, *arguments):
        self.tell(deed, *arguments)
        return self.answer()

    def is_silent(self, seconds: float) -> bool:
        return not self._connection.poll(seconds)

    def wait(self) -> int:
        self._process.join(DEADLINE_S)
        return self._process.exitcode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def end(self) -> None:
        if self._process.is_alive():
            self._connection.send(None)
            self.wait()


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "maps"


@pytest.fixture
def maps(directory) -> SharedMaps:
    return SharedMaps(directory)


@pytest.fixture
def peer(directory):
    """Makes peers on the test's directory, and ends them with it."""
    with ExitStack() as ends:

        def make() -> Peer:
            made = Peer(directory)
            ends.callback(made.end)
            return made

        yield make


@contextmanager
def attached(maps: SharedMaps, value: int, key: str = KEY, nbytes: int = NBYTES):
    found = maps.attach(key, nbytes, partial(write, value))
    try:
        yield found
    finally:
        found.close()


def entry_file(directory: Path) -> Path:
    (found,) = directory.glob("*/*.json")
    return found


def test_the_second_process_reads_what_the_first_has_written(peer):
    first, second = peer(), peer()
    assert first.do("attach", 1) is True
    assert second.do("attach", 2) is False
    assert first.do("holds", 1)
    assert second.do("holds", 1)
    assert first.do("holders") == second.do("holders") == tuple(sorted((first.pid, second.pid)))


def test_two_processes_hold_the_same_pages_and_each_is_charged_half(peer):
    first, second = peer(), peer()
    first.do("attach", 1)
    alone = first.do("pages")
    assert alone["Private_Clean"] + alone["Private_Dirty"] == alone["Pss"] == PAGED
    second.do("attach", 2)
    first_pages, second_pages = (first.do("pages"), second.do("pages"), first.do("pages"))[1:]
    for pages in (first_pages, second_pages):
        assert pages["Shared_Clean"] + pages["Shared_Dirty"] == pages["Rss"] == PAGED
        assert pages["Private_Clean"] + pages["Private_Dirty"] == 0
    assert first_pages["Pss"] + second_pages["Pss"] == PAGED


def test_the_ledger_counts_a_key_once_however_many_hold_it(maps, peer):
    peers = [peer() for _ in range(3)]
    for each in peers:
        each.do("attach", 1)
    with attached(maps, 5, "another", 4096):
        charges = maps.ledger()
        assert {key: charge.nbytes for key, charge in charges.items()} == {
            KEY: NBYTES,
            "another": 4096,
        }
        assert charges[KEY].pids == tuple(sorted(each.pid for each in peers))
        assert maps.charged_bytes(KEY) == NBYTES
    assert set(maps.ledger()) == {KEY}
    for each in peers:
        assert maps.charged_bytes(KEY) == NBYTES
        each.do("close")
    assert maps.charged_bytes(KEY) == 0
    assert maps.ledger() == {}


def test_the_bytes_survive_whoever_filled_them_and_are_found_through_others(maps, peer):
    first, second, third = peer(), peer(), peer()
    first.do("attach", 1)
    second.do("attach", 2)
    first.kill()
    assert second.do("holds", 1)
    assert maps.holders(KEY) == (second.pid,)
    assert third.do("attach", 3) is False
    assert third.do("holds", 1)
    second.do("close")
    assert third.do("holders") == (third.pid,)
    with attached(maps, 4) as here:
        assert holds(here.bytes, 1)


def test_when_all_holders_died_the_next_one_fills_anew(maps, directory, peer):
    first, second = peer(), peer()
    first.do("attach", 1)
    second.do("attach", 2)
    first.kill()
    second.kill()
    assert entry_file(directory).exists()
    assert maps.ledger() == {}
    with attached(maps, 3) as here:
        assert here.filled
        assert holds(here.bytes, 3)
        assert here.holders() == (os.getpid(),)


def test_a_dead_process_that_nobody_has_reaped_holds_nothing(maps, directory):
    program = (
        "import sys, pathlib; from select_n_core.memory.shared import SharedMaps\n"
        "held = SharedMaps(pathlib.Path(sys.argv[1])).attach('k', 4096, lambda b: b.fill_(1))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert maps.holders("k") == (process.pid,)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{process.pid}/stat").exists()
        assert maps.ledger() == {}


def test_the_entries_of_the_dead_go_when_somebody_comes(directory, peer):
    first = peer()
    first.do("attach", 1)
    first.kill()
    SharedMaps(directory)
    assert list(directory.glob("*/*.json")) == []


def test_many_that_come_at_once_fill_once(peer):
    peers = [peer() for _ in range(5)]
    for value, each in enumerate(peers):
        each.tell("attach", value)
    filled = [each.answer() for each in peers]
    assert sum(filled) == 1
    for each in peers:
        assert each.do("holds", filled.index(True))


def test_threads_of_one_process_fill_once(maps):
    filled: list[int] = []
    held: list[SharedMap] = []

    def fill(bytes_: Tensor) -> None:
        filled.append(threading.get_ident())
        write(1, bytes_)

    def attach() -> None:
        held.append(maps.attach(KEY, NBYTES, fill))

    threads = [threading.Thread(target=attach) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(filled) == 1
    assert all(holds(each.bytes, 1) for each in held)
    assert maps.ledger()[KEY].pids == (os.getpid(),)
    for each in held[:-1]:
        each.close()
    assert maps.charged_bytes(KEY) == NBYTES
    held[-1].close()
    assert maps.charged_bytes(KEY) == 0


def test_a_fill_that_dies_half_way_is_never_taken_for_whole(maps, directory, peer):
    first, second = peer(), peer()
    first.tell("attach_and_hang", 1)
    assert first.answer() == "half"
    assert maps.find(KEY, NBYTES) is None  # and does not wait for it
    second.tell("attach", 2)
    assert second.is_silent(0.2), "it did not wait for the fill"
    assert list(directory.glob("*/*.json")) == []
    first.kill()
    assert second.answer() is True
    assert second.do("holds", 2)


def test_a_fill_that_fails_leaves_nothing_and_its_error_is_the_callers(maps, directory):
    def fail(bytes_: Tensor) -> None:
        write(1, bytes_)
        raise FileNotFoundError("no such checkpoint")

    with pytest.raises(FileNotFoundError, match="checkpoint"):
        maps.attach(KEY, NBYTES, fail)
    assert list(directory.glob("*/*.json")) == []
    with attached(maps, 2) as here:
        assert here.filled


def test_who_waits_too_long_for_a_fill_is_told_what_to_do(directory, peer):
    first = peer()
    first.tell("attach_and_hang", 1)
    assert first.answer() == "half"
    with pytest.raises(HostMemoryError, match="end the process that is stuck"):
        SharedMaps(directory, patience_s=0.05).attach(KEY, NBYTES, partial(write, 2))
    first.kill()


def test_another_size_under_the_same_key_is_refused_with_the_mend(maps, peer):
    first = peer()
    first.do("attach", 1)
    mend = rf"{NBYTES} bytes in processes {first.pid} and 4096 .* into the key, or end them"
    with pytest.raises(HostMemoryError, match=mend):
        maps.attach(KEY, 4096, partial(write, 2))
    first.do("close")
    with attached(maps, 2, nbytes=4096) as here:
        assert here.nbytes == here.bytes.numel() == 4096


def test_nobody_can_write_the_bytes_once_they_are_filled(maps, peer):
    first, second = peer(), peer()
    with attached(maps, 1) as here:
        assert here.read_only
        assert first.do("attach", 2) is False
        assert second.do("attach", 3) is False
        first.tell("overwrite")
        assert first.wait() == -signal.SIGSEGV
        fd = os.open(f"/proc/self/fd/{here.fd}", os.O_RDWR)
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            mmap.mmap(fd, NBYTES)
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            os.truncate(fd, 1)
        os.close(fd)
        assert holds(here.bytes, 1)
        assert second.do("holds", 1)


def test_a_fill_that_keeps_a_view_is_refused(maps, directory):
    kept: list[Tensor] = []
    with pytest.raises(HostMemoryError, match="drop every view"):
        maps.attach(KEY, NBYTES, lambda bytes_: kept.append(bytes_[:1]))
    assert list(directory.glob("*/*.json")) == []


def test_a_map_is_held_until_its_last_view_is_gone(maps):
    here = maps.attach(KEY, NBYTES, partial(write, 1))
    view = here.bytes[10:20]
    here.close()
    here.close()
    assert here.bytes.numel() == 0
    assert bool((view == 1).all())
    assert maps.holders(KEY) == (os.getpid(),)
    del view
    assert maps.holders(KEY) == ()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(here.fd)


def test_a_map_that_was_dropped_without_close_charges_nobody(maps):
    maps.attach(KEY, NBYTES, partial(write, 1))
    assert maps.ledger() == {}


@pytest.mark.parametrize("changed", ["started", "fd", "pid"])
def test_a_number_that_now_means_something_else_is_no_holder(maps, directory, changed):
    """Process and file numbers are used again; start time and inode tell."""
    with attached(maps, 1):
        file = entry_file(directory)
        entry = json.loads(file.read_text())
        with tempfile.TemporaryFile() as other:
            changes = {"started": 1, "fd": other.fileno(), "pid": os.getppid()}
            entry["holders"][0][changed] = changes[changed]
            file.write_text(json.dumps(entry))
            assert maps.ledger() == {}
            with attached(maps, 2) as here:
                assert here.filled
                assert holds(here.bytes, 2)


def test_a_damaged_entry_is_written_anew_and_not_in_silence(maps, directory, caplog):
    with attached(maps, 1):
        entry_file(directory).write_text("{")
        with attached(maps, 2) as here:
            assert here.filled
            assert maps.charged_bytes(KEY) == NBYTES
    assert "damaged" in caplog.text


def test_what_is_begun_is_found_when_it_is_published(maps, peer):
    begun = maps.begin(KEY, NBYTES)
    assert not begun.read_only
    assert maps.find(KEY, NBYTES) is None
    assert maps.charged_bytes(KEY) == 0
    assert [charge.nbytes for charge in maps.ledger().values()] == [NBYTES]
    begun.bytes.fill_(6)
    maps.publish(KEY, begun)
    assert {key: charge.nbytes for key, charge in maps.ledger().items()} == {KEY: NBYTES}
    other = peer()
    assert other.do("attach", 2) is False
    assert other.do("holds", 6)
    begun.close()
    assert maps.holders(KEY) == (other.pid,)
    other.tell("overwrite")
    assert other.wait() == -signal.SIGSEGV


def test_what_is_begun_and_given_up_leaves_nothing(maps, directory):
    maps.begin(KEY, NBYTES).close()
    assert maps.ledger() == {}
    assert list(directory.glob("*/*.json")) == []


def test_who_publishes_second_keeps_bytes_of_its_own_and_is_charged_for_them(maps, peer):
    begun = maps.begin(KEY, NBYTES)
    other = peer()
    other.do("attach", 1)
    begun.bytes.fill_(1)
    maps.publish(KEY, begun)
    assert maps.holders(KEY) == (other.pid,)
    assert begun.holders() == (os.getpid(),)
    assert sum(charge.nbytes for charge in maps.ledger().values()) == 2 * NBYTES
    begun.close()
    assert set(maps.ledger()) == {KEY}


def test_the_units_of_models_do_not_mix(maps):
    one, other = UnitMaps(maps, "llama bfloat16"), UnitMaps(maps, "llama float32")
    held = [one.attach(0, 4096, partial(write, 1)), one.attach(1, 4096, partial(write, 2))]
    held.append(other.begin(0, 8192))
    held[-1].bytes.fill_(3)
    assert other.find(0, 8192) is None
    other.publish(0, held[-1])
    held += [one.find(0, 4096), one.find(1, 4096), other.find(0, 8192)]
    assert [int(each.bytes[0]) for each in held] == [1, 2, 3, 1, 2, 3]
    assert sum(charge.nbytes for charge in maps.ledger().values()) == 16384
    assert maps.charged_bytes(one.key(0)) == 4096
    other.publish(0, held[-1])
    assert maps.charged_bytes(other.key(0)) == 8192
    for each in held:
        each.close()


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_map_of_nothing_is_refused(maps, nbytes):
    with pytest.raises(HostMemoryError, match="at least one byte"):
        maps.attach(KEY, nbytes, partial(write, 1))


def test_more_than_any_state_of_the_machine_could_hold_is_refused(maps):
    with pytest.raises(HostMemoryError, match="lower `host_memory`"):
        maps.attach(KEY, 1 << 46, partial(write, 1))


def test_torch_says_nothing_about_the_read_only_map(directory):
    """In a process of its own, as torch warns once at most."""
    program = (
        "import sys, pathlib; from select_n_core.memory.shared import SharedMaps\n"
        "held = SharedMaps(pathlib.Path(sys.argv[1])).attach('k', 4096, lambda b: b.fill_(1))\n"
        "assert held.bytes.sum() == 4096"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program, str(directory)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_folder_that_others_can_enter_is_refused_with_the_mend(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(HostMemoryError, match="chmod 700"):
        SharedMaps(tmp_path)


def test_a_folder_that_was_cleaned_away_is_made_again(maps, directory):
    with attached(maps, 1):
        shutil.rmtree(directory)
        with attached(maps, 2) as here:
            assert here.filled
            assert maps.charged_bytes(KEY) == NBYTES


def test_entries_lie_in_the_runtime_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_directory() == tmp_path / f"select-n-{os.geteuid()}"
    SharedMaps()
    assert runtime_directory().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert runtime_directory() == tmp_path / "temporary" / f"select-n-{os.geteuid()}"


def test_holders_that_cannot_be_opened_cost_a_copy_that_is_charged_and_told_once():
    """Peers that hide from each other, in a folder they may all enter."""
    directory = Path(tempfile.mkdtemp())
    if os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
    first, second = Peer(directory, hidden=True), Peer(directory, hidden=True)
    try:
        assert first.do("attach", 1) is True
        assert second.do("attach", 2) is True
        assert first.do("holds", 1)
        assert second.do("holds", 2)
        assert first.do("key") == KEY
        assert re.fullmatch(rf"{KEY} \(process {second.pid} alone, file \d+\)", second.do("key"))
        assert first.do("holders") == (first.pid,)
        assert second.do("holders") == (second.pid,)
        assert first.do("attach", 1, "another") is True
        assert second.do("attach", 2, "another") is True
        assert first.do("warnings") == []
        (told,) = second.do("warnings")
        assert "run the replicas of a node as one user" in told
    finally:
        first.end()
        second.end()
        shutil.rmtree(directory)


def in_another_pid_namespace(*command: str) -> list[str]:
    rights = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    return ["unshare", *rights, "--pid", "--fork", "--mount-proc", *command]


def can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(in_another_pid_namespace("true"), capture_output=True).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make a PID namespace")
def test_another_pid_namespace_shares_within_itself_only(maps, directory):
    program = (
        "import sys, pathlib; from select_n_core.memory.shared import SharedMaps\n"
        "maps = SharedMaps(pathlib.Path(sys.argv[1]))\n"
        "one = maps.attach(sys.argv[2], 4096, lambda b: b.fill_(1))\n"
        "two = maps.attach(sys.argv[2], 4096, lambda b: b.fill_(2))\n"
        "print(one.filled, two.filled, int(two.bytes[0]), len(maps.ledger()))"
    )
    with attached(maps, 9) as here:
        ran = subprocess.run(
            in_another_pid_namespace(sys.executable, "-c", program, str(directory), KEY),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert (ran.stdout, ran.stderr) == ("True False 1 1\n", "")
        assert here.holders() == (os.getpid(),)
        assert holds(here.bytes, 9)
