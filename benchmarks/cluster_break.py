"""Ways to break a cluster: processes that are killed, hang, or are kept from coming back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from benchmarks.cluster_nodes import Engine
from select_n_core.config import CONTROL_APPLICATION, CONTROLLER

_PAUSE_S = 0.05


def kill_controller() -> bool:
    """End the controller's process; whether there was one."""
    import ray
    from ray.util import list_named_actors

    names = [each["name"] for each in list_named_actors(all_namespaces=True)]
    living = [name for name in names if f"{CONTROL_APPLICATION}#{CONTROLLER}" in name]
    for name in living:
        with suppress(ValueError):  # it ended by itself meanwhile
            ray.kill(ray.get_actor(name, namespace="serve"))
    return bool(living)


async def keep_controller_down(seconds: float) -> int:
    """Kill every controller that comes for so long; how many there were."""
    kills, end_s = 0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        kills += await asyncio.to_thread(kill_controller)
        await asyncio.sleep(_PAUSE_S)
    return kills


def kill_replica(engine: Engine) -> None:
    """End a replica's actor; its engine follows."""
    os.kill(engine.actor, signal.SIGKILL)


@contextmanager
def hanging(pid: int) -> Iterator[None]:
    """Let a process hang for a while; it may be gone afterwards."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
