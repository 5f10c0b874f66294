"""The controller on a real Serve: what it hears and tells, and that serving needs it not."""

import asyncio
import sys
import time
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import served
import standins
from ray import cloudpickle
from reports import report
from standins import MODEL, args, soon

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.cluster_break import keep_controller_down, kill_controller
from deployments import ray_compat
from deployments.app import assemble
from deployments.backend import HandleBackend
from deployments.calls import Accepted, Call, Failure
from deployments.control.app import build_app
from deployments.control.cache import SnapshotCache
from deployments.control.messages import Known, ReportBatch
from deployments.control.remote import RemoteController
from deployments.naming import deployment_name
from select_n_core.config import CONTROL_APPLICATION, CONTROLLER
from select_n_core.errors import ConfigError, UnavailableError

APP = "controlled-test"


@pytest.fixture(scope="module")
def control(serve_on_ray):
    serve_on_ray.run(build_app({}), name=CONTROL_APPLICATION, route_prefix=None)
    yield
    serve_on_ray.delete(CONTROL_APPLICATION)


@pytest.fixture(scope="module")
def backend(serve_on_ray, control):
    """A model with one real replica around an endless engine, which reports to the controller."""
    for module in (standins, served):
        cloudpickle.register_pickle_by_value(module)  # Ray's workers cannot import from tests/
    try:
        serve_on_ray.run(assemble(args(), served.load), name=APP, route_prefix=None)
        handle = serve_on_ray.get_deployment_handle(deployment_name(MODEL), APP)
        yield HandleBackend(handle, MODEL)
    finally:
        for module in (standins, served):
            cloudpickle.unregister_pickle_by_value(module)
        serve_on_ray.delete(APP)


@asynccontextmanager
async def watching():
    """A cache that watches, as an ingress' does."""
    cache = SnapshotCache(RemoteController())
    task = asyncio.create_task(cache.run())
    try:
        yield cache
    finally:
        task.cancel()


def test_epochs_grow_with_every_draw(ray_node):
    assert ray_compat.next_epoch() < ray_compat.next_epoch() < ray_compat.next_epoch()


def test_a_deployment_that_does_not_exist_is_one_clear_line(serve_on_ray):
    with pytest.raises(UnavailableError, match="no deployment Nobody in an application nowhere"):
        ray_compat.find_deployment("nowhere", "Nobody")


def test_the_application_takes_no_arguments():
    with pytest.raises(ConfigError, match=r"args: .* takes none, got classes; .* user_config"):
        build_app({"classes": {}})


async def test_a_report_ends_a_watchers_poll(control):
    controller = RemoteController()
    known = (await controller.watch(Known(), 1)).version
    epoch = (await controller.watch(Known(), 1)).epoch
    for sequence in range(1, 21):
        news = asyncio.create_task(controller.watch(Known(epoch, known), 600))
        await asyncio.sleep(0)
        receipt = await controller.report(ReportBatch(epoch, (report("watched", sequence),)))
        assert receipt.refused == ()
        async with asyncio.timeout(60):  # long before the poll would end by itself
            known = (await news).version


async def test_a_poll_without_news_ends_by_itself(control):
    controller = RemoteController()
    whole = await controller.watch(Known(), 1)
    known, changes = Known(whole.epoch, whole.version), None
    while changes is None or changes.reports or changes.gone:  # others may still report
        changes = await controller.watch(known, 0.05)
        known = Known(changes.epoch, changes.version)
    assert not changes.whole


async def test_a_replica_is_in_the_snapshot_with_what_it_is(backend):
    async with watching() as cache:
        await hears_replicas(cache, 1)
        [replica] = _replicas(cache)
        whole = await ray_compat.find_deployment(CONTROL_APPLICATION, CONTROLLER).snapshot.remote()
        assert set(whole.replicas) >= {replica.name}
        assert replica.node
        assert replica.units == 30
        assert time.time() - replica.measured_at_s < 5


async def test_what_a_replica_lets_in_is_heard_of(backend):
    async with (
        watching() as cache,
        aclosing(backend.generate(Call("heard", "Hi", max_tokens=900))) as stream,
    ):
        assert isinstance(await anext(stream), Accepted)

        async def is_heard() -> bool:
            return any(each.running for each in _replicas(cache))

        await soon(is_heard)


async def test_a_policy_changes_without_a_restart(serve_on_ray, control):
    async with watching() as cache:
        before = (await RemoteController().watch(Known(), 1)).epoch
        ray_compat.deploy(_document({"classes": {"chat": {"tpot": "50ms"}}}))

        async def is_new() -> bool:
            policy = cache.snapshot and cache.snapshot.policy
            return bool(policy and "chat" in policy.classes)

        await soon(is_new, 60)
        # Serve takes the first deploy from a file for new code; the second one changes it in place.
        ray_compat.deploy(_document({"classes": {"chat": {"tpot": "80ms"}}}))
        epoch = cache.snapshot.epoch
        assert epoch >= before

        async def is_changed() -> bool:
            return cache.snapshot.policy.classes["chat"].tpot == pytest.approx(0.08)

        await soon(is_changed, 60)
        assert cache.snapshot.epoch == epoch


@asynccontextmanager
async def calling(backend):
    """Three clients that send one request after the other; yields how each of them ended."""
    ended: list = []
    enough = asyncio.Event()

    async def client(number: int) -> None:
        while not enough.is_set():
            call = Call(f"{number}-{len(ended)}", "Hi", max_tokens=5)
            ended.append([chunk async for chunk in backend.generate(call)][-1])

    clients = [asyncio.create_task(client(number)) for number in range(3)]
    yield ended
    enough.set()
    await asyncio.gather(*clients)


async def hears_replicas(cache: SnapshotCache, epoch: int) -> None:
    async def is_told() -> bool:
        return bool(cache.snapshot and cache.snapshot.epoch >= epoch and _replicas(cache))

    await soon(is_told, 60)


async def test_a_killed_controller_costs_no_request_and_comes_back_with_a_higher_epoch(backend):
    async with watching() as cache:
        await hears_replicas(cache, 1)
        before = cache.snapshot.epoch
        async with calling(backend) as ended:
            assert kill_controller()
            await hears_replicas(cache, before + 1)
    assert ended
    assert [chunk for chunk in ended if isinstance(chunk, Failure)] == []


@pytest.mark.chaos
async def test_a_controller_that_is_kept_down_for_30_s_costs_no_request(backend):
    async with watching() as cache:
        await hears_replicas(cache, 1)
        before = cache.snapshot
        async with calling(backend) as ended:
            assert await keep_controller_down(30) > 1
            assert cache.snapshot.replicas  # the last that was heard of them
            await hears_replicas(cache, before.epoch + 1)
    assert ended
    assert [chunk for chunk in ended if isinstance(chunk, Failure)] == []


def _replicas(cache: SnapshotCache) -> list:
    replicas = {} if cache.snapshot is None else cache.snapshot.replicas
    return [each for each in replicas.values() if each.model == MODEL]


def _document(policy: dict) -> dict:
    return {
        "applications": [
            {
                "name": CONTROL_APPLICATION,
                "route_prefix": None,
                "import_path": "deployments.control.app:build_app",
                "deployments": [{"name": CONTROLLER, "user_config": policy}],
            }
        ]
    }
