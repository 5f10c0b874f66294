"""How a replica reaches its engine: one contract, two homes for the engine (process, inline)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Protocol

from select_n_core.config import ModelConfig
from select_n_core.engine.messages import (
    Commands,
    EngineInfo,
    EngineStats,
    FinishReason,
    Offer,
    Output,
    Request,
    Revocation,
    Start,
    StepReport,
    Turned,
)
from select_n_core.errors import EngineError, OverloadedError, RequestError, SelectNError

_log = logging.getLogger(__name__)
_SILENCE_S = 60.0  # an engine that reports nothing for this long is stuck; idle ones report often
_LEAVE_S = 5.0
_MOST_TURNS = 256  # of k, kept for whoever asks


class EngineClient(Protocol):
    """An engine as asyncio code sees it.

    Every request ends in exactly one `Output` whose `finish` is set: tokens, an error or a
    reason, also when the engine dies. Closing the iterator early cancels the request.
    """

    async def start(self, *, lent: bool = False) -> EngineInfo:
        """Start the engine and wait until it can serve; raises what its loading raised.

        Args:
            lent: it takes the host memory that it cannot serve without, and more when it is
                offered; else it takes all that its configuration and the domain allow.
        """
        ...

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Submit `request` and stream its outputs; the first one, empty, says it was let in.

        A request that does not fit waits for that first output as long as its class lets it.

        Raises:
            RequestError: it can never fit, or is malformed; nothing was queued.
            OverloadedError: it was not let in while it could wait, or the queue is full; it says
                why and when to come again.
            EngineError: the engine is not running.
        """
        ...

    def stats(self) -> EngineStats:
        """The most recent step's statistics, at once."""
        ...

    def turns(self) -> tuple[Turned, ...]:
        """The last turns of k, each with its cause."""
        ...

    async def offer(self, nbytes: int, valid_until_s: float = math.inf) -> None:
        """Let the engine's mirrors take `nbytes` of host memory more; returns once it has them.

        They are kept for the engine then, and mirrors are written one after another.

        Args:
            valid_until_s: by the machine's monotonic clock.

        Raises:
            HostMemoryError: the domain has no room, or the engine read it too late; the lease is
                what it was.
            EngineError: the engine is not running.
        """
        ...

    async def revoke(self, nbytes: int, deadline_s: float) -> None:
        """Take `nbytes` of host memory back; returns once they are free.

        Raises:
            HostMemoryError: they cannot be given back, or were not within `deadline_s`.
            EngineError: the engine is not running.
        """
        ...

    def check_health(self) -> None:
        """Raise EngineError when the engine died or its loop no longer turns."""
        ...

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Stop: running requests get `grace_s` to finish, then end in an error."""
        ...


class _ConnectedClient:
    """Both clients: a connection, a thread that reads it, and a queue per live request."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._start = Start(config)
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[EngineInfo] | None = None
        self._queues: dict[str, asyncio.Queue[Output]] = {}
        self._lease_answers: dict[str, asyncio.Future[None]] = {}
        self._lease_ids = itertools.count()
        self._quiet = asyncio.Event()  # set when the last live request ends
        self._stats = EngineStats()
        self._turns: deque[Turned] = deque(maxlen=_MOST_TURNS)
        self._heard_s = 0.0
        self._dead: EngineError | None = EngineError("the engine was not started")
        self._closing = False
        self._reader: threading.Thread | None = None

    def _open(self) -> Connection:
        raise NotImplementedError

    def _ended(self) -> str:
        """Wait briefly for the engine to be gone and say how it went."""
        raise NotImplementedError

    async def start(self, *, lent: bool = False) -> EngineInfo:
        """See `EngineClient.start`."""
        self._start = Start(self._config, lent)
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        self._dead, self._heard_s = None, time.monotonic()
        self._connection = self._open()
        self._reader = threading.Thread(
            target=self._read, args=(self._connection,), name="select-n-reports", daemon=True
        )
        self._reader.start()
        return await self._started

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """See `EngineClient.generate`."""
        if request.id in self._queues:
            raise RequestError(f"request id {request.id!r} is in use", field="id")
        queue: asyncio.Queue[Output] = asyncio.Queue()
        self._queues[request.id] = queue
        finished = False
        try:
            if request.sent_s is None:  # the engine reads it only between two steps
                request = replace(request, sent_s=time.monotonic())
            self._send(Commands(submit=(request,)))
            while not finished:
                output = await queue.get()
                finished = output.finish is not None
                if isinstance(output.error, (RequestError, OverloadedError)):
                    raise output.error
                yield output
        finally:
            del self._queues[request.id]
            if not self._queues:
                self._quiet.set()
            if not finished:
                with contextlib.suppress(EngineError):  # gone: there is nothing left to cancel
                    self._send(Commands(cancel=(request.id,)))

    def stats(self) -> EngineStats:
        """See `EngineClient.stats`."""
        return self._stats

    def turns(self) -> tuple[Turned, ...]:
        """See `EngineClient.turns`."""
        return tuple(self._turns)

    async def offer(self, nbytes: int, valid_until_s: float = math.inf) -> None:
        """See `EngineClient.offer`."""
        offer = Offer(str(next(self._lease_ids)), nbytes, valid_until_s)
        await self._answered(offer.id, Commands(offer=(offer,)))

    async def revoke(self, nbytes: int, deadline_s: float) -> None:
        """See `EngineClient.revoke`."""
        revocation = Revocation(str(next(self._lease_ids)), nbytes, deadline_s)
        await self._answered(revocation.id, Commands(revoke=(revocation,)))

    async def _answered(self, lease_id: str, commands: Commands) -> None:
        answer = asyncio.get_running_loop().create_future()
        self._lease_answers[lease_id] = answer
        try:
            self._send(commands)
            await answer
        finally:
            del self._lease_answers[lease_id]

    def check_health(self) -> None:
        """See `EngineClient.check_health`."""
        if self._dead is not None:
            raise self._dead
        silent_s = time.monotonic() - self._heard_s
        started = self._started is not None and self._started.done()
        if started and silent_s > _SILENCE_S:
            raise EngineError(f"the engine has not reported for {silent_s:.0f} s")

    async def close(self, *, grace_s: float = 0.0) -> None:
        """See `EngineClient.close`."""
        if self._queues and self._dead is None:
            self._quiet.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), grace_s)
        self._closing = True
        if self._connection is None:
            return
        with contextlib.suppress(EngineError):  # gone already is what was asked for
            self._send(Commands(stop=True))
        await asyncio.to_thread(self._ended)
        if self._reader is not None:
            await asyncio.to_thread(self._reader.join, _LEAVE_S)
        self._connection.close()
        self._connection = None

    def _send(self, commands: Commands) -> None:
        if self._dead is not None:
            raise self._dead
        assert self._connection is not None
        try:
            self._connection.send(commands)
        except OSError as error:
            raise EngineError("the engine is gone") from error

    def _read(self, connection: Connection) -> None:
        assert self._loop is not None
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    message = connection.recv()
                    self._loop.call_soon_threadsafe(self._hear, message)
            self._loop.call_soon_threadsafe(self._lose, self._ended())
        except RuntimeError:
            _log.debug("the event loop closed before the engine did")

    def _hear(self, message: Any) -> None:
        from select_n_core.engine.loop import Failed, Progressed, Started

        self._heard_s = time.monotonic()
        assert self._started is not None
        match message:
            case StepReport():
                self._stats = message.stats
                for output in message.outputs:
                    if (queue := self._queues.get(output.request_id)) is not None:
                        queue.put_nowait(output)
                for answer in message.leases:
                    self._answer(answer.id, answer.error)
                for turned in message.turned:
                    self._turns.append(turned)
                    _log.info("%s: k %d -> %d, %s", self._config.name, *turned[1:])
            case Started():
                if not self._started.done():  # a start that was given up is cancelled
                    self._started.set_result(message.info)
            case Failed():
                self._dead = EngineError(f"the engine did not start: {message.error}")
                if not self._started.done():
                    self._started.set_exception(message.error)
            case Progressed():
                _log.info(
                    "profiling %s: %s (%.0f%%)",
                    self._config.name,
                    message.what,
                    100 * message.share,
                )

    def _answer(self, lease_id: str, error: SelectNError | None) -> None:
        answer = self._lease_answers.get(lease_id)
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)

    def _lose(self, ended: str) -> None:
        if self._dead is None:
            how = "was stopped" if self._closing else f"died: {ended}"
            self._dead = EngineError(f"the engine of model {self._config.name} {how}")
        assert self._started is not None
        if not self._started.done():
            self._started.set_exception(self._dead)
        for request_id, queue in self._queues.items():
            queue.put_nowait(Output(request_id, finish=FinishReason.ERROR, error=self._dead))
        for lease_id in self._lease_answers:
            self._answer(lease_id, self._dead)


class ProcessClient(_ConnectedClient):
    """The engine in a child process: it owns torch, the device and the link."""

    _process: subprocess.Popen[bytes] | None = None
    _spawned: Connection | None = None

    def spawn(self) -> None:
        """Start the process ahead of `start`: it loads its libraries and waits to be told more."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "select_n_core.engine.child", str(theirs.fileno())],
                stdin=subprocess.PIPE,  # its lifeline
                pass_fds=(theirs.fileno(),),
            )
        self._spawned = Connection(ours.detach())

    async def close(self, *, grace_s: float = 0.0) -> None:
        """See `EngineClient.close`."""
        if self._spawned is not None:  # never started
            self._spawned.close()
            self._spawned = None
            await asyncio.to_thread(self._ended)
        await super().close(grace_s=grace_s)

    def _open(self) -> Connection:
        if self._spawned is None:
            self.spawn()
        connection, self._spawned = self._spawned, None
        assert connection is not None
        connection.send(self._start)
        return connection

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._process is None else self._process.pid

    def _ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        return f"its process ended with {code}"


class InlineClient(_ConnectedClient):
    """The engine in a thread of this process: tests and `generate`."""

    _thread: threading.Thread | None = None

    def _open(self) -> Connection:
        from select_n_core.engine.loop import run_engine

        ours, theirs = Pipe()

        def run() -> None:
            try:
                run_engine(self._start, theirs)
            finally:
                theirs.close()

        self._thread = threading.Thread(target=run, name="select-n-engine", daemon=True)
        self._thread.start()
        return ours

    def _ended(self) -> str:
        assert self._thread is not None
        self._thread.join(_LEAVE_S)
        return "its thread ended"
