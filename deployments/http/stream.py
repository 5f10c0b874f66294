"""Streams of chunks: watched for silence, merged from several sequences into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing

from deployments.calls import Chunk, Delta, Failure


async def watched(
    chunks: AsyncGenerator[Chunk, None], timeout_s: float, *, verdict_s: float = 0.0
) -> AsyncGenerator[Chunk, None]:
    """`chunks`, ended by a failure when none comes for `timeout_s` or when they just stop.

    The first, the verdict, may take `verdict_s` longer: the call may wait so long to be let in.
    Whatever comes out last is a failure or a delta with `finish`. Closing this closes `chunks`.
    """
    patience_s = timeout_s + verdict_s
    async with aclosing(chunks):
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    chunk = await anext(chunks)
            except TimeoutError:
                silence = f"nothing came from the model for {patience_s:g} s"
                yield Failure("stream_timeout", silence)
                return
            except StopAsyncIteration:
                yield Failure("engine_error", "the answer broke off")
                return
            patience_s = timeout_s
            yield chunk
            if isinstance(chunk, Failure) or (isinstance(chunk, Delta) and chunk.finish):
                return


async def firsts(
    streams: Sequence[AsyncGenerator[Chunk, None]],
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The first chunk of every stream as it comes, with its stream's index.

    Closing this leaves the streams open.
    """
    pending = {_next(stream): index for index, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, chunk = pending.pop(task), task.result()
                if chunk is not None:
                    yield index, chunk
    finally:
        await _cancelled(pending)


async def merged(
    streams: Sequence[AsyncGenerator[Chunk, None]],
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of all streams as they come, each with its stream's index.

    Closing this closes every stream.
    """
    pending = {_next(stream): index for index, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                chunk = task.result()
                if chunk is None:
                    continue
                pending[_next(streams[index])] = index
                yield index, chunk
    finally:
        await _cancelled(pending)
        await close_all(streams)


def _next(stream: AsyncGenerator[Chunk, None]) -> asyncio.Task[Chunk | None]:
    async def step() -> Chunk | None:
        return await anext(stream, None)

    return asyncio.create_task(step())


async def _cancelled(tasks: Iterable[asyncio.Task[Chunk | None]]) -> None:
    left = list(tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def close_all(streams: Sequence[AsyncGenerator[Chunk, None]]) -> None:
    """Close every stream, whichever of them fail to."""
    await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True)
