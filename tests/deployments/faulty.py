"""An engine for a real Ray that breaks where a call asks for it, once; see `broken_by`."""

import os
import signal
import time
from pathlib import Path

import served
import standins

from select_n_core.config import ModelConfig

BLOCKED_S = 4.0  # longer than the controller waits for a report


def broken_by(fault: str, mark: Path) -> str:
    """A prompt that breaks the first replica that gets it: `block` or `die`; `mark` says so."""
    return f"{fault}:{mark}"


class Faulty(served.Endless):
    async def _outputs(self, request):
        said = "".join(self._codec.token_text(token) for token in request.prompt)
        fault, _, mark = said.partition(":")
        if mark and _is_first(mark):
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(BLOCKED_S)  # noqa: ASYNC251  nothing in this process goes on
        async for output in super()._outputs(request):
            yield output


def _is_first(mark: str) -> bool:
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


async def load(model: ModelConfig):
    text = standins.codec()
    return text, Faulty(text)
