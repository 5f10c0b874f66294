"""Runs policies side by side under one schedule: each an engine process on a bus of its own.

Replicas are driven through `EngineClient`, without Ray and HTTP, by one asyncio loop. Layers are
*paced*: a record says how long each computes, the bus is one pacer in shared memory, and nothing
but the model's arithmetic is left out. The replica that joins in one phase is another process on
the same bus; its interpreter is up beforehand, so that loading libraries disturbs nobody.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.environment import note
from benchmarks.slo_cache import Key, Result
from benchmarks.slo_load import Arrival, Schedule
from benchmarks.slo_machine import Machine, own_runtime_directory, quiet, until
from benchmarks.slo_score import Outcome, Sample
from benchmarks.slo_stand import Stand
from select_n_core.config import ModelConfig
from select_n_core.engine.client import EngineClient, ProcessClient
from select_n_core.engine.factory import create_client
from select_n_core.engine.messages import FinishReason, Request, SamplingParams
from select_n_core.errors import EngineError, InfeasibleError, OverloadedError, SelectNError
from select_n_core.links.pacer import Pacer

MAX_CPU = 0.8  # of the machine: beyond it paced engines are late for reasons of their own
_SAMPLE_S = 0.25
_JOIN_S = 3.0  # the second replica starts so long before its load
_DRAIN_S = 30.0  # for what still runs after a load's last arrival
_BUSES = itertools.count()

ClientFactory = Callable[[ModelConfig], EngineClient]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is to be run.

    Attributes:
        label: what results call it; `policy` alone decides what it does.
    """

    label: str
    policy: str
    stand: Stand


class Contender:
    """One entry under the schedule: a replica, for some phases two, and all that was seen."""

    def __init__(
        self, entry: Entry, schedule: Schedule, create: ClientFactory = create_client
    ) -> None:
        self.entry = entry
        self.plan: str | None = None
        self.cannot_start: str | None = None
        self.void: str | None = None
        self.outcomes: list[Outcome] = []
        self.samples: list[Sample] = []
        self.tokens = [0] * len(schedule.phases)
        self.lag_s = [0.0] * len(schedule.phases)
        self.replica_cores: float | None = None
        self._schedule = schedule
        self._bus = Pacer(f"slo-{next(_BUSES)}", entry.stand.bus_bytes_per_s)
        config = entry.stand.config(entry.policy, self._bus.name)
        self._first = create(config)
        self._joining = {begin: create(config) for begin, _ in schedule.stays()}
        self._live: dict[int, EngineClient] = {}

    def spawn(self) -> None:
        """Start every process ahead, those of replicas that join later included."""
        for client in (self._first, *self._joining.values()):
            if isinstance(client, ProcessClient):
                client.spawn()

    async def start(self) -> None:
        """Start the first replica; where no plan fits the memory, that is the result."""
        try:
            info = await self._first.start()
        except InfeasibleError as error:
            self.cannot_start = str(error)
            return
        self.plan = info.plan_line
        self._live[0] = self._first

    async def drive(self, origin_s: float) -> None:
        """Live through the schedule, which begins at `origin_s` of `time.perf_counter`."""
        if self.cannot_start is not None:
            return
        first = [arrival for arrival in self._schedule.arrivals if arrival.replica == 0]
        before = self._cpu_times()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._offer(self._first, first, origin_s))
            group.create_task(self._sample(origin_s))
            group.create_task(self._set_link(origin_s))
            for begin, end in self._schedule.stays():
                group.create_task(self._join(begin, end, origin_s))
        after = self._cpu_times()
        if before is not None and after is not None:
            self.replica_cores = (after[0] - before[0]) / (after[1] - before[1])
        try:
            self._first.check_health()
        except EngineError as error:
            self.void = str(error)

    async def close(self) -> None:
        """End every process of this policy and its bus."""
        for client in (self._first, *self._joining.values()):
            await client.close()
        self._bus.close()

    async def _offer(
        self, client: EngineClient, arrivals: Sequence[Arrival], origin_s: float
    ) -> None:
        """Send each request when its time has come; wait for all, not for ever."""
        try:
            async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as group:
                for number, arrival in enumerate(arrivals):
                    due_s = origin_s + arrival.at_s
                    await until(due_s)
                    late_s = time.perf_counter() - due_s
                    self.lag_s[arrival.phase] = max(self.lag_s[arrival.phase], late_s)
                    group.create_task(self._request(client, f"{number}", arrival, due_s))
                limit.reschedule(asyncio.get_running_loop().time() + _DRAIN_S)
        except TimeoutError:
            note(f"{self.entry.label}: requests still ran {_DRAIN_S:g} s after the last was sent")

    async def _request(
        self, client: EngineClient, request_id: str, arrival: Arrival, due_s: float
    ) -> None:
        request = Request(
            id=request_id,
            prompt=(0,) * arrival.prompt_tokens,
            sampling=SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True),
        )
        admitted, ended, first_s, last_s, tokens = False, "unfinished", 0.0, 0.0, 0
        try:
            async for output in client.generate(request):
                now_s = time.perf_counter()
                admitted = admitted or output.error is None
                if output.tokens:
                    first_s, last_s = first_s or now_s, now_s
                    tokens += len(output.tokens)
                    at_s = now_s - due_s + arrival.at_s
                    self.tokens[self._schedule.phase_at(at_s)] += len(output.tokens)
                if output.finish is not None:
                    ended = _ending(output.finish, output.error)
        except SelectNError as error:
            ended = _ending(FinishReason.ERROR, error)
        finally:
            complete = ended == FinishReason.LENGTH and tokens > 1
            self.outcomes.append(
                Outcome(
                    phase=arrival.phase,
                    replica=arrival.replica,
                    admitted=admitted,
                    ended=ended,
                    ttft_s=first_s - due_s if tokens else None,
                    tpot_s=(last_s - first_s) / (tokens - 1) if complete else None,
                )
            )

    async def _join(self, begin: int, end: int, origin_s: float) -> None:
        """The second replica: it joins the bus, serves its own load for its stay, and leaves."""
        client = self._joining[begin]
        await until(origin_s + begin * self._schedule.phase_s - _JOIN_S)
        try:
            await client.start()
        except SelectNError as error:
            self.void = f"the second replica did not start: {error}"
            return
        self._live[1] = client
        own = [
            arrival
            for arrival in self._schedule.arrivals
            if arrival.replica == 1 and begin <= arrival.phase <= end
        ]
        await self._offer(client, own, origin_s)
        del self._live[1]
        await client.close()

    async def _set_link(self, origin_s: float) -> None:
        full = self._bus.bytes_per_s
        for index, phase in enumerate(self._schedule.phases):
            await until(origin_s + index * self._schedule.phase_s)
            self._bus.set_bandwidth(full * phase.link_share)
        await until(origin_s + self._schedule.seconds)
        self._bus.set_bandwidth(full)

    async def _sample(self, origin_s: float) -> None:
        for number in range(int(self._schedule.seconds / _SAMPLE_S)):
            await until(origin_s + number * _SAMPLE_S)
            for replica, client in self._live.items():
                stats = client.stats()
                self.samples.append(
                    Sample(
                        at_s=round(time.perf_counter() - origin_s, 3),
                        replica=replica,
                        k=stats.k,
                        running=stats.running,
                        waiting=stats.waiting,
                        kv_free_tokens=stats.kv_free_tokens,
                        host_bytes=stats.host_bytes,
                        link_bytes=stats.link_bytes,
                    )
                )

    def _cpu_times(self) -> tuple[float, float] | None:
        """(CPU seconds of the first replica's process, now); None where it has none or it died."""
        if not isinstance(self._first, ProcessClient) or self._first.pid is None:
            return None
        try:
            times = psutil.Process(self._first.pid).cpu_times()
        except psutil.NoSuchProcess:
            return None
        return times.user + times.system, time.perf_counter()


async def run_together(
    entries: Sequence[Entry], schedule: Schedule, key: Key, create: ClientFactory = create_client
) -> list[Result]:
    """Run `entries` at the same time and say what was observed of each.

    A run in whose phases the machine was busier than `MAX_CPU`, or whose engine died, is void.
    """
    with own_runtime_directory():
        contenders = [Contender(entry, schedule, create) for entry in entries]
        cpu = await _run(contenders, schedule)
    busy = f"the machine was {max(cpu):.0%} busy in a phase" if max(cpu) > MAX_CPU else None
    return [
        Result(
            key=key,
            seed=schedule.seed,
            memory_bytes=contender.entry.stand.memory_bytes,
            policy=contender.entry.label,
            plan=contender.plan,
            cannot_start=contender.cannot_start,
            outcomes=tuple(contender.outcomes),
            samples=tuple(contender.samples),
            tokens=tuple(contender.tokens),
            cpu=cpu,
            replica_cores=contender.replica_cores,
            lag_s=tuple(contender.lag_s),
            void=contender.void or (busy if contender.cannot_start is None else None),
        )
        for contender in contenders
    ]


async def _run(contenders: Sequence[Contender], schedule: Schedule) -> tuple[float, ...]:
    """Start all, live through the schedule, close all; returns the machine's CPU by phase."""
    machine = Machine()
    try:
        for contender in contenders:
            contender.spawn()
        await asyncio.gather(*(contender.start() for contender in contenders))
        await quiet()
        # As engines do: a full collection in here would stop every clock for a third of a second.
        gc.collect()
        gc.freeze()
        origin_s = time.perf_counter() + _JOIN_S + 1.0
        async with asyncio.TaskGroup() as group:
            group.create_task(machine.watch(origin_s, schedule.seconds))
            for contender in contenders:
                group.create_task(contender.drive(origin_s))
    finally:
        gc.unfreeze()
        for contender in contenders:
            await contender.close()
    return machine.by_phase(schedule)


def _ending(finish: FinishReason, error: Exception | None) -> str:
    if isinstance(error, OverloadedError):
        return f"overloaded_{error.reason}"
    return error.code if isinstance(error, SelectNError) else str(finish)
