"""Host memory offered and revoked while requests run: bytes come back, tokens stay right."""

import time

import pytest
import torch
from running import Heard, greedy, request, running_engine

from select_n_core.errors import HostMemoryError, LinkError
from select_n_core.links.base import Direction
from select_n_core.offload.mirrors import MIRROR

torch.set_num_threads(1)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(clock):
    """k = 3 of 6, which may turn between 1 and 6; three units mirrored."""
    with running_engine(k=3, k_min=1, mirrors=3, clock=clock) as built:
        yield built


@pytest.fixture
def heard(engine) -> Heard:
    return Heard(engine)


def mirrored(engine, count: int) -> int:
    return engine.executor.memory.mirrored_bytes(count)


def answers(engine, steps: int):
    """What revocations were answered over some steps, by id."""
    found = {}
    for _ in range(steps):
        for answer in engine.step().leases:
            found[answer.id] = answer.error
    return found


def test_an_offer_is_mirrored_while_requests_run_and_k_may_follow(engine, heard):
    asked = request("a", tokens=12)
    engine.submit(asked)
    engine.lease.offer("o", mirrored(engine, 5) - mirrored(engine, 3))
    for _ in range(6):
        heard.step()
    assert engine.executor.m == 5
    engine.turn(5)
    heard.run()
    assert heard.tokens("a") == greedy(asked)
    stats = engine.stats()
    assert (stats.mirrored, stats.cap, stats.k) == (5, 5, 5)
    assert stats.host_bytes == stats.lease_bytes == mirrored(engine, 5)
    assert stats.turns == {"asked": 1}
    sent = engine.executor.link.counters.bytes[Direction.TO_HOST, MIRROR]
    assert sent == mirrored(engine, 5) - mirrored(engine, 3)


def test_a_revocation_turns_k_frees_the_mirrors_and_is_acknowledged(engine, heard):
    asked = [request(name, tokens=10, text=number) for number, name in enumerate("ab")]
    for each in asked:
        engine.submit(each)
    heard.step()
    engine.lease.revoke("r", mirrored(engine, 3) - mirrored(engine, 1), deadline_s=1.0)
    assert engine.executor.k == 1
    found = {}
    for _ in range(4):
        report = engine.step()
        heard.hear(report)
        found.update({answer.id: answer.error for answer in report.leases})
    assert found == {"r": None}
    assert engine.executor.host_bytes == mirrored(engine, 1)
    heard.run()
    for each in asked:
        assert heard.tokens(each.id) == greedy(each)
    assert engine.stats().turns == {"lease": 1}


def test_an_idle_replica_gives_its_memory_back_without_a_request(engine):
    assert engine.idle
    engine.lease.revoke("r", mirrored(engine, 3) - mirrored(engine, 2), deadline_s=1.0)
    assert answers(engine, 2) == {"r": None}
    assert engine.executor.host_bytes == mirrored(engine, 2)
    assert engine.lease.settled


def test_a_missed_deadline_is_an_error_and_the_bytes_follow(engine, heard, clock, monkeypatch):
    monkeypatch.setattr(engine.executor, "tend", lambda: None)  # nothing gets done in time
    engine.lease.revoke("r", mirrored(engine, 3) - mirrored(engine, 1), deadline_s=0.5)
    assert answers(engine, 2) == {}
    clock.now_s = 0.6
    error = answers(engine, 1)["r"]
    assert isinstance(error, HostMemoryError)
    assert "within 0.5 s" in str(error)
    monkeypatch.undo()
    engine.step()
    assert engine.executor.host_bytes == mirrored(engine, 1)


def test_the_floor_is_refused_at_once_and_nothing_changes(engine):
    engine.lease.revoke("r", mirrored(engine, 3), deadline_s=1.0)
    error = answers(engine, 1)["r"]
    assert isinstance(error, HostMemoryError)
    assert "below the floor" in str(error)
    assert (engine.executor.k, engine.executor.m) == (3, 3)


def test_a_revocation_under_a_full_kv_pool_preempts_and_nobody_loses_a_token(clock):
    with running_engine(k=5, k_min=1, mirrors=5, blocks=4, clock=clock, max_batch=8) as engine:
        heard = Heard(engine)
        asked = [request(f"r{n}", length=20, tokens=20, text=n) for n in range(6)]
        for each in asked:
            engine.submit(each)
        for _ in range(6):
            heard.step()
        assert engine.executor.shortfall(1) > 0
        engine.lease.revoke("r", mirrored(engine, 5) - mirrored(engine, 1), deadline_s=1.0)
        heard.run(most=800)
        for each in asked:
            assert heard.tokens(each.id) == greedy(each)
        assert engine.executor.host_bytes == mirrored(engine, 1)


def test_a_copy_that_fails_while_a_mirror_is_written_ends_nobody(engine, heard, monkeypatch):
    asked = request("a", tokens=10)
    engine.submit(asked)
    copy = engine.executor.link.copy

    def failing(target, source, **facts):
        if facts["kind"] == MIRROR:
            raise LinkError("the copy engine is on fire")
        return copy(target, source, **facts)

    monkeypatch.setattr(engine.executor.link, "copy", failing)
    engine.lease.offer("o", mirrored(engine, 4) - mirrored(engine, 3))
    heard.run()
    assert heard.tokens("a") == greedy(asked)
    assert engine.executor.m == 3
    monkeypatch.undo()
    deadline_s = time.monotonic() + 20.0
    while engine.executor.m < 4:
        assert time.monotonic() < deadline_s, "the mirror was not tried again"
        engine.step()
