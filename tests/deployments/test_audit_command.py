"""`select-n audit`: the ledgers of this machine against the kernel's own count."""

import json
import mmap
import os

import pytest

from deployments.cli.audit import audit_machine
from select_n_core.memory.domain import Domain, find_domain
from select_n_core.memory.reservation import Reservation, file_of
from select_n_core.memory.room import runtime_directory

PAGE = mmap.PAGESIZE


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A folder of ledgers that nobody else uses."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def reservation():
    domain = find_domain()
    with Reservation(Domain(domain.id, 1 << 30, 1 << 30), "an-engine") as opened:
        yield opened


@pytest.fixture
def pages(reservation):
    """Three pages that are reserved and mapped, one of them written."""
    fd = os.memfd_create("select-n:unit 1")
    os.ftruncate(fd, 3 * PAGE)
    reservation.reserve(file_of(fd), "unit 1", 3 * PAGE)
    with mmap.mmap(fd, 3 * PAGE) as mapped:
        mapped[0] = 1
        yield mapped
    os.close(fd)


def test_what_is_reserved_is_mapped(cli, reservation, pages):
    reservation.set_aside(2 * PAGE)
    code, out, _ = cli("audit", "--json")
    told = json.loads(out)
    assert (code, told["agrees"]) == (0, True)
    (domain,) = told["domains"]
    assert (domain["limit_bytes"], domain["used_bytes"]) == (1 << 30, 5 * PAGE)
    (process,) = domain["processes"]
    assert (process["name"], process["pid"]) == ("an-engine", os.getpid())
    assert process["reserved_bytes"] == process["mapped_bytes"] == 3 * PAGE
    assert (process["aside_bytes"], process["resident_bytes"]) == (2 * PAGE, PAGE)


def test_a_difference_is_named_and_the_exit_code_says_so(cli, reservation, pages):
    reservation.reserve("00:01:99", "unit 2", PAGE)
    code, out, _ = cli("audit")
    assert code == 1
    assert "unit 2: 4 KiB pinned, 0 B mapped" in out
    assert "DIFFER" in out
    reservation.release("00:01:99")
    code, out, _ = cli("audit")
    assert code == 0
    assert f"an-engine (process {os.getpid()}): 12 KiB pinned" in out
    assert "every byte agrees" in out


def test_what_is_mapped_a_moment_after_it_was_reserved_is_no_difference(reservation, pages):
    reservation.reserve("00:01:99", "unit 2", PAGE)
    told = audit_machine(pause=lambda _: reservation.release("00:01:99"))
    assert told["agrees"]


def test_a_process_that_cannot_be_looked_into_is_said(reservation, pages, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("deployments.cli.audit.mapped_files", refuse)
    told = audit_machine()
    assert not told["agrees"]
    assert "run this in its container, as its user" in told["domains"][0]["processes"][0]["error"]


def test_where_nobody_reserved_anything_there_is_nothing_to_compare(cli):
    code, out, _ = cli("audit")
    assert (code, out) == (0, "nobody has reserved host memory here\n")
    assert not runtime_directory().exists()
