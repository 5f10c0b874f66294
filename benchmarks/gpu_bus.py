"""The bus's section of `benchmarks.gpu`: two processes on one device, both streaming, one board.

Each process is a replica: its own model, mirrors and link. First each runs alone, for its unit's
copy time, its time at k = 0 and with all units streamed. Then both decode at the same time; before
every iteration each ticks on the board, rests if it is ahead of its share of the bus, and takes the
largest k that this share allows within the promised time. The promise is a little more than all
units alone take, so that both want the whole bus.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.environment import note
from benchmarks.gpu_bench import Batch, Budget, Rig, batch, copy_seconds, open_rig
from benchmarks.gpu_models import SHAPES, Shape, random_model
from select_n_core.config import BusConfig
from select_n_core.decisions.bus import SHARED, Grant
from select_n_core.decisions.grant import Ration, within_grant
from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.decisions.pace import pace_of
from select_n_core.links.base import Direction
from select_n_core.links.board import Member
from select_n_core.links.emulated import EmulatedLink

SLOTS = 2
PROMISE = 1.2  # times an iteration with all units streamed, alone on the bus
_START_S = 240.0  # to load libraries, place a model and write its mirrors
_SETTLED = 0.25  # of the run is left out: boards and rings fill up


@dataclass(frozen=True, slots=True)
class Alone:
    """What a replica measured while it had the bus to itself."""

    unit_bytes: int
    transfer_s: float
    resident_s: float
    streamed_s: float
    units: int

    @property
    def bytes_per_s(self) -> float:
        """Of the link."""
        return self.unit_bytes / self.transfer_s

    @property
    def use_bytes_per_s(self) -> float:
        """Link use with all units streamed: k_max*S/T."""
        return self.units * self.unit_bytes / self.streamed_s

    @property
    def latency(self) -> LatencyModel:
        """The model that a decode step's k is chosen by; what is outside the units is not told."""
        compute = ComputeModel(
            token_grid=((1, self.resident_s / self.units),),
            per_context_token_s=0.0,
            per_pair_s=0.0,
            outside_s=0.0,
            outside_per_row_s=0.0,
        )
        return LatencyModel(units=self.units, transfer_s=self.transfer_s, streaming=compute)


@dataclass(frozen=True, slots=True)
class Together:
    """One replica's run beside the other: a sample after each iteration.

    Attributes:
        at_s: on the clock that processes of a machine share. sent_bytes: host to device so far.
    """

    at_s: list[float]
    sent_bytes: list[int]
    ks: list[int]
    grants: list[float]
    capacity_bytes_per_s: float

    def bytes_between(self, begin_s: float, end_s: float) -> int:
        """Bytes of the iterations that ended in this time."""
        first, last = (bisect_left(self.at_s, at_s) for at_s in (begin_s, end_s))
        return self.sent_bytes[min(last, len(self.at_s) - 1)] - self.sent_bytes[first]


def bus(rig: Rig, shape: Shape, *, seconds: float) -> dict[str, Any]:
    """Summed link bytes of two replicas against min(bus, sum of k_max*S/T).

    Args:
        seconds: for which both run at the same time.
    """
    link = rig.link
    bytes_per_s = link.bytes_per_s if isinstance(link, EmulatedLink) else math.nan  # measured
    spawn = multiprocessing.get_context("spawn")
    name = f"benchmark-{os.getpid()}"
    pipes = [spawn.Pipe() for _ in range(2)]
    replicas = [
        spawn.Process(
            target=_replica,
            args=(theirs, rig.link.kind, bytes_per_s, shape.name, name, rig.iterations),
            daemon=True,
        )
        for _, theirs in pipes
    ]
    try:
        for replica, (_, theirs) in zip(replicas, pipes, strict=True):
            replica.start()
            theirs.close()
        ours = [connection for connection, _ in pipes]
        for connection in ours:
            _hear(connection, _START_S)  # it is up
        alone: list[Alone] = []
        for connection in ours:  # one after another
            connection.send("alone")
            alone.append(_hear(connection, _START_S))
        for connection in ours:
            connection.send(seconds)
        together = [_hear(connection, seconds + _START_S) for connection in ours]
    finally:
        for replica in replicas:
            if replica.pid is not None:
                replica.kill()
                replica.join()
    return _found(shape, alone, together)


def _found(shape: Shape, alone: list[Alone], together: list[Together]) -> dict[str, Any]:
    begin_s = max(run.at_s[0] for run in together)
    end_s = min(run.at_s[-1] for run in together)
    begin_s += _SETTLED * (end_s - begin_s)
    rates = [run.bytes_between(begin_s, end_s) / (end_s - begin_s) for run in together]
    capacity = max(each.bytes_per_s for each in alone)
    wanted = sum(each.use_bytes_per_s for each in alone)
    share = sum(rates) / min(capacity, wanted)
    note(
        f"bus: two of {shape.name} move {sum(rates) / 1e9:.2f} GB/s together "
        f"({' + '.join(f'{rate / 1e9:.2f}' for rate in rates)}), {share:.1%} of min(bus "
        f"{capacity / 1e9:.2f}, sum of k_max*S/T {wanted / 1e9:.2f}) GB/s; mean k "
        f"{' and '.join(f'{statistics.mean(run.ks):.1f}' for run in together)}"
    )
    return {
        "model": shape.name,
        "units": alone[0].units,
        "d": SLOTS,
        "bus_bytes_per_s": capacity,
        "wanted_bytes_per_s": wanted,
        "moved_bytes_per_s": sum(rates),
        "share": share,
        "shared_out": SHARED,
        "replicas": [
            {
                "t_s": each.transfer_s,
                "resident_s": each.resident_s,
                "streamed_s": each.streamed_s,
                "moved_bytes_per_s": rate,
                "iterations": len(run.ks),
                "mean_k": statistics.mean(run.ks),
                "mean_grant_bytes_per_s": statistics.mean(run.grants),
                "capacity_bytes_per_s": run.capacity_bytes_per_s,
            }
            for each, run, rate in zip(alone, together, rates, strict=True)
        ],
    }


def _hear(connection: Connection, within_s: float) -> Any:
    """The next message of a replica; raises what it raised."""
    if not connection.poll(within_s):
        raise TimeoutError(f"a replica said nothing for {within_s:.0f} s")
    heard = connection.recv()
    if isinstance(heard, Exception):
        raise heard
    return heard


def _replica(
    connection: Connection, kind: str, bytes_per_s: float, shape: str, name: str, iterations: int
) -> None:
    """The process of one replica."""
    try:
        with (
            open_rig(
                kind, bytes_per_s, Budget(_START_S), iterations, bus=BusConfig(name=name)
            ) as rig,
            batch(rig, random_model(SHAPES[shape]), slots=SLOTS) as decoding,
        ):
            connection.send("up")
            connection.recv()
            alone = _alone(rig, decoding)
            connection.send(alone)
            seconds = connection.recv()
            with Member(name, alone.bytes_per_s) as member:
                connection.send(_together(rig, decoding, alone, member, seconds))
            connection.recv()  # until the parent ends it: the other must not find the bus empty
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _alone(rig: Rig, decoding: Batch) -> Alone:
    unit_bytes = decoding.executor.memory.slot_bytes
    seconds = copy_seconds(rig, unit_bytes, Direction.TO_DEVICE, 5)
    resident_s = decoding.iterations(0)
    return Alone(
        unit_bytes=unit_bytes,
        transfer_s=statistics.median(seconds),
        resident_s=statistics.median(resident_s),
        streamed_s=statistics.median(decoding.iterations(decoding.units)),
        units=decoding.units,
    )


def _together(rig: Rig, decoding: Batch, alone: Alone, member: Member, seconds: float) -> Together:
    promise_s, ration = PROMISE * alone.streamed_s, Ration()
    sent = _sent_bytes(rig)
    run = Together([], [], [], [], member.capacity_bytes_per_s)
    decoding.executor.streamer.take_used()
    copying: float | None = None
    seen: float | None = None
    begun_s = time.perf_counter()
    while time.perf_counter() < begun_s + seconds:
        time.sleep(ration.rest_s(time.perf_counter()))
        granted = member.tick(alone.use_bytes_per_s, seen_bytes_per_s=seen, copying_share=copying)
        k = _k_within(alone, member.grant, promise_s)
        ration.moved(k * alone.unit_bytes, time.perf_counter(), member.grant)
        iteration_s = decoding.iteration(k)
        nbytes, copied_s = decoding.executor.streamer.take_used()
        seen = nbytes / copied_s if copied_s else None
        copying = min(1.0, copied_s / iteration_s)
        run.at_s.append(time.perf_counter())
        run.sent_bytes.append(sent())
        run.ks.append(k)
        run.grants.append(granted)
    member.tick(0.0)
    return Together(run.at_s, run.sent_bytes, run.ks, run.grants, member.capacity_bytes_per_s)


def _k_within(alone: Alone, grant: Grant, promise_s: float) -> int:
    """The largest k whose step ends in time beside the others on the bus; none is 0."""
    beside = within_grant(alone.latency, alone.unit_bytes, grant)
    fitting = bisect_right(
        range(alone.units + 1),
        promise_s,
        key=lambda k: pace_of(beside, k, SLOTS).step_s(StepShape(decode_rows=1)),
    )
    return max(0, fitting - 1)


def _sent_bytes(rig: Rig) -> Callable[[], int]:
    counted = rig.link.counters.bytes
    return lambda: sum(n for (way, _), n in counted.items() if way is Direction.TO_DEVICE)
