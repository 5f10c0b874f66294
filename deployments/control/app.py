"""The application `control` as Ray Serve builds it: the cluster controller, one replica."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from ray import serve

from deployments import ray_compat
from deployments.control.messages import Changes, Known, Receipt, ReportBatch, Snapshot
from deployments.control.state import REPORT_TTL_S, ClusterState
from deployments.sizing import SMALL_CPUS
from select_n_core.config import CONTROLLER
from select_n_core.errors import ConfigError, EngineError, UnavailableError
from select_n_core.live import LivePolicy, parse_policy

_EXPIRE_S = REPORT_TTL_S / 8
# Every ingress holds one slot for as long as it watches, every replica one while it reports.
_SLOTS = 10_000
_HEALTH = {"health_check_period_s": 1.0, "health_check_timeout_s": 5.0}
_SHUTDOWN = {"graceful_shutdown_timeout_s": 1.0, "graceful_shutdown_wait_loop_s": 0.1}


class ClusterController:
    """Hears every replica and tells every ingress; what it knows is rebuilt from reports alone."""

    async def __init__(self) -> None:  # type: ignore[misc]
        epoch = await asyncio.to_thread(ray_compat.next_epoch)
        self._state = ClusterState(epoch, time.monotonic)
        self._news = asyncio.Event()
        self._expiring = asyncio.create_task(self._expire())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a new live policy; raises `ConfigError` naming the field that is broken."""
        self._state.set_policy(parse_policy(user_config))
        self._tell()

    async def report(self, batch: ReportBatch) -> Receipt:
        """See `Controller.report`."""
        before = self._state.version
        receipt = self._state.take(batch)
        if self._state.version > before:
            self._tell()
        return receipt

    async def watch(self, known: Known, timeout_s: float) -> Changes:
        """See `Controller.watch`; raises UnavailableError for who knows a later controller."""
        self._state.hear_of(known.epoch)
        if successor := self._state.succeeded_by:
            raise UnavailableError(f"the controller of epoch {successor} knows more")
        if known == Known(self._state.epoch, self._state.version):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), timeout_s)
        return self._state.changes(known)

    def snapshot(self) -> Snapshot:
        """Everything, as it stands."""
        return self._state.snapshot()

    def check_health(self) -> None:
        """Raise EngineError when another controller must take over: Serve then starts it."""
        if self._expiring.done():
            raise EngineError("the controller no longer notices replicas that leave")
        if self._state.succeeded_by:
            raise EngineError(
                f"the controller of epoch {self._state.epoch} was succeeded by that of epoch "
                f"{self._state.succeeded_by}"
            )

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_S)
            before = self._state.version
            self._state.expire()
            if self._state.version > before:
                self._tell()


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application of a configuration; it has no `args`, its policy is the `user_config`."""
    if args:
        raise ConfigError(
            f"args: the application control takes none, got {', '.join(args)}; the policy stands "
            f"in the user_config of its deployment {CONTROLLER}",
            field="args",
        )
    controller = serve.deployment(ClusterController).options(
        name=CONTROLLER,
        ray_actor_options={"num_cpus": SMALL_CPUS},
        max_ongoing_requests=_SLOTS,
        # A line for every report would be most of the work.
        logging_config={"enable_access_log": False},
        user_config=LivePolicy().model_dump(mode="json"),
        **_HEALTH,
        **_SHUTDOWN,
    )
    return controller.bind()
