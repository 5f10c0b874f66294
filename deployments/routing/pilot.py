"""Where an ingress sends a model's calls: the latest snapshot, less what it sent there since.

Without a controller, or while it is not heard of, there is no course: Ray Serve then routes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from deployments.calls import DEFAULT_MAX_TOKENS, Call, Failure, Message, Route
from deployments.control.cache import SnapshotCache
from deployments.control.messages import ReplicaReport, Snapshot
from deployments.routing.lengths import OutputLengths
from deployments.tenants.charges import prompt_tokens
from select_n_core.decisions.facts import Reason
from select_n_core.decisions.routing import (
    NOTHING,
    Candidate,
    Need,
    Sent,
    TurnedAway,
    plan_course,
)
from select_n_core.errors import OverloadedError
from select_n_core.quantities import format_seconds
from select_n_core.slo import SLO

_FRESH_S = 1.0  # replicas report ten times per second: after so much silence nobody is heard
_PREFIX = 1024  # characters, or tokens, of a prompt by which calls are taken for alike

_WHY = {
    Reason.KV: "there is no KV memory for it",
    Reason.TPOT: "one more would slow down those that run beyond what they were promised",
    Reason.TTFT: "its first token would come later than promised",
    Reason.QUEUE: "others are there before it",
}


@dataclass(slots=True)
class _Flight:
    """A call that was sent and has not ended."""

    route: Route
    need: Need
    tokens: int


class Pilot:
    """Chooses replicas for the calls of one model at one ingress.

    Args:
        ingress: its name, which no other has.
        model: by name. slo: what it promises to whoever is promised nothing else.
        cache: where snapshots arrive.
        draw: decides where several replicas would do.
        time_of_day: as reports are stamped with.
    """

    def __init__(
        self,
        ingress: str,
        model: str,
        slo: SLO,
        cache: SnapshotCache,
        *,
        draw: random.Random | None = None,
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        self._ingress = ingress
        self._model = model
        self._slo = slo
        self._cache = cache
        self._draw = draw or random.Random()
        self._time_of_day = time_of_day
        self._number = 0
        self._flights: dict[int, _Flight] = {}
        self._lengths = OutputLengths()
        self._looked_at: Snapshot | None = None
        self._replicas: tuple[ReplicaReport, ...] = ()

    def choose(self, call: Call, but: str = "") -> Route | Failure:
        """Where the call is to go; a failure where nobody could let it in for as long as it waits.

        Args:
            but: a replica that was asked in vain.
        """
        self._number += 1
        route = Route(avoid=(but,) if but else (), sender=self._ingress, number=self._number)
        replicas = self._known()
        if not replicas:
            return route
        sent = self._sent_since(replicas)
        now_s = self._time_of_day()
        candidates = [
            Candidate(
                name=each.replica,
                vacancy=each.service.vacancy,
                age_s=max(0.0, now_s - each.measured_at_s),
                draining=each.service.draining,
                sent=sent.get(each.replica, NOTHING),
            )
            for each in replicas
            if each.replica != but
        ]
        course = plan_course(candidates, self._need(call), self._draw, _affinity(call))
        if course.turned_away is not None:
            return _overloaded(self._model, course.turned_away)
        route.prefer, route.avoid = course.prefer, (*course.avoid, *route.avoid)
        return route

    @contextmanager
    def sending(self, call: Call, route: Route) -> Iterator[None]:
        """Counts the call at the replica it is sent to, until a report does, or it has ended."""
        need = self._need(call)
        output = need.most_output if need.expected_output is None else need.expected_output
        tokens = need.prompt_tokens + min(output, need.most_output)
        self._flights[route.number] = _Flight(route, need, tokens)
        try:
            yield
        finally:
            self._flights.pop(route.number, None)

    def finished(self, call: Call, output_tokens: int) -> None:
        """The call came to its end, after so many tokens."""
        self._lengths.saw(call.terms.slo_class, output_tokens)

    def has_lost(self, route: Route) -> bool:
        """Whether the replica was known when the call was sent there, and reports no more."""
        replicas, target = self._known(), route.target
        if not replicas or target not in (*route.prefer, *route.avoid):
            return False
        return all(each.replica != target for each in replicas)

    def promised(self, call: Call) -> SLO:
        """The call's own targets, or else the model's."""
        return call.terms.slo or self._slo

    def _known(self) -> tuple[ReplicaReport, ...]:
        """The model's replicas, while the controller is heard."""
        snapshot, age_s = self._cache.snapshot, self._cache.age_s
        if snapshot is None or age_s is None or age_s > _FRESH_S:
            return ()
        if snapshot is not self._looked_at:
            self._looked_at = snapshot
            self._replicas = tuple(
                each for each in snapshot.replicas.values() if each.model == self._model
            )
        return self._replicas

    def _sent_since(self, replicas: tuple[ReplicaReport, ...]) -> Mapping[str, Sent]:
        heard = {
            each.replica: each.service.vacancy.heard.get(self._ingress, 0)
            for each in replicas
            if each.service.vacancy is not None
        }
        sent: dict[str, Sent] = {}
        included = []
        for number, flight in self._flights.items():
            target = flight.route.target
            if number <= heard.get(target, 0):
                included.append(number)
                continue
            before, need = sent.get(target, NOTHING), flight.need
            sent[target] = Sent(
                before.requests + 1,
                before.tokens + flight.tokens,
                before.prompt_tokens + need.prompt_tokens,
                min(before.tpot_s, need.tpot_s),
            )
        for number in included:
            del self._flights[number]
        return sent

    def _need(self, call: Call) -> Need:
        slo = self.promised(call)
        return Need(
            prompt_tokens=max(1, prompt_tokens(call)),
            most_output=call.max_tokens or DEFAULT_MAX_TOKENS,
            ttft_s=slo.ttft_s,
            tpot_s=slo.tpot_s,
            max_wait_s=slo.longest_wait_s,
            expected_output=self._lengths.expected(call.terms.slo_class),
            priority=call.terms.priority,
        )


def _affinity(call: Call) -> str:
    """What calls have in common that gain by the same replica: the session, or how they begin."""
    if call.session:
        return f"{call.terms.tenant}\0{call.session}"
    if isinstance(call.prompt, str):
        begin: object = call.prompt[:_PREFIX]
    else:
        turns = [turn for turn in call.prompt if isinstance(turn, Message)]
        first = next((at for at, turn in enumerate(turns) if turn.role == "user"), 0)
        # A conversation grows at its end: up to its first question it stays what it was.
        said = "\0".join(turn.content for turn in turns[: first + 1])
        begin = said[:_PREFIX] if turns else call.prompt[:_PREFIX]
    return f"{call.terms.tenant}\0\0{begin}"


def _overloaded(model: str, turned_away: TurnedAway) -> Failure:
    reason, fits_in_s = turned_away
    again = format_seconds(max(0.0, fits_in_s), up=True)
    return Failure.of(
        OverloadedError(
            f"no replica of {model} could let the request in for as long as it may wait: "
            f"{_WHY[reason]}; send it again in {again}",
            reason=reason,
            retry_after_s=fits_in_s,
        )
    )
