"""What a replica reports of the service it can still give: whoever routes calls decides by it."""

from __future__ import annotations

from dataclasses import dataclass

from deployments import calls
from select_n_core.decisions.vacancy import Vacancy


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """A replica's part in serving.

    Attributes:
        draining: it takes no more calls.
        vacancy: the room that is left; None before its engine said anything.
    """

    draining: bool = False
    vacancy: Vacancy | None = None

    @classmethod
    def of(cls, report: calls.Report) -> ServiceReport:
        """What others need of a replica's own report."""
        return cls(report.draining, report.stats.vacancy)


UNKNOWN = ServiceReport()
