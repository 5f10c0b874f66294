"""One replica without Ray or HTTP: verdicts, what it reports, how it drains."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest
from standins import HANG, ScriptedEngine, replica, soon

from deployments.calls import Accepted, Call, Delta, Failure, Message, SamplingWish
from select_n_core.engine.messages import EngineStats
from select_n_core.errors import EngineError, OverloadedError


async def chunks(served, call: Call) -> list:
    return [chunk async for chunk in served.generate(call)]


async def test_the_verdict_comes_before_any_token(text):
    engine = ScriptedEngine(text, HANG)
    async with aclosing(replica(engine, text).generate(Call("a", "Hi"))) as stream:
        assert await anext(stream) == Accepted(prompt_tokens=2)
    assert engine.cancelled == ["a"]


async def test_the_verdict_says_how_much_of_the_prompt_was_cached(text):
    engine = ScriptedEngine(text, "ab")
    engine.cached_tokens = 1
    verdict, *_ = await chunks(replica(engine, text), Call("a", "Hi"))
    assert verdict == Accepted(prompt_tokens=2, cached_tokens=1)


async def test_a_call_ends_in_one_finish(text):
    verdict, *deltas = await chunks(replica(ScriptedEngine(text, "ab"), text), Call("a", "Hi"))
    assert verdict == Accepted(prompt_tokens=2)
    assert deltas == [Delta("a", 1), Delta("b", 1), Delta("", finish="stop")]


async def test_a_refusal_is_the_first_and_only_chunk(text):
    engine = ScriptedEngine(text, refusal=OverloadedError("full", reason="kv", retry_after_s=4))
    [failure] = await chunks(replica(engine, text), Call("a", "Hi"))
    assert failure == Failure("overloaded_kv", "full", retry_after_s=4)


async def test_a_call_that_leaves_while_it_waits_to_be_let_in_stops_its_request(text):
    engine = ScriptedEngine(text, "ok", verdict_after_s=60)
    task = asyncio.create_task(chunks(replica(engine, text), Call("a", "Hi")))
    await soon(engine.is_asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.cancelled == ["a"]


async def test_a_cancelled_task_stops_the_request(text):
    engine = ScriptedEngine(text, HANG)
    task = asyncio.create_task(chunks(replica(engine, text), Call("a", "Hi")))
    await soon(engine.is_asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.cancelled == ["a"]


async def test_a_stop_string_that_began_but_never_came_is_shown(text):
    served = replica(ScriptedEngine(text, "one ST"), text)
    _, *deltas = await chunks(served, Call("a", "Hi", stop=("STOP",)))
    assert "".join(delta.text for delta in deltas) == "one ST"


async def test_a_conversation_goes_through_the_models_template(text):
    engine = ScriptedEngine(text, "ok")
    await chunks(replica(engine, text), Call("a", (Message("user", "Hi"),)))
    assert engine.requests[0].prompt == text.encode("<user>Hi<assistant>")


async def test_a_wish_that_the_engine_cannot_grant_is_a_refusal(text):
    call = Call("a", "Hi", sampling=SamplingWish(temperature=9))
    [failure] = await chunks(replica(ScriptedEngine(text, "ok"), text), call)
    assert (failure.code, failure.field) == ("invalid_input", "temperature")


def test_autoscaling_reads_floats_always(text):
    engine = ScriptedEngine(text, "ok")
    served = replica(engine, text)
    idle = served.record_autoscaling_stats()
    assert idle == {
        "ttft_headroom": 1.0,
        "tpot_headroom": 1.0,
        "running": 0.0,
        "waiting": 0.0,
        "tpot_floor": 0.5,
    }
    assert {type(value) for value in idle.values()} == {float}


def test_headroom_stands_while_nothing_finishes_and_recovers_when_idle(text):
    engine = ScriptedEngine(text, "ok")
    served = replica(engine, text)
    busy = EngineStats(running=3, waiting=2, ttft_headroom=-1, tpot_headroom=0.25)
    engine.now = busy
    assert served.record_autoscaling_stats()["ttft_headroom"] == -1.0
    engine.now = replace(busy, ttft_headroom=None, tpot_headroom=None)
    stats = served.record_autoscaling_stats()
    assert (stats["ttft_headroom"], stats["tpot_headroom"]) == (-1.0, 0.25)
    assert (stats["running"], stats["waiting"]) == (3.0, 2.0)
    engine.now = EngineStats()
    assert served.record_autoscaling_stats()["ttft_headroom"] == 1.0


def test_health_is_the_engines(text):
    engine = ScriptedEngine(text, "ok")
    served = replica(engine, text)
    served.check_health()
    engine.health = EngineError("dead")
    with pytest.raises(EngineError, match="dead"):
        served.check_health()
    with pytest.raises(EngineError, match="dead"):
        served.check()


async def test_draining_ends_streams_and_refuses_calls(text):
    engine = ScriptedEngine(text, "a", HANG)
    served = replica(engine, text)
    running = asyncio.create_task(chunks(served, Call("a", "Hi")))
    await soon(engine.is_asked)
    await served.drain(0.1)
    assert running.done()
    assert running.result()[-1].code == "engine_error"
    [refused] = await chunks(served, Call("b", "Hi"))
    assert "shutting down" in refused.message
    with pytest.raises(EngineError, match="shutting down"):
        served.check()
    engine.health = EngineError("stopped")
    served.check_health()  # Ray must not replace a replica that is drained
