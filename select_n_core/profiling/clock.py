"""How long each unit of a pass computed and waited: by the host's clock, or by the device's own.

Where the host is the compute stream, the streamer's span tells. A GPU computes long after the
host has gone on: events before and behind every unit tell, on the stream that runs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from select_n_core.models.load import LoadedModel
from select_n_core.offload.executor import Executor


class UnitTimes(NamedTuple):
    """Seconds of every unit in call order."""

    computes_s: list[float]
    waits_s: list[float]


class HostClock:
    """Reads the streamer's span."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def take(self) -> UnitTimes | None:
        """Of the pass that has just ended."""
        span = self._executor.streamer.span
        return UnitTimes(span.computes_s(), span.waits_s())

    def close(self) -> None:
        """Nothing to give back."""


class DeviceClock:
    """Events of a CUDA stream around every unit, by hooks behind the streamer's own."""

    def __init__(self, model: LoadedModel) -> None:
        self._marks: list[Any] = []
        self._handles = [
            handle
            for run in model.runs
            for handle in (
                run.first.register_forward_pre_hook(self._mark),
                run.last.register_forward_hook(self._mark),
            )
        ]

    def _mark(self, *_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def take(self) -> UnitTimes | None:
        """Of the pass that has just ended; None where it was a captured graph without hooks."""
        marks, self._marks = self._marks, []
        if not marks:
            return None
        torch.cuda.synchronize()
        begins, ends = marks[::2], marks[1::2]
        computes_s = [
            begin.elapsed_time(end) / 1e3 for begin, end in zip(begins, ends, strict=True)
        ]
        gaps_s = [
            before.elapsed_time(after) / 1e3
            for before, after in zip(ends[:-1], begins[1:], strict=True)
        ]
        return UnitTimes(computes_s, [0.0, *gaps_s])

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
