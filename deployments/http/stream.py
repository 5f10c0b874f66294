"""Streams of chunks: watched for silence, merged from several sequences into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from deployments.calls import Chunk, Delta, Failure


async def watched(
    chunks: AsyncGenerator[Chunk, None], timeout_s: float
) -> AsyncGenerator[Chunk, None]:
    """`chunks`, ended by a failure when none comes for `timeout_s` or when they just stop.

    Whatever comes out last is a failure or a delta with `finish`. Closing this closes `chunks`.
    """
    async with aclosing(chunks):
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    chunk = await anext(chunks)
            except TimeoutError:
                yield Failure("stream_timeout", f"nothing came from the model for {timeout_s:g} s")
                return
            except StopAsyncIteration:
                yield Failure("engine_error", "the answer broke off")
                return
            yield chunk
            if isinstance(chunk, Failure) or (isinstance(chunk, Delta) and chunk.finish):
                return


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
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await close_all(streams)


def _next(stream: AsyncGenerator[Chunk, None]) -> asyncio.Task[Chunk | None]:
    async def step() -> Chunk | None:
        return await anext(stream, None)

    return asyncio.create_task(step())


async def close_all(streams: Sequence[AsyncGenerator[Chunk, None]]) -> None:
    """Close every stream, whichever of them fail to."""
    await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True)
