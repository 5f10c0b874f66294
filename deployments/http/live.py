"""Which requests are being answered right now: an ingress that ends must not cut them."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Receive, Scope, Send


class LiveRequests:
    """Counts requests from their arrival to the last byte of their answer."""

    def __init__(self) -> None:
        self._number = 0
        self._none = asyncio.Event()
        self._none.set()

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """An ASGI application around `app` that counts its requests."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":  # lasts as long as the server does
                await app(scope, receive, send)
                return
            self._number += 1
            self._none.clear()
            try:
                await app(scope, receive, send)
            finally:
                self._number -= 1
                if not self._number:
                    self._none.set()

        return counted

    async def none_left(self, timeout_s: float) -> None:
        """Return once no request is being answered, or after `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._none.wait(), timeout_s)
