"""The controller over Ray: looked up when it is first needed, and again after it failed."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments import ray_compat
from deployments.control.messages import Changes, Known, Receipt, ReportBatch
from select_n_core.config import CONTROL_APPLICATION, CONTROLLER

# A handle waits without limit where no controller runs.
_ANSWER_S = 1.0


class RemoteController:
    """See `Controller`; raises TimeoutError or what Ray raises when it does not answer."""

    def __init__(self) -> None:
        self._handle: DeploymentHandle | None = None
        self._finding: asyncio.Task[DeploymentHandle] | None = None

    async def report(self, batch: ReportBatch) -> Receipt:
        """See `Controller.report`."""
        receipt: Receipt = await self._call("report", batch, within_s=_ANSWER_S)
        return receipt

    async def watch(self, known: Known, timeout_s: float) -> Changes:
        """See `Controller.watch`."""
        changes: Changes = await self._call(
            "watch", known, timeout_s, within_s=timeout_s + _ANSWER_S
        )
        return changes

    async def _call(self, method: str, *args: Any, within_s: float) -> Any:
        response = None
        try:
            async with asyncio.timeout(within_s):
                if self._handle is None:
                    self._handle = await self._find()
                response = self._handle.options(method_name=method).remote(*args)
                return await response
        except BaseException:
            self._handle = None
            if response is not None:
                response.cancel()
            raise

    async def _find(self) -> DeploymentHandle:
        if self._finding is None or self._finding.done():
            self._finding = asyncio.create_task(
                asyncio.to_thread(ray_compat.find_deployment, CONTROL_APPLICATION, CONTROLLER)
            )
        # One that hangs is waited for again and not repeated: each of them holds a thread.
        return await asyncio.shield(self._finding)
