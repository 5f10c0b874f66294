"""Faults while k moves and requests run: whoever is hit ends in an error, all others in tokens."""

import time

import pytest
import torch
from running import BLOCK_TOKENS, Heard, greedy, request, running_engine

from select_n_core.engine.messages import FinishReason
from select_n_core.errors import DeviceMemoryError, EngineError, LinkError
from select_n_core.links.emulated import EmulatedLink
from select_n_core.offload.streamer import WEIGHTS

torch.set_num_threads(1)


@pytest.fixture
def engine():
    with running_engine(k=4, k_min=1, host_blocks=8) as built:
        yield built


@pytest.fixture
def heard(engine) -> Heard:
    return Heard(engine)


def test_a_link_that_turns_ten_times_slower_mid_run_costs_time_and_no_token(engine, heard):
    asked = [request(name, tokens=8, text=number) for number, name in enumerate("abc")]
    for each in asked:
        engine.submit(each)
    for _ in range(3):
        heard.step()
    link = engine.executor.link
    assert isinstance(link, EmulatedLink)
    begun_s = time.perf_counter()
    link.bytes_per_s = 200e6 / 10  # from here on a unit takes milliseconds
    for k in (3, 5, 2, 4):
        engine.turn(k)
        heard.step()
    assert link.counters.stall_s > 0
    assert time.perf_counter() - begun_s > 8 * engine.executor.memory.slot_bytes / 20e6
    heard.run()
    for each in asked:
        assert heard.tokens(each.id) == greedy(each)


@pytest.mark.parametrize("k", [4, 1])
def test_a_weight_copy_that_fails_ends_no_request_that_can_be_computed_again(
    engine, heard, monkeypatch, k
):
    asked = [request(name, tokens=8, text=number) for number, name in enumerate("ab")]
    for each in asked:
        engine.submit(each)
    for _ in range(3):
        heard.step()
    copy, failures = engine.executor.link.copy, [LinkError("a copy failed")]

    def failing(target, source, **facts):
        if facts["kind"] == WEIGHTS and failures:
            raise failures.pop()
        return copy(target, source, **facts)

    monkeypatch.setattr(engine.executor.link, "copy", failing)
    engine.turn(k)
    heard.run()
    assert not failures
    for each in asked:
        assert heard.tokens(each.id) == greedy(each)


def test_a_link_that_fails_for_good_ends_everyone_in_a_typed_error(engine, heard, monkeypatch):
    for name in "ab":
        engine.submit(request(name, tokens=8))
    heard.step()

    def failing(*_copy, **_facts):
        raise LinkError("the bus is gone")

    monkeypatch.setattr(engine.executor.link, "copy", failing)
    heard.run()
    for name in "ab":
        assert heard.finish(name) is FinishReason.ERROR
        assert isinstance(heard.error(name), EngineError)
        assert "the bus is gone" in str(heard.error(name))


def test_a_request_that_no_k_can_hold_is_told_so_and_the_others_go_on():
    with running_engine(k=2, k_min=2, blocks=3, max_tokens=1 << 20) as engine:
        heard = Heard(engine)
        small = request("small", length=9, tokens=6)
        most = len(engine.executor.layout.kv_ids(6))
        engine.submit(request("huge", length=20, tokens=most * BLOCK_TOKENS))
        engine.submit(small)
        heard.run()
        assert heard.tokens("small") == greedy(small)
        assert heard.finish("huge") is FinishReason.ERROR
        error = heard.error("huge")
        assert isinstance(error, DeviceMemoryError)
        assert f"this replica has {most} now" in str(error)


def test_a_request_that_only_a_larger_k_holds_gets_it():
    with running_engine(k=1, k_min=1, blocks=3) as engine:
        heard = Heard(engine)
        least = len(engine.executor.layout.kv_ids(1)) * BLOCK_TOKENS
        asked = request("a", length=least + 5, tokens=8)
        engine.submit(asked)
        heard.run()
        assert heard.tokens("a") == greedy(asked)
        assert engine.executor.k > 1
        assert engine.stats().turns == {"kv": 1}
