from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from clocks import Clock
from standins import Client, ScriptedEngine, codec, serving

from deployments.cli.main import app


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


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cli(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """`cli("plan", "--json")` runs the command: its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["select-n", *arguments])
        with pytest.raises(SystemExit) as ended:
            app()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
