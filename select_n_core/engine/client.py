"""How a replica reaches its engine: one contract, two implementations (`process`, `inline`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from select_n_core.engine.messages import EngineInfo, EngineStats, Output, Request


class EngineClient(Protocol):
    """An engine as asyncio code sees it.

    Every request ends in exactly one `Output` whose `finish` is set: tokens, an error or a
    reason, also when the engine dies. Closing the iterator early cancels the request.
    """

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it can serve; raises what its loading raised."""
        ...

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Submit `request` and stream its outputs.

        Raises:
            RequestError: it can never fit, or is malformed; nothing was queued.
            OverloadedError: the queue is full.
            EngineError: the engine is not running.
        """
        ...

    def stats(self) -> EngineStats:
        """The most recent step's statistics, at once."""
        ...

    def check_health(self) -> None:
        """Raise EngineError when the engine died or its loop no longer turns."""
        ...

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Stop: running requests get `grace_s` to finish, then end in an error."""
        ...
