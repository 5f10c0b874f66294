"""An engine for a real Ray that breaks where a call asks for it, once; see `broken_by`."""

import os
import signal
import time
from pathlib import Path

import served
import standins

from select_n_core.config import ModelConfig
from select_n_core.decisions.latency import ComputeModel, LatencyModel
from select_n_core.decisions.vacancy import Vacancy, levels_of
from select_n_core.engine.messages import EngineStats

LATENCY = LatencyModel(24, 4e-3, ComputeModel(((1, 1e-3), (256, 16e-3)), 2e-8, 0, 1e-3, 0))
BLOCKED_S = 4.0  # longer than the controller waits for a report


def broken_by(fault: str, mark: Path) -> str:
    """A prompt that breaks the first replica that gets it: `block` or `die`; `mark` says so."""
    return f"{fault}:{mark}"


class Faulty(served.Endless):
    """It says what room it has, too."""

    def __init__(self, codec) -> None:
        super().__init__(codec)
        self._live = 0
        self._heard: dict[str, int] = {}

    async def generate(self, request):
        self._live += 1
        self._heard[request.sender] = request.number
        try:
            async for output in super().generate(request):
                yield output
        finally:
            self._live -= 1

    def stats(self):
        room = Vacancy(
            levels=levels_of(LATENCY, 2, ((4, 4000), (12, 8000)), 16, 128),
            max_batch=16,
            max_step_tokens=128,
            expected_output=64,
            tpot_s=0.098,
            running=self._live,
            running_tokens=self._live * 96,
            heard=dict(self._heard),
        )
        return EngineStats(measured_at_s=time.time(), running=self._live, vacancy=room)

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
