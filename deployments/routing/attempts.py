"""A call's attempts: at a replica that was chosen for it, and once more at another one.

It is sent again where it was refused, or where its replica was lost or fell silent, as long as
nothing of its answer has come out. What has begun to come out ends in an error instead.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from deployments.calls import Backend, Call, Chunk, Delta, Failure, Report, Route
from deployments.routing.pilot import Pilot
from select_n_core.errors import EngineError, OverloadedError, UnavailableError
from select_n_core.slo import SLO

_LOOK_S = 0.25  # between two looks at whether a silent replica is still there
_HUNG_S = 5.0  # of silence, once it is not: a stream that has begun cannot go on elsewhere
_SILENT = "stream_timeout"
_LOST = (UnavailableError.code, EngineError.code, _SILENT)
_REFUSED = f"{OverloadedError.code}_"

# Told of every call that is sent again, with why it had to be.
Told = Callable[[Call, Failure], None]


class RoutedBackend:
    """Sends the calls of a model where its pilot says; see `Backend`.

    Args:
        replicas: takes each call along the call's route.
        stream_timeout_s: of silence after which a call counts as lost; half of it is for the
            first attempt, so that a second one is through before the client's patience ends.
        retried: told of every call that is sent again.
    """

    def __init__(
        self,
        replicas: Backend,
        pilot: Pilot,
        *,
        stream_timeout_s: float,
        retried: Told = lambda call, failure: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = replicas
        self._pilot = pilot
        self._patience_s = stream_timeout_s / 2
        self._retried = retried
        self._clock = clock

    async def generate(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """See `Backend.generate`."""
        began_s, accepted, tokens = self._clock(), False, 0
        failed: Failure | None = None  # of the first attempt
        route = self._pilot.choose(call)
        while isinstance(route, Route):
            again: Failure | None = None
            may_move = failed is None
            async with aclosing(self._attempt(call, route, may_move=may_move)) as chunks:
                async for chunk in chunks:
                    if isinstance(chunk, Failure):
                        if failed is None and not tokens and may_go_elsewhere(chunk, route):
                            again = chunk
                            break
                        yield better_told(failed, chunk)
                        return
                    if isinstance(chunk, Delta):
                        tokens += chunk.tokens
                        if chunk.finish:
                            self._pilot.finished(call, tokens)
                    elif accepted:  # the client was told by the first attempt
                        continue
                    accepted = True
                    yield chunk
            if again is None:
                return
            in_time = self._in_time(call, again, self._clock() - began_s)
            if in_time is None:
                yield again
                return
            self._retried(call, again)
            call, failed = in_time, again
            route = self._pilot.choose(call, but=route.target)
        yield better_told(failed, route)

    async def check(self, timeout_s: float) -> Failure | None:
        """See `Backend.check`."""
        return await self._replicas.check(timeout_s)

    async def reports(self, timeout_s: float) -> list[Report]:
        """See `Backend.reports`."""
        return await self._replicas.reports(timeout_s)

    async def _attempt(
        self, call: Call, route: Route, *, may_move: bool
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of one attempt; a replica that falls silent ends it in a failure.

        Args:
            may_move: whether another replica may be asked, as long as no token has come.
        """
        with self._pilot.sending(call, route):
            chunks = self._replicas.generate(replace(call, route=route, session=""))
            async with aclosing(chunks):
                patience_s = self._patience_s + self._pilot.promised(call).longest_wait_s
                while True:
                    patience_s = patience_s if may_move else math.inf
                    chunk = await self._heard(chunks, route, patience_s)
                    if chunk is None:
                        return
                    yield chunk
                    may_move = may_move and not (isinstance(chunk, Delta) and chunk.tokens)
                    patience_s = self._patience_s

    async def _heard(
        self, chunks: AsyncGenerator[Chunk, None], route: Route, patience_s: float
    ) -> Chunk | None:
        """The next chunk, or a failure where none comes.

        Args:
            patience_s: after which another replica may do better, if there is one; infinite where
                there is nothing to do but wait. Then whoever watches the whole stream ends it, and
                sooner than that a replica that reports no more.
        """
        step = asyncio.create_task(_next(chunks))
        since_s = self._clock()
        try:
            while True:
                await asyncio.wait({step}, timeout=_LOOK_S)
                if step.done():
                    return step.result()
                silent_s, may_move = self._clock() - since_s, patience_s < math.inf
                may_move = may_move and route.living > 1
                if (may_move or silent_s >= _HUNG_S) and self._pilot.has_lost(route):
                    return Failure(_SILENT, "the replica that was asked reports no more")
                if may_move and silent_s >= patience_s:
                    return Failure(_SILENT, f"nothing came from the model for {patience_s:g} s")
        finally:
            if not step.done():
                step.cancel()
                await asyncio.wait({step})

    def _in_time(self, call: Call, failure: Failure, passed_s: float) -> Call | None:
        """The call as another replica gets it; None where it would come too late to be let in.

        Who was refused has waited already. Who was let in before is owed an answer, late or not.
        """
        if not _is_refusal(failure):
            return call
        slo = self._pilot.promised(call)
        left_s = slo.ttft_s - passed_s
        if left_s <= 0:
            return None
        wait_s = min(left_s, max(0.0, slo.longest_wait_s - passed_s))
        return replace(call, terms=replace(call.terms, slo=SLO(slo.tpot_s, left_s, wait_s)))


async def _next(chunks: AsyncGenerator[Chunk, None]) -> Chunk | None:
    return await anext(chunks, None)


def may_go_elsewhere(failure: Failure, route: Route) -> bool:
    """Whether a call of which nothing came out yet is for another replica, and there is one."""
    return route.living > 1 and (_is_refusal(failure) or failure.code in _LOST)


def better_told(first: Failure | None, second: Failure) -> Failure:
    """What a client is told whose call failed twice: rather when to come again than that it broke.

    Of two refusals, the one that says to come again sooner.
    """
    refusals = [each for each in (first, second) if each is not None and _is_refusal(each)]
    return min(refusals, key=lambda each: each.retry_after_s or 0.0, default=second)


def _is_refusal(failure: Failure) -> bool:
    return failure.code.startswith(_REFUSED)
