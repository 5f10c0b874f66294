"""Streams: watched for silence, merged, closed whatever happens."""

import asyncio

import pytest

from deployments.calls import Accepted, Delta, Failure
from deployments.http.live import LiveRequests
from deployments.http.stream import firsts, merged, watched


class Source:
    """A stream of chunks that knows whether it was closed; `None` waits forever."""

    def __init__(self, *chunks) -> None:
        self._chunks = chunks
        self.closed = False

    async def __call__(self):
        try:
            for chunk in self._chunks:
                if chunk is None:
                    await asyncio.Event().wait()
                yield chunk
        finally:
            self.closed = True


LAST = Delta("z", finish="stop")


async def test_a_watched_stream_passes_everything_on():
    source = Source(Accepted(1), Delta("a"), LAST)
    assert [c async for c in watched(source(), 5)] == [Accepted(1), Delta("a"), LAST]
    assert source.closed


async def test_silence_ends_a_watched_stream():
    source = Source(Accepted(1), None)
    *_, last = [chunk async for chunk in watched(source(), 0.01)]
    assert last.code == "stream_timeout"
    assert source.closed


async def test_the_verdict_may_take_longer_than_what_follows():
    async def slow():
        await asyncio.sleep(0.1)
        yield Accepted(1)
        await asyncio.Event().wait()

    verdict, last = [chunk async for chunk in watched(slow(), 0.01, verdict_s=10)]
    assert verdict == Accepted(1)
    assert (last.code, last.message) == ("stream_timeout", "nothing came from the model for 0.01 s")


async def test_first_chunks_come_as_they_are_there_and_leave_the_streams_open():
    one, two = Source(Accepted(1), LAST), Source(Accepted(2), LAST)
    streams = [one(), two()]
    firsts_of = [pair async for pair in firsts(streams)]
    assert sorted(firsts_of, key=lambda pair: pair[0]) == [(0, Accepted(1)), (1, Accepted(2))]
    assert [await anext(stream) for stream in streams] == [LAST, LAST]


async def test_who_heard_enough_of_the_first_chunks_need_not_wait_for_the_others():
    quick, slow = Source(Failure("overloaded_kv", "full")), Source(None)
    chunks = firsts([quick(), slow()])
    assert (await anext(chunks))[0] == 0
    await chunks.aclose()
    assert slow.closed


async def test_a_stream_that_just_stops_is_a_failure():
    *_, last = [chunk async for chunk in watched(Source(Accepted(1))(), 5)]
    assert isinstance(last, Failure)


async def test_nothing_follows_the_end():
    source = Source(LAST, Delta("more"))
    assert [chunk async for chunk in watched(source(), 5)] == [LAST]
    assert source.closed


async def test_merging_keeps_every_streams_order():
    one, two = Source(Delta("a"), LAST), Source(Delta("x"), Delta("y"), LAST)
    seen = [pair async for pair in merged([one(), two()])]
    assert [chunk for index, chunk in seen if index == 0] == [Delta("a"), LAST]
    assert [chunk for index, chunk in seen if index == 1] == [Delta("x"), Delta("y"), LAST]


async def test_a_slow_stream_does_not_hold_up_a_fast_one():
    slow, fast = Source(None), Source(Delta("a"), LAST)
    stream = merged([slow(), fast()])
    assert await anext(stream) == (1, Delta("a"))
    assert await anext(stream) == (1, LAST)
    await stream.aclose()
    assert slow.closed


async def test_cancelling_the_reader_closes_every_stream():
    sources = [Source(Delta("a"), None), Source(None)]

    async def read() -> None:
        async for _ in merged([source() for source in sources]):
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(source.closed for source in sources)


async def test_an_ingress_settles_when_its_last_answer_is_out():
    live, release = LiveRequests(), asyncio.Event()

    async def answer(scope, receive, send) -> None:
        await release.wait()

    request = asyncio.create_task(live.middleware(answer)({"type": "http"}, None, None))
    settling = asyncio.create_task(live.none_left(10))
    done, _ = await asyncio.wait([settling], timeout=0.01)
    assert not done
    release.set()
    await asyncio.gather(request, settling)
    await live.none_left(0)


async def test_an_ingress_settles_although_its_server_runs():
    live, end = LiveRequests(), asyncio.Event()

    async def run(scope, receive, send) -> None:
        await end.wait()

    server = asyncio.create_task(live.middleware(run)({"type": "lifespan"}, None, None))
    await asyncio.sleep(0)  # it runs
    async with asyncio.timeout(5):
        await live.none_left(60)
    end.set()
    await server
