"""A model's replicas behind a Ray Serve handle: every error becomes a `Failure` here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from deployments import ray_compat
from deployments.calls import Call, Chunk, Failure, Report
from select_n_core.decisions.facts import Reason
from select_n_core.errors import OverloadedError, SelectNError

_log = logging.getLogger(__name__)


class HandleBackend:
    """Reaches the replicas of one model.

    Args:
        handle: of the model's deployment.
        model: its name, for messages.
    """

    def __init__(self, handle: DeploymentHandle, model: str) -> None:
        self._handle = handle
        self._generate = handle.options(stream=True, method_name="generate")
        self._check = handle.options(method_name="check")
        self._model = model

    async def generate(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """See `Backend.generate`."""
        response = ray_compat.call_apart(self._generate, call)
        ended = False
        try:
            async for chunk in response:
                yield chunk
            ended = True
        except Exception as error:
            ended = True
            yield self._failure(error)
        finally:
            if not ended:
                response.cancel()

    async def check(self, timeout_s: float) -> Failure | None:
        """See `Backend.check`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._check.remote()
        except TimeoutError:
            return Failure("unavailable", f"no replica of {self._model} answers")
        except Exception as error:
            return self._failure(error)
        return None

    async def reports(self, timeout_s: float) -> list[Report]:
        """See `Backend.reports`."""
        try:
            async with asyncio.timeout(timeout_s):
                answers = await self._handle.broadcast("report").results_async(
                    return_exceptions=True
                )
        except Exception as error:
            _log.warning("no reports of %s: %r", self._model, error)
            return []
        for answer in answers:
            if isinstance(answer, BaseException):
                _log.warning("a replica of %s does not report: %r", self._model, answer)
        return [answer for answer in answers if isinstance(answer, Report)]

    def _failure(self, error: Exception) -> Failure:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, SelectNError):
            return Failure.of(cause)
        if isinstance(cause, BackPressureError):
            retry_after_s = getattr(cause, "retry_after_s", None)
            return Failure(
                f"{OverloadedError.code}_{Reason.QUEUE}",
                f"{self._model} is overloaded; retry later",
                None,
                retry_after_s or 1.0,
            )
        if isinstance(cause, (RayActorError, DeploymentUnavailableError, RequestCancelledError)):
            _log.warning("lost a replica of %s: %r", self._model, cause)
            return Failure(
                "unavailable", f"a replica of {self._model} was lost; send the request again"
            )
        _log.error("call to %s failed", self._model, exc_info=error)
        return Failure.of(cause)
