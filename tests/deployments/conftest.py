from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from standins import Client, ScriptedEngine, codec, serving


@pytest.fixture(scope="session")
def text():
    return codec()


@pytest.fixture
def says(text) -> Iterator[Callable[..., Client]]:
    """`says("some text", HANG)` serves a model that answers so."""
    with ExitStack() as stack:

        def serve(*script, stream_timeout: str = "5s", text=text, **engine) -> Client:
            standin = ScriptedEngine(text, *script, **engine)
            url = stack.enter_context(serving(standin, text, stream_timeout=stream_timeout))
            client = Client(url, standin)
            stack.callback(client.http.close)
            return client

        yield serve
