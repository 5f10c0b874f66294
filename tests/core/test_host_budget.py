"""Two engines in one domain of host memory: the second takes what is left, or says why not."""

import os
import time
from dataclasses import replace

import pytest
import torch
from recorded import record
from running import Heard, request
from tiny import save_tiny, tiny_llama

from select_n_core.config import ModelConfig
from select_n_core.engine import build
from select_n_core.engine.build import build_engine
from select_n_core.engine.planning import record_path
from select_n_core.errors import HostMemoryError
from select_n_core.memory.audit import audit
from select_n_core.memory.domain import Domain
from select_n_core.models.cache import CACHE_VARIABLE
from select_n_core.profiling.fingerprint import fingerprint

torch.set_num_threads(1)

FACTS = {
    "dtype": "float32",
    "device_memory": "1MiB",
    "host_memory": "2MiB",
    "host_kv": "64KiB",
    "link": {"kind": "emulated", "bandwidth": "100GB/s"},
    "slo": {"tpot": "5s", "ttft": "30s"},
    "max_batch": 4,
    "max_step_tokens": 64,
    "block_tokens": 16,
    "workload": {"prompt_tokens": 20, "output_tokens": 8},
}
HOST_KV_BYTES = 48 << 10  # whole blocks
UNIT_BYTES = 147_968
UNIT_PAGES = 37 * 4096
WHOLE = HOST_KV_BYTES + 6 * UNIT_PAGES
FLOOR = HOST_KV_BYTES + 3 * UNIT_PAGES


def config_of(name: str, source: str) -> ModelConfig:
    return ModelConfig(name=name, source=source, **FACTS)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Two models of one shape, and records of a device to which rows cost nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        made = {}
        for seed, name in enumerate(["one", "other"]):
            source = save_tiny(tmp_path_factory.mktemp(name), tiny_llama(seed=seed))
            made[name] = config = config_of(name, str(source))
            here = fingerprint(str(source), source, config.dtype, config.link, config.units)
            record(
                unit_bytes=UNIT_BYTES,
                static_bytes=154_368,
                kv_bytes_per_token=1536,
                max_context=512,
                fingerprint=here,
            ).save(record_path(here))
        yield made


@pytest.fixture
def infos() -> dict:
    """What each engine said when it started."""
    return {}


@pytest.fixture
def start(configs, infos, tmp_path, monkeypatch):
    """Starts engines in a domain that may pin so many bytes, and closes them with the test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_MEMORY_DEADLINE_S", 0.3)
    engines = []

    def make(name: str, capacity_bytes: int, *, lent: bool = False):
        domain = Domain("test", 2 * capacity_bytes, capacity_bytes)
        engine, infos[name] = build_engine(configs[name], domain=domain, lent=lent)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def served(engine, name: str = "a"):
    heard = Heard(engine)
    engine.submit(request(name, tokens=6))
    heard.run()
    return heard.tokens(name)


def grown(engine, mirrors: int) -> None:
    deadline_s = time.monotonic() + 20.0
    while engine.executor.m < mirrors:
        assert time.monotonic() < deadline_s, "the mirrors do not come"
        engine.step()


def test_the_second_of_two_starts_with_fewer_mirrors_and_has_them_all_when_the_first_ends(start):
    capacity = WHOLE + FLOOR + UNIT_PAGES // 2
    first = start("one", capacity)
    alone = served(first)
    assert first.stats().mirrored == 6
    assert first.reservation.ledger().used_bytes == WHOLE
    second = start("other", capacity)
    stats = second.stats()
    assert (stats.mirrored, stats.cap) == (3, 3)
    assert stats.k == second.scheduler.k == 3
    ledger = second.reservation.ledger()
    assert ledger.used_bytes == WHOLE + FLOOR <= capacity
    assert [each.floor_bytes for each in ledger.holders] == [FLOOR] * 2
    assert audit(ledger, os.getpid()) == ()
    told = served(second)
    assert served(first, "b") == alone
    first.close()
    assert second.reservation.ledger().used_bytes == FLOOR
    grown(second, 6)
    second.turn(4)
    assert served(second, "b") == told
    ledger = second.reservation.ledger()
    assert ledger.used_bytes == second.stats().reserved_bytes == WHOLE
    assert audit(ledger, os.getpid()) == ()


def test_a_floor_that_does_not_fit_is_refused_with_who_holds_what(start):
    capacity = WHOLE + FLOOR - 1
    start("one", capacity)
    who = r"one \(process \d+\) 936 KiB, 492 KiB of it its floor.*lower `host_memory`"
    with pytest.raises(HostMemoryError, match=who):
        start("other", capacity)
    third = start("one", capacity)
    assert [each.name for each in third.reservation.ledger().holders] == ["one", "one"]


def test_a_second_replica_of_a_model_takes_its_host_kv_and_no_mirror_more(start):
    capacity = WHOLE + HOST_KV_BYTES
    first, second = start("one", capacity), start("one", capacity)
    assert first.stats().mirrored == second.stats().mirrored == 6
    assert second.reservation.ledger().used_bytes == capacity
    assert served(first) == served(second)
    first.close()
    assert second.reservation.ledger().used_bytes == WHOLE


def test_an_offer_without_room_is_refused_and_leaves_cap_where_it_was(start):
    capacity = WHOLE + FLOOR
    first, second = start("one", capacity), start("other", capacity)
    assert second.stats().cap == 3
    second.lease.offer("too much", 2 * UNIT_BYTES)
    (answer,) = second.step().leases
    assert isinstance(answer.error, HostMemoryError)
    assert (second.stats().cap, second.stats().mirrored) == (3, 3)
    first.lease.revoke("r", 2 * UNIT_BYTES, 5.0)
    answers = first.step().leases + first.step().leases
    assert [(each.id, each.error) for each in answers] == [("r", None)]
    second.lease.offer("as much as there is", 2 * UNIT_BYTES)
    (answer,) = second.step().leases
    assert answer.error is None
    ledger = second.reservation.ledger()
    assert ledger.used_bytes == ledger.capacity_bytes, "it is kept before it is written"
    grown(second, 5)
    assert second.reservation.ledger().used_bytes == capacity


def test_an_engine_that_is_lent_to_starts_with_its_floor_and_grows_by_what_it_is_offered(
    start, infos
):
    engine = start("one", 2 * WHOLE, lent=True)
    ladder, stats = infos["one"].ladder, engine.stats()
    assert (stats.mirrored, stats.cap, stats.k) == (3, 3, 3)
    assert ladder.floor_bytes == stats.reserved_bytes == FLOOR
    for _ in range(3):
        engine.step()
    assert engine.stats().cap == 3, "room alone is no offer"
    engine.lease.offer("late", UNIT_BYTES, time.monotonic())
    (answer,) = engine.step().leases
    assert isinstance(answer.error, HostMemoryError)
    assert (engine.stats().cap, engine.reservation.held_bytes) == (3, FLOOR)
    missing = ladder.mirrored_bytes(5) - stats.lease_bytes
    engine.lease.offer("in time", missing, time.monotonic() + 60.0)
    (answer,) = engine.step().leases
    assert answer.error is None
    grown(engine, 5)
    (holder,) = engine.reservation.ledger().holders
    assert holder.group == infos["one"].mirrors_group
    assert holder.held_bytes == FLOOR + 2 * UNIT_PAGES


def test_what_one_of_a_group_has_written_costs_the_others_no_room(start, infos):
    capacity = FLOOR + HOST_KV_BYTES + 2 * UNIT_PAGES
    first, second = start("one", capacity, lent=True), start("one", capacity, lent=True)
    two = infos["one"].ladder.mirrored_bytes(5) - infos["one"].ladder.mirrored_bytes(3)
    first.lease.offer("first", two)
    assert first.step().leases[0].error is None
    grown(first, 5)
    ledger = first.reservation.ledger()
    assert ledger.free_bytes == 0
    second.lease.offer("second", two)
    assert second.step().leases[0].error is None
    grown(second, 5)
    ledger = first.reservation.ledger()
    assert ledger.used_bytes == capacity
    assert ledger.held_bytes_by_group() == {infos["one"].mirrors_group: capacity}
    first.lease.revoke("first", two, 5.0)
    while not first.step().leases:
        pass
    assert first.reservation.ledger().used_bytes == capacity, "the second has them still"
    assert audit(first.reservation.ledger(), os.getpid()) == ()


def test_what_an_engine_may_be_lent_is_what_its_configuration_allows(start, infos):
    start("one", 2 * WHOLE, lent=True)
    ladder = infos["one"].ladder
    assert len(ladder.rungs()) == 3
    assert sum(rung.nbytes for rung in ladder.rungs()) == WHOLE - FLOOR
    assert ladder.tokens == 28


def test_an_engine_counts_what_it_is_asked_for_by_priority(start):
    engine = start("one", WHOLE)
    engine.submit(request("a", tokens=6))
    engine.submit(replace(request("b", tokens=500), priority=3))
    assert engine.stats().offered_tokens == {0: 9 + 6, 3: 9 + 8}
    engine.abort(HostMemoryError("enough"))


def test_an_engine_that_does_not_start_leaves_nothing_behind(start, monkeypatch):
    def fail(*_, **__):
        raise HostMemoryError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(build, "_placed", fail)
        with pytest.raises(HostMemoryError, match="no luck"):
            start("one", WHOLE)
    assert start("other", WHOLE).stats().mirrored == 6
