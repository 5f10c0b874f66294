"""An ingress that routes: by the snapshot, less its own calls; once more elsewhere, and no more."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace

import httpx
import pytest
from reports import report
from standins import args, soon

from deployments.calls import Accepted, Call, Delta, Failure, Message, Route, Terms
from deployments.control.cache import SnapshotCache
from deployments.control.messages import Changes
from deployments.control.service import ServiceReport
from deployments.http.answer import Answer
from deployments.http.api import create_api
from deployments.http.metrics import IngressMetrics, RequestTimer
from deployments.routing.attempts import RoutedBackend, better_told
from deployments.routing.lengths import OutputLengths
from deployments.routing.pilot import Pilot
from deployments.tenants.charges import Quotas
from select_n_core.decisions.latency import ComputeModel, LatencyModel
from select_n_core.decisions.vacancy import Vacancy, levels_of
from select_n_core.errors import QuotaError
from select_n_core.live import TenantConfig
from select_n_core.slo import SLO

MS = 1e-3
MODEL = "tiny"
OWN = SLO(tpot_s=0.1, ttft_s=2.0)
LATENCY = LatencyModel(24, 4 * MS, ComputeModel(((1, 1 * MS), (256, 16 * MS)), 2e-8, 0, MS, 0))
EMPTY = Vacancy(
    levels=levels_of(LATENCY, 2, ((4, 4000), (12, 8000)), 16, 128),
    max_batch=16,
    max_step_tokens=128,
    expected_output=64,
    tpot_s=0.098,
)
FULL = replace(
    EMPTY, running=16, running_tokens=16 * 96, waiting=1, waiting_tokens=96, least_priority=0
)
CALL = Call("call", (1,) * 32, max_tokens=64)
TOLD = [Accepted(32), Delta("a", 1), Delta("b", 1, finish="length")]
REFUSED = Failure("overloaded_queue", "full", None, 3.0)
LOST = Failure("unavailable", "a replica was lost")


class Cluster:
    """What the controller says, as tests set it."""

    def __init__(self, clock) -> None:
        self.clock = clock
        self.cache = SnapshotCache(None, clock=clock)
        self.version = 0

    def says(self, **vacancies: Vacancy | None) -> None:
        """These are the model's replicas now, of a snapshot that came just now."""
        self.tells(**{name: ServiceReport(vacancy=each) for name, each in vacancies.items()})

    def tells(self, **services: ServiceReport) -> None:
        self.version += 1
        reports = tuple(
            report(name, model=MODEL, measured_at_s=self.clock(), service=service)
            for name, service in services.items()
        )
        self.cache.take(Changes(1, self.version, True, True, 0, reports=reports))

    def pilot(self, ingress: str = "here", slo: SLO = OWN) -> Pilot:
        draw = random.Random(0)
        return Pilot(ingress, MODEL, slo, self.cache, draw=draw, time_of_day=self.clock)


@pytest.fixture
def cluster(clock) -> Cluster:
    return Cluster(clock)


def firsts(pilot: Pilot, tries: int = 300, call: Call = CALL) -> set[str]:
    return {pilot.choose(replace(call, session=str(n))).target for n in range(tries)}


class TestPilot:
    def test_without_a_controller_there_is_no_course(self, cluster):
        route = cluster.pilot().choose(CALL)
        assert (route.prefer, route.avoid) == ((), ())

    def test_with_one_every_replica_is_in_it(self, cluster):
        cluster.says(a=EMPTY, b=FULL, c=None)
        route = cluster.pilot().choose(CALL)
        assert route.prefer[:2] == ("a", "b")
        assert set(route.prefer) == {"a", "b", "c"}

    def test_a_snapshot_that_is_not_heard_of_any_more_is_no_course(self, cluster):
        cluster.says(a=EMPTY)
        cluster.clock.now_s += 2
        assert cluster.pilot().choose(CALL).prefer == ()

    def test_another_models_replicas_are_no_business_of_it(self, cluster):
        cluster.says(a=EMPTY)
        assert Pilot("here", "other", OWN, cluster.cache).choose(CALL).prefer == ()

    def test_one_that_drains_is_avoided(self, cluster):
        cluster.tells(a=ServiceReport(True, EMPTY), b=ServiceReport(False, FULL))
        route = cluster.pilot().choose(CALL)
        assert (route.prefer, route.avoid) == (("b",), ("a",))

    def test_own_calls_count_until_the_report_that_includes_them(self, cluster):
        nearly = replace(EMPTY, running=14, running_tokens=14 * 96)
        cluster.says(a=nearly, b=FULL)
        pilot = cluster.pilot()
        with ExitStack() as sent:
            routes = []
            for _ in range(2):
                routes.append(pilot.choose(CALL))
                assert routes[-1].target == "a"
                sent.enter_context(pilot.sending(CALL, routes[-1]))
            assert firsts(pilot) == {"a", "b"}  # both are full: whoever is free sooner
            heard = replace(nearly, heard={"here": routes[0].number, "there": 99})
            cluster.says(a=heard, b=FULL)
            assert firsts(pilot) == {"a"}

    def test_and_until_they_end(self, cluster):
        cluster.says(a=replace(EMPTY, running=15, running_tokens=15 * 96), b=FULL)
        pilot = cluster.pilot()
        with pilot.sending(CALL, pilot.choose(CALL)):
            assert firsts(pilot) == {"a", "b"}
        assert firsts(pilot) == {"a"}

    def test_a_call_counts_where_it_went_not_where_it_should_have_gone(self, cluster):
        last_place = replace(EMPTY, running=15, running_tokens=15 * 96)
        cluster.says(a=last_place, b=last_place)
        pilot = cluster.pilot()
        route = Route(prefer=("a", "b"), sender="here", number=1)
        with pilot.sending(CALL, route):
            assert firsts(pilot) == {"b"}
            route.sent_to = "b"
            assert firsts(pilot) == {"a"}

    def test_a_session_has_its_replica_and_so_has_a_conversation(self, cluster):
        cluster.says(a=EMPTY, b=EMPTY, c=EMPTY)
        pilot = cluster.pilot()
        session = replace(CALL, session="s")
        assert len({pilot.choose(session).target for _ in range(50)}) == 1
        turns = (Message("system", "be kind"), Message("user", "hello"))
        more = (*turns, Message("assistant", "hi"), Message("user", "what else?"))
        talks = [replace(CALL, prompt=said) for said in (turns, more)]
        assert len({pilot.choose(talk).target for _ in range(50) for talk in talks}) == 1
        assert firsts(pilot) == {"a", "b", "c"}

    def test_sessions_of_two_tenants_have_nothing_in_common(self, cluster):
        cluster.says(**{f"r{number}": EMPTY for number in range(8)})
        pilot = cluster.pilot()
        calls = [replace(CALL, session="s", terms=Terms(tenant=str(n))) for n in range(20)]
        assert len({pilot.choose(call).target for call in calls}) > 1

    def test_who_would_wait_in_vain_is_told_at_once_and_when_to_come_again(self, cluster):
        cluster.says(a=FULL, b=FULL)
        impatient = replace(CALL, terms=Terms(slo=SLO(0.1, 2.0, max_wait_s=0.0)))
        failure = cluster.pilot().choose(impatient)
        assert failure.code == "overloaded_queue"
        assert 0 < failure.retry_after_s < 10
        assert "send it again in" in failure.message
        assert isinstance(cluster.pilot().choose(CALL), Route)  # it may wait: a replica decides

    def test_a_replica_that_reports_no_more_is_lost_and_one_that_never_did_is_not(self, cluster):
        cluster.says(a=EMPTY, b=EMPTY)
        pilot = cluster.pilot()
        route = Route(prefer=("a", "b"))
        assert not pilot.has_lost(route)
        cluster.says(b=EMPTY)
        assert pilot.has_lost(route)
        route.sent_to = "new"
        assert not pilot.has_lost(route)
        route.sent_to = ""
        cluster.clock.now_s += 5  # who hears nothing knows nothing
        assert not pilot.has_lost(route)


def test_an_answer_is_expected_to_be_as_long_as_four_in_five_of_its_class():
    lengths = OutputLengths()
    for tokens in range(1, 16):
        lengths.saw("chat", tokens)
    assert lengths.expected("chat") is None
    for tokens in range(16, 101):
        lengths.saw("chat", tokens)
    assert lengths.expected("chat") == 80
    assert lengths.expected("batch") is None
    for _ in range(200):
        lengths.saw("chat", 7)
    assert lengths.expected("chat") == 7


@dataclass
class Replicas:
    """Replicas behind Ray Serve's router: each plays its script, one after the other.

    A script is chunks, "hang", or an asyncio.Event to wait for.
    """

    scripts: dict[str, list]
    calls: list[Call] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    said: list = field(default_factory=list)

    async def generate(self, call: Call) -> AsyncIterator:
        self.calls.append(call)
        route = call.route
        order = [*route.prefer, *self.scripts, *route.avoid]
        name = next(each for each in order if each in self.scripts and each not in route.avoid)
        route.sent_to, route.living = name, len(self.scripts)
        try:
            for line in self.scripts[name]:
                self.said.append(line)
                if line == "hang":
                    await asyncio.Event().wait()
                yield line
        finally:
            self.closed.append(name)

    @property
    def asked(self) -> list[str]:
        return [call.route.sent_to for call in self.calls]


def backend(cluster: Cluster, replicas: Replicas, **options) -> RoutedBackend:
    options = {"stream_timeout_s": 60.0, **options}
    slo = options.pop("slo", OWN)
    return RoutedBackend(replicas, cluster.pilot(slo=slo), **options)


async def answer(routed: RoutedBackend, call: Call = CALL) -> list:
    async with asyncio.timeout(20):
        return [chunk async for chunk in routed.generate(call)]


class TestAttempts:
    async def test_a_call_is_answered_where_it_was_sent(self, cluster):
        cluster.says(a=EMPTY, b=FULL)
        replicas = Replicas({"b": [REFUSED], "a": TOLD})
        assert await answer(backend(cluster, replicas)) == TOLD
        assert replicas.asked == ["a"]

    @pytest.mark.parametrize("why", [REFUSED, LOST, Failure("engine_error", "it died")])
    async def test_one_that_is_refused_or_lost_goes_to_another_replica_once(self, cluster, why):
        cluster.says(a=EMPTY, b=FULL)
        told = []
        replicas = Replicas({"a": [why], "b": TOLD})
        routed = backend(cluster, replicas, retried=lambda call, failure: told.append(failure))
        assert await answer(routed) == TOLD
        assert replicas.asked == ["a", "b"]
        assert told == [why]

    async def test_without_a_controller_too(self, cluster):
        replicas = Replicas({"a": [LOST], "b": TOLD})
        replicas.scripts = {"a": [LOST], "b": TOLD}
        assert await answer(backend(cluster, replicas)) == TOLD
        assert replicas.asked == ["a", "b"]

    async def test_one_that_was_let_in_but_has_said_nothing_may_go_on_elsewhere(self, cluster):
        cluster.says(a=EMPTY, b=FULL)
        replicas = Replicas({"a": [Accepted(32), LOST], "b": TOLD})
        assert await answer(backend(cluster, replicas)) == TOLD  # the client is told once

    async def test_one_that_has_begun_to_answer_ends_in_the_error(self, cluster):
        cluster.says(a=EMPTY, b=EMPTY)
        replicas = Replicas({name: [*TOLD[:2], LOST] for name in "ab"})
        assert await answer(backend(cluster, replicas)) == [*TOLD[:2], LOST]
        assert len(replicas.calls) == 1

    async def test_two_attempts_and_no_more(self, cluster):
        cluster.says(a=EMPTY, b=EMPTY, c=EMPTY)
        replicas = Replicas({name: [LOST] for name in "abc"})
        assert await answer(backend(cluster, replicas)) == [LOST]
        assert len(set(replicas.asked)) == len(replicas.asked) == 2

    async def test_the_only_replica_is_not_asked_twice(self, cluster):
        cluster.says(a=EMPTY)
        replicas = Replicas({"a": [REFUSED]})
        assert await answer(backend(cluster, replicas)) == [REFUSED]
        assert replicas.asked == ["a"]

    @pytest.mark.parametrize("code", ["invalid_input", "context_length_exceeded", "internal_error"])
    async def test_what_is_wrong_with_the_call_is_wrong_everywhere(self, cluster, code):
        cluster.says(a=EMPTY, b=EMPTY)
        failure = Failure(code, "no")
        replicas = Replicas({name: [failure] for name in "ab"})
        assert await answer(backend(cluster, replicas)) == [failure]
        assert len(replicas.calls) == 1

    async def test_two_refusals_say_the_sooner_time(self, cluster):
        cluster.says(a=EMPTY, b=FULL)
        soon = replace(REFUSED, retry_after_s=1.0)
        replicas = Replicas({"a": [REFUSED], "b": [soon]})
        assert await answer(backend(cluster, replicas)) == [soon]
        assert better_told(soon, REFUSED) == soon
        assert better_told(REFUSED, LOST) == REFUSED
        assert better_told(LOST, LOST) == LOST

    async def test_a_second_replica_gets_no_more_time_than_is_left(self, cluster, clock):
        class Slow(Replicas):
            async def generate(self, call):
                if not self.calls:
                    clock.now_s += 0.5
                async for chunk in super().generate(call):
                    yield chunk

        cluster.says(a=EMPTY, b=FULL)
        replicas = Slow({"a": [REFUSED], "b": TOLD})
        routed = backend(cluster, replicas, clock=clock, slo=SLO(0.1, 2.0, max_wait_s=0.75))
        assert await answer(routed) == TOLD
        assert replicas.calls[1].terms.slo == SLO(0.1, 1.5, max_wait_s=0.25)
        assert replicas.calls[0].terms == Terms()

    async def test_who_waited_for_as_long_as_it_may_is_not_sent_on(self, cluster, clock):
        class Slow(Replicas):
            async def generate(self, call):
                clock.now_s += 2.5
                async for chunk in super().generate(call):
                    yield chunk

        cluster.says(a=EMPTY, b=FULL)
        replicas = Slow({"a": [REFUSED], "b": TOLD})
        assert await answer(backend(cluster, replicas, clock=clock)) == [REFUSED]

    async def test_where_all_others_are_full_a_refusal_is_the_answer(self, cluster):
        cluster.says(a=EMPTY, b=FULL)
        impatient = replace(CALL, terms=Terms(slo=SLO(0.1, 2.0, max_wait_s=0.0)))
        replicas = Replicas({"a": [REFUSED], "b": TOLD})
        [failure] = await answer(backend(cluster, replicas), impatient)
        assert failure.code == "overloaded_queue"
        assert failure.retry_after_s < REFUSED.retry_after_s  # the other one is free sooner
        assert replicas.asked == ["a"]

    async def test_and_so_it_is_where_the_first_was_lost(self, cluster):
        cluster.says(a=EMPTY, b=FULL)
        impatient = replace(CALL, terms=Terms(slo=SLO(0.1, 2.0, max_wait_s=0.0)))
        replicas = Replicas({"a": [LOST], "b": TOLD})
        [failure] = await answer(backend(cluster, replicas), impatient)
        assert failure.code == "overloaded_queue"  # there is capacity: it is only busy

    async def test_nobody_is_asked_who_would_surely_refuse(self, cluster):
        cluster.says(a=FULL, b=FULL)
        impatient = replace(CALL, terms=Terms(slo=SLO(0.1, 2.0, max_wait_s=0.0)))
        replicas = Replicas({"a": TOLD, "b": TOLD})
        [failure] = await answer(backend(cluster, replicas), impatient)
        assert failure.code == "overloaded_queue"
        assert not replicas.calls


class TestSilence:
    @pytest.mark.parametrize("said", [[], [Accepted(32)]])
    async def test_a_replica_that_hangs_early_is_left_for_another(self, cluster, said):
        replicas = Replicas({"a": [*said, "hang"], "b": TOLD})
        routed = backend(cluster, replicas, stream_timeout_s=0.2, slo=SLO(0.1, 0.1))
        assert await answer(routed) == TOLD
        assert replicas.asked == ["a", "b"]
        assert replicas.closed[0] == "a"

    async def test_one_that_reports_no_more_is_left_sooner(self, cluster):
        cluster.says(a=EMPTY, b=FULL)
        replicas = Replicas({"a": ["hang"], "b": TOLD})
        answering = asyncio.create_task(answer(backend(cluster, replicas, stream_timeout_s=600.0)))

        async def is_asked() -> bool:
            return bool(replicas.calls)

        await soon(is_asked)
        cluster.says(b=EMPTY)
        assert await answering == TOLD

    async def test_one_that_has_begun_to_answer_and_reports_no_more_ends_in_an_error(
        self, cluster, clock
    ):
        cluster.says(a=EMPTY, b=FULL)
        replicas = Replicas({"a": [*TOLD[:2], "hang"], "b": TOLD})
        chunks = backend(cluster, replicas, clock=clock, stream_timeout_s=600.0).generate(CALL)
        assert [await anext(chunks) for _ in range(2)] == TOLD[:2]
        step = asyncio.create_task(anext(chunks))

        async def is_at_it() -> bool:
            return "hang" in replicas.said

        await soon(is_at_it)
        clock.now_s += 6
        cluster.says(b=EMPTY)
        async with asyncio.timeout(20):
            failure = await step
        assert (failure.code, replicas.asked) == ("stream_timeout", ["a"])
        await chunks.aclose()

    async def test_the_only_replica_is_waited_for(self, cluster):
        replicas = Replicas({"a": ["hang"]})
        routed = backend(cluster, replicas, stream_timeout_s=0.02, slo=SLO(0.1, 0.01))
        async with aclosing(routed.generate(CALL)) as chunks:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.6):
                    await anext(chunks)
        assert replicas.asked == ["a"]

    async def test_a_client_that_leaves_ends_the_attempt(self, cluster):
        replicas = Replicas({"a": [*TOLD[:2], "hang"], "b": TOLD})
        routed = backend(cluster, replicas)
        chunks = routed.generate(CALL)
        assert [await anext(chunks) for _ in range(2)] == TOLD[:2]
        await chunks.aclose()
        assert replicas.closed == ["a"]

    async def test_and_so_does_one_that_leaves_while_nothing_comes(self, cluster):
        replicas = Replicas({"a": ["hang"], "b": TOLD})
        answering = asyncio.create_task(answer(backend(cluster, replicas)))

        async def is_asked() -> bool:
            return bool(replicas.calls)

        await soon(is_asked)
        answering.cancel()
        await asyncio.wait({answering})
        assert replicas.closed == ["a"]


class Recorded:
    def __init__(self) -> None:
        self.points: list[dict] = []

    def record(self, series, value, attributes) -> None:
        self.points.append({"series": series.name, **attributes})


def test_what_is_sent_elsewhere_is_counted_with_its_reason():
    sink = Recorded()
    told = IngressMetrics({MODEL: OWN}, (sink,)).retried(MODEL)
    told(CALL, REFUSED)
    told(replace(CALL, terms=Terms(tenant="acme")), LOST)
    common = {"series": "select_n.admission.decisions", "model": MODEL}
    common["outcome"] = "sent_elsewhere"
    assert sink.points == [
        {**common, "reason": "overloaded_queue"},
        {**common, "reason": "unavailable", "tenant": "acme"},
    ]


async def test_a_request_is_charged_once_though_it_is_sent_twice(cluster):
    cluster.says(a=EMPTY, b=FULL)
    replicas = Replicas({"a": [LOST], "b": TOLD})
    tenant = TenantConfig(name="acme", requests_per_minute=2)
    quotas = Quotas(clock=cluster.clock)
    answering = Answer(
        backend(cluster, replicas),
        [CALL],
        choices_per_prompt=1,
        stream_timeout_s=5.0,
        verdict_s=1.0,
        timer=RequestTimer(IngressMetrics({}), MODEL, "chat", Terms()),
        charge=quotas.charge(tenant, 96),
    )
    await answering.open()
    assert [delta async for _, delta in answering.deltas()] == TOLD[1:]
    assert replicas.asked == ["a", "b"]
    quotas.charge(tenant, 96)
    with pytest.raises(QuotaError):
        quotas.charge(tenant, 96)


async def test_the_session_of_a_request_is_that_of_its_calls():
    class Noting(Replicas):
        async def generate(self, call):
            self.calls.append(call)
            for chunk in TOLD:
                yield chunk

    replicas = Noting({})
    api = create_api({MODEL: replicas}, args(MODEL))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://in") as http:
        for headers in ({"x-session-id": "s-1"}, {}):
            body = {"model": MODEL, "prompt": "Hi", "n": 2}
            answered = await http.post("/v1/completions", json=body, headers=headers)
            assert answered.status_code == 200
    assert [call.session for call in replicas.calls] == ["s-1", "s-1", "", ""]
