"""The engine's loop, the same in a child process and in a thread: commands in, reports out."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from multiprocessing.connection import Connection

from select_n_core.engine.build import build_engine
from select_n_core.engine.engine import Engine
from select_n_core.engine.messages import Commands, EngineInfo, Start
from select_n_core.errors import EngineError, SelectNError

_log = logging.getLogger(__name__)

_TEND_S = 0.005  # between two moves towards the lease while nothing else is to do
HEARTBEAT_S = 1.0  # an idle engine reports this often, so that its statistics age


@dataclass(frozen=True, slots=True)
class Progressed:
    """From a starting engine: what it does now and the share done."""

    what: str
    share: float


@dataclass(frozen=True, slots=True)
class Started:
    """From a starting engine: it serves."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class Failed:
    """From a starting engine: it will not serve, and why."""

    error: Exception


def run_engine(start: Start, connection: Connection) -> None:
    """Build the engine and serve `connection` until it is told to stop or the other end is gone."""
    try:
        _run(start, connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the client is gone; nobody is left to answer


def _run(start: Start, connection: Connection) -> None:
    try:
        engine, info = build_engine(
            start.config,
            lambda what, share: connection.send(Progressed(what, share)),
            lent=start.lent,
        )
    except (BrokenPipeError, ConnectionResetError):
        raise
    except SelectNError as error:
        connection.send(Failed(error))
        return
    except Exception as error:  # of a library: it may not survive the way to another process
        _log.error("the engine of model %s did not start", start.config.name, exc_info=error)
        connection.send(Failed(EngineError(f"{type(error).__name__}: {error}")))
        return
    try:
        # Model and libraries are hundreds of thousands of objects that live as long as this: a full
        # collection would look at each of them, for longer than a step takes.
        gc.collect()
        gc.freeze()
        connection.send(Started(info))
        _serve(engine, connection)
    finally:
        engine.close()


def _serve(engine: Engine, connection: Connection) -> None:
    while True:
        wait_s = HEARTBEAT_S if engine.idle else engine.rest_s
        if engine.idle and not engine.lease.settled:
            wait_s = _TEND_S
        while connection.poll(wait_s):
            commands: Commands = connection.recv()
            for request in commands.submit:
                engine.submit(request)
            for request_id in commands.cancel:
                engine.cancel(request_id)
            for offer in commands.offer:
                engine.lease.offer(offer.id, offer.nbytes, offer.valid_until_s)
            for revocation in commands.revoke:
                engine.lease.revoke(revocation.id, revocation.nbytes, revocation.deadline_s)
            if commands.stop:
                engine.abort(EngineError("the engine is shutting down"))
                connection.send(engine.step())
                return
            wait_s = engine.rest_s
        connection.send(engine.step(connection.send))
