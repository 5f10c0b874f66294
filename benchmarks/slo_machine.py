"""The machine under a benchmark of several processes: how busy it is, and when it is quiet."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean

import psutil

from benchmarks.environment import note
from benchmarks.slo_load import Schedule

_QUIET_S, _QUIET_CPU = 120.0, 0.4


@dataclass(slots=True)
class Machine:
    """CPU of the whole machine, whoever uses it: a mean each second."""

    shares: list[tuple[float, float]] = field(default_factory=list)

    async def watch(self, origin_s: float, seconds: float) -> None:
        """Look once a second until the schedule is over."""
        await until(origin_s)
        psutil.cpu_percent()
        for number in range(1, max(2, int(seconds))):
            await until(origin_s + number)
            self.shares.append((time.perf_counter() - origin_s, psutil.cpu_percent() / 100))

    def by_phase(self, schedule: Schedule) -> tuple[float, ...]:
        """Mean share of each phase; 0 where a phase was too short to be looked at."""
        return tuple(
            fmean([share for at_s, share in self.shares if schedule.phase_at(at_s) == index] or [0])
            for index in range(len(schedule.phases))
        )


@contextlib.contextmanager
def own_runtime_directory() -> Iterator[None]:
    """Buses and shared mirrors of a run are its own, and leave nothing behind."""
    before = os.environ.get("XDG_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="select-n-slo-") as own:
        os.environ["XDG_RUNTIME_DIR"] = own
        try:
            yield
        finally:
            del os.environ["XDG_RUNTIME_DIR"]
            if before is not None:
                os.environ["XDG_RUNTIME_DIR"] = before


async def until(at_s: float) -> None:
    """Sleep until a moment of `time.perf_counter`; a moment that has passed costs nothing."""
    if (left_s := at_s - time.perf_counter()) > 0:
        await asyncio.sleep(left_s)


async def quiet() -> None:
    """Wait until the processes that were started have loaded their libraries."""
    deadline_s = time.monotonic() + _QUIET_S
    psutil.cpu_percent()
    while time.monotonic() < deadline_s:
        await asyncio.sleep(1.0)
        if psutil.cpu_percent() < 100 * _QUIET_CPU:
            return
    note(f"the machine did not become quiet within {_QUIET_S:g} s")
