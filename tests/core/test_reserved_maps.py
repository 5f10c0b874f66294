"""Maps that are written down before they are: who shares them pays once, who cannot is refused.

Two reservations in one process exclude each other as those of two processes do.
"""

import gc
import mmap
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from test_shared_maps import PAGED, write

from select_n_core.errors import HostMemoryError
from select_n_core.memory.audit import audit
from select_n_core.memory.domain import Domain
from select_n_core.memory.host import ReservedMap
from select_n_core.memory.ledger_file import read_ledger
from select_n_core.memory.reservation import Reservation
from select_n_core.memory.shared import SharedMaps
from select_n_core.memory.unit_maps import UnitMaps

torch.set_num_threads(1)

NBYTES = PAGED - 7
KEY = "llama-3f2a bfloat16 unit 7"
DOMAIN = Domain("test", 1 << 40, 3 * PAGED)


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "runtime"


@pytest.fixture
def replica(directory):
    """Makes maps with a reservation of their own, and ends both with the test."""
    with ExitStack() as ends:

        def make(name: str = "replica") -> SharedMaps:
            reservation = Reservation(DOMAIN, name, directory=directory)
            ends.callback(reservation.close)
            return SharedMaps(directory, reservation=reservation)

        yield make


def used(directory: Path) -> int:
    ledger = read_ledger(DOMAIN, directory)
    assert audit(ledger, os.getpid()) == (), "the kernel says the same"
    return ledger.used_bytes


def test_who_shares_a_map_pays_once_and_the_last_one_frees_it(replica, directory):
    one, other = replica("one"), replica("other")
    first = one.attach(KEY, NBYTES, partial(write, 1))
    second = other.attach(KEY, NBYTES, partial(write, 2))
    assert used(directory) == PAGED
    first.close()
    assert used(directory) == PAGED
    assert [len(each.pins) for each in read_ledger(DOMAIN, directory).holders] == [0, 1]
    second.close()
    assert used(directory) == 0


def test_a_map_without_room_is_refused_before_anything_is_written(replica, directory):
    maps = replica()
    held = [maps.attach(str(number), NBYTES, partial(write, 1)) for number in range(3)]

    def never(_) -> None:
        raise AssertionError("it was filled")

    for how in (partial(maps.attach, fill=never), maps.begin):
        with pytest.raises(HostMemoryError, match=r"unit 7 of replica takes .* 0 B of .* are free"):
            how(KEY, NBYTES)
    assert used(directory) == 3 * PAGED
    assert maps.charged_bytes(KEY) == 0
    held.pop().close()
    assert maps.attach(KEY, NBYTES, partial(write, 1)).filled


def test_a_map_stays_reserved_until_its_last_view_is_gone(replica, directory):
    here = replica().attach(KEY, NBYTES, partial(write, 1))
    view = here.bytes[5:6]
    here.close()
    assert used(directory) == PAGED
    del view
    assert used(directory) == 0


def test_a_fill_that_fails_gives_its_bytes_back(replica, directory):
    def fail(_) -> None:
        raise FileNotFoundError("no such checkpoint")

    with pytest.raises(FileNotFoundError):
        replica().attach(KEY, NBYTES, fail)
    gc.collect()
    assert used(directory) == 0


def test_what_two_began_and_one_published_is_charged_to_both(replica, directory):
    one, other = replica("one"), replica("other")
    first, second = one.begin(KEY, NBYTES), other.begin(KEY, NBYTES)
    assert used(directory) == 2 * PAGED
    one.publish(KEY, first)
    other.publish(KEY, second)
    assert used(directory) == 2 * PAGED
    found = replica("third").find(KEY, NBYTES)
    assert used(directory) == 2 * PAGED
    for each in (first, second, found):
        each.close()
    assert used(directory) == 0


def test_room_is_kept_for_units_that_nobody_has_and_to_begin_them_does_not_fail(replica, directory):
    mine, theirs = UnitMaps(one := replica("one"), "llama"), UnitMaps(replica("other"), "llama")
    held = [theirs.attach(0, NBYTES, partial(write, 1))]
    mine.set_aside({0: NBYTES, 1: NBYTES, 2: NBYTES})
    assert used(directory) == 3 * PAGED
    with pytest.raises(HostMemoryError):
        theirs.begin(3, NBYTES)
    held += [mine.begin(1, NBYTES), mine.begin(2, NBYTES), mine.find(0, NBYTES)]
    assert used(directory) == 3 * PAGED
    with pytest.raises(HostMemoryError):
        one.set_aside({"one more": 1})
    for each in held:
        each.close()
    assert used(directory) == 0


def test_a_private_map_is_reserved_under_its_name_and_released_with_its_last_view(directory):
    with Reservation(DOMAIN, "one", directory=directory) as reservation:
        host = ReservedMap(NBYTES, "host KV", reservation)
        assert [(pin.what, pin.nbytes) for pin in reservation.pins().values()] == [
            ("host KV", PAGED)
        ]
        assert used(directory) == PAGED
        view = host.bytes[:1]
        host.close()
        assert used(directory) == PAGED
        del view
        assert used(directory) == 0
        with pytest.raises(HostMemoryError, match="host KV of one takes"):
            ReservedMap(3 * PAGED + mmap.PAGESIZE, "host KV", reservation)
        assert used(directory) == 0
