"""A sender's end: reports leave in the background, and serving never waits for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from deployments.control.backoff import Backoff
from deployments.control.messages import (
    Controller,
    IngressReport,
    Receipt,
    ReplicaReport,
    ReportBatch,
)

_LOOK_S = 0.02  # between two looks at whether something must be told at once
_NEWS_S = 0.05  # between two reports of new measurements
_QUIET_S = 0.1  # between two reports where nothing is new: the sender still lives
_INGRESS_S = 0.5

R = TypeVar("R", bound=ReplicaReport | IngressReport)


class Reporter(Generic[R]):
    """Reports one sender to the controller.

    At most one report is on its way; what changes meanwhile leaves with the next one.

    Args:
        read: the sender as it stands, with a sequence number that grows.
        is_due: whether a report must leave, so many seconds after another one did.
        controller: where the reports go; it may be absent or down for any time.
        look_s: seconds between two looks at what is due.
        hear: gets the controller's answers.
    """

    def __init__(
        self,
        read: Callable[[int], R],
        is_due: Callable[[R, R, float], bool],
        controller: Controller,
        *,
        look_s: float = _LOOK_S,
        hear: Callable[[Receipt], Awaitable[None]] | None = None,
    ) -> None:
        self._read = read
        self._is_due = is_due
        self._controller = controller
        self._look_s = look_s
        self._hear = hear
        self._epoch = 0
        self._sequence = 0

    async def run(self) -> None:
        """Report until cancelled."""
        backoff = Backoff("reports")
        sent: R | None = None
        sent_s = 0.0
        while True:
            try:
                report, now_s = self._read(self._sequence), time.monotonic()
                if sent is None or self._is_due(report, sent, now_s - sent_s):
                    self._sequence += 1
                    receipt = await self._controller.report(ReportBatch(self._epoch, (report,)))
                    self._epoch = max(self._epoch, receipt.epoch)
                    sent, sent_s = report, now_s
                    if self._hear is not None:
                        await self._hear(receipt)
                    backoff.worked()
            except Exception as error:
                await asyncio.sleep(backoff.failed(error))
            await asyncio.sleep(self._look_s)


def reporter_of_replica(
    read: Callable[[int], ReplicaReport],
    controller: Controller,
    hear: Callable[[Receipt], Awaitable[None]] | None = None,
) -> Reporter[ReplicaReport]:
    """Reports a replica, 10 to 20 times per second; k, memory and admission leave at once."""
    return Reporter(read, is_due, controller, hear=hear)


def reporter_of_ingress(
    read: Callable[[int], IngressReport], controller: Controller
) -> Reporter[IngressReport]:
    """Reports an ingress, twice per second."""
    return Reporter(read, lambda *_: True, controller, look_s=_INGRESS_S)


def is_due(report: ReplicaReport, sent: ReplicaReport, since_s: float) -> bool:
    """Whether a replica's `report` must leave, `since_s` after `sent` did."""
    if report.decided != sent.decided:
        return True
    is_busy = report.running + report.waiting + sent.running + sent.waiting > 0
    is_news = is_busy and report.measured_at_s > sent.measured_at_s
    return since_s >= (_NEWS_S if is_news else _QUIET_S)
