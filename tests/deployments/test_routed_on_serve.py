"""Two replicas of a model on a real Serve: calls go where they are sent, and outlive a replica."""

import asyncio
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace

import faulty
import pytest
import served
import standins
from faulty import broken_by
from ray import cloudpickle
from standins import MODEL, args, soon

from deployments.app import assemble
from deployments.backend import HandleBackend
from deployments.calls import Accepted, Call, Route
from deployments.control.app import build_app
from deployments.control.cache import SnapshotCache
from deployments.control.remote import RemoteController
from deployments.naming import deployment_name
from deployments.routing.attempts import RoutedBackend
from deployments.routing.pilot import Pilot
from select_n_core.config import CONTROL_APPLICATION
from select_n_core.slo import SLO

APP = "routed-test"
MODULES = (standins, served, faulty)


class Noted(HandleBackend):
    """Keeps the routes of all calls."""

    def __init__(self, handle) -> None:
        super().__init__(handle, MODEL)
        self.routes: list[Route] = []

    async def generate(self, call):
        if call.route is not None:
            self.routes.append(call.route)
        async for chunk in super().generate(call):
            yield chunk


@pytest.fixture(scope="module")
def handle(serve_on_ray):
    for module in MODULES:
        cloudpickle.register_pickle_by_value(module)  # Ray's workers cannot import from tests/
    try:
        serve_on_ray.run(build_app({}), name=CONTROL_APPLICATION, route_prefix=None)
        application = assemble(args(replicas={"min": 2, "max": 2}), faulty.load)
        serve_on_ray.run(application, name=APP, route_prefix=None)
        yield serve_on_ray.get_deployment_handle(deployment_name(MODEL), APP)
    finally:
        for module in MODULES:
            cloudpickle.unregister_pickle_by_value(module)
        serve_on_ray.delete(APP)
        serve_on_ray.delete(CONTROL_APPLICATION)


@pytest.fixture
def replicas(handle) -> Noted:
    return Noted(handle)


@asynccontextmanager
async def routed(replicas: Noted):
    """An ingress' way to both replicas, once it has heard of them."""
    cache = SnapshotCache(RemoteController())
    task = asyncio.create_task(cache.run())

    async def knows_both() -> bool:
        known = {} if cache.snapshot is None else cache.snapshot.replicas
        return sum(each.model == MODEL for each in known.values()) == 2

    try:
        await soon(knows_both, 60)
        pilot = Pilot("here", MODEL, SLO(0.1, 2.0), cache)
        yield RoutedBackend(replicas, pilot, stream_timeout_s=60.0), cache
    finally:
        task.cancel()


async def names(replicas: Noted) -> set[str]:
    found: set[str] = set()

    async def are_both_there() -> bool:
        found.clear()
        found.update(report.replica for report in await replicas.reports(5))
        return len(found) == 2

    await soon(are_both_there, 60)
    return found


async def answer(backend, prompt: str = "Hi", route: Route | None = None) -> list:
    call = Call("-".join((prompt, str(id(route)))), prompt, max_tokens=2, route=route)
    async with asyncio.timeout(60):
        return [chunk async for chunk in backend.generate(call)]


def is_whole(chunks: list) -> bool:
    verdict, *deltas = chunks
    return isinstance(verdict, Accepted) and [each.finish for each in deltas] == [None, "length"]


@contextmanager
def one_http_request():
    """What Serve tells its calls apart by is the same for all that is sent in here."""
    from ray.serve import context

    before = context._get_serve_request_context()
    token = context._serve_request_context.set(replace(before, _internal_request_id="same"))
    try:
        yield
    finally:
        context._serve_request_context.reset(token)


async def test_a_call_goes_to_the_replica_that_its_route_prefers(replicas):
    for one in await names(replicas):
        routes = [Route(prefer=(one,)) for _ in range(5)]
        for route in routes:
            assert is_whole(await answer(replicas, route=route))
        assert [route.sent_to for route in routes] == [one] * 5
        assert routes[0].living == 2


async def test_and_not_to_one_that_it_avoids(replicas):
    one, other = await names(replicas)
    for _ in range(5):
        route = Route(avoid=(one,))
        assert is_whole(await answer(replicas, route=route))
        assert route.sent_to == other


async def test_all_calls_of_one_http_request_are_told_apart(replicas):
    one, other = await names(replicas)
    routes = [Route(prefer=(each,)) for each in (one, other, one, one)]
    with one_http_request():
        answers = await asyncio.gather(*(answer(replicas, route=route) for route in routes))
    assert all(map(is_whole, answers))
    assert [route.sent_to for route in routes] == [one, other, one, one]


@pytest.mark.parametrize("route", [None, Route(), Route(prefer=("gone",), avoid=("gone",))])
async def test_a_call_whose_route_names_nobody_is_answered_all_the_same(replicas, route):
    assert is_whole(await answer(replicas, route=route))


async def test_a_pilot_sends_calls_to_both(replicas):
    both = await names(replicas)
    async with routed(replicas) as (backend, _):
        for number in range(20):
            assert is_whole(await answer(backend, prompt=f"session {number}"))
    assert {route.sent_to for route in replicas.routes} == both
    assert all(set(route.prefer) == both for route in replicas.routes)


async def test_what_was_sent_is_soon_in_the_reports(replicas):
    async with routed(replicas) as (backend, cache), AsyncExitStack() as stack:
        for number in range(6):
            call = Call(f"long {number}", f"session {number}", max_tokens=900)
            stream = await stack.enter_async_context(aclosing(backend.generate(call)))
            assert isinstance(await anext(stream), Accepted)

        async def all_are_reported() -> bool:
            reports = [each for each in cache.snapshot.replicas.values() if each.model == MODEL]
            rooms = [each.service.vacancy for each in reports if each.service.vacancy is not None]
            last = max((room.heard.get("here", 0) for room in rooms), default=0)
            return last == 6 and sum(room.running for room in rooms) == 6

        await soon(all_are_reported)
    assert all(route.target == route.prefer[0] for route in replicas.routes)


async def test_a_call_outlives_a_replica_that_hangs(replicas, tmp_path):
    async with routed(replicas) as (backend, _):
        assert is_whole(await answer(backend, broken_by("block", tmp_path / "mark")))
    first, second = replicas.routes
    assert first.sent_to != second.sent_to


async def test_and_one_that_dies(replicas, tmp_path):
    async with routed(replicas) as (backend, _):
        assert is_whole(await answer(backend, broken_by("die", tmp_path / "mark")))
    first, second = replicas.routes
    assert second.avoid == (first.target,)
    assert second.sent_to != first.target
