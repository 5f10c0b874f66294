"""The application Ray Serve builds from a configuration, and its replicas on a real Ray."""

from contextlib import aclosing

import pytest
import served
import standins
from ray import cloudpickle
from standins import MODEL, args, soon

from deployments import app
from deployments.app import assemble, build_app, routed
from deployments.backend import HandleBackend
from deployments.calls import Accepted, Call, Delta, Failure
from deployments.control.cache import SnapshotCache
from deployments.control.remote import RemoteController
from deployments.naming import deployment_name
from deployments.routing.attempts import RoutedBackend
from deployments.routing.pilot import Pilot
from deployments.sizing import actor_options
from select_n_core.config import parse_args
from select_n_core.errors import ConfigError

APP = "application-test"


def document(**changes) -> dict:
    return args("tiny").model_dump(mode="json") | changes


def test_it_builds_from_plain_arguments():
    assert build_app(document()) is not None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"models": []}, "args.models"),
        ({"modles": []}, "args.modles"),
        ({"stream_timeout": "1 apple"}, "args.stream_timeout"),
    ],
)
def test_a_broken_configuration_is_one_line_that_names_the_field(change, field):
    with pytest.raises(ConfigError) as caught:
        build_app(document(**change))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_deployment_names_are_safe_and_differ():
    names = ["plain", "org/model", "org-model", "org:model", "a/b/c"]
    built = {deployment_name(name) for name in names}
    assert len(built) == len(names)
    assert all("/" not in name and "#" not in name and ":" not in name for name in built)
    assert deployment_name("plain") == "model-plain"


def test_an_emulated_replica_claims_so_little_that_several_fit_two_cores():
    assert actor_options(args().models[0])["num_cpus"] == 0.1


def test_bounds_that_differ_turn_autoscaling_on():
    bounds = {"min": 1, "max": 3, "upscale_delay": "2s", "downscale_delay": "9s"}
    scale = app._scale(args(replicas=bounds).models[0])["autoscaling_config"]
    assert (scale.min_replicas, scale.max_replicas) == (1, 3)
    assert (scale.upscale_delay_s, scale.downscale_delay_s) == (2, 9)
    assert scale.policy.policy_function == "autoscaler.policy:HeadroomPolicy"
    assert app._scale(args(replicas={"min": 2, "max": 2}).models[0]) == {"num_replicas": 2}


@pytest.fixture(scope="module")
def backend(serve_on_ray):
    """A model with one real replica around an endless engine."""
    for module in (standins, served):
        cloudpickle.register_pickle_by_value(module)  # Ray's workers cannot import from tests/
    try:
        application = assemble(args(), served.load)
        serve_on_ray.run(application, name=APP, route_prefix=None)
        handle = serve_on_ray.get_deployment_handle(deployment_name(MODEL), APP)
        yield HandleBackend(handle, MODEL)
    finally:
        for module in (standins, served):
            cloudpickle.unregister_pickle_by_value(module)
        serve_on_ray.delete(APP)


async def waiting(backend) -> float:
    # The stand-in counts its cancelled requests as waiting.
    [report] = await backend.reports(5)
    return report.stats.waiting


async def test_a_replica_on_ray_streams_its_chunks(backend):
    stream = backend.generate(Call("whole", "Hi", max_tokens=3))
    verdict, *deltas = [chunk async for chunk in stream]
    assert verdict == Accepted(prompt_tokens=2)
    assert [delta.tokens for delta in deltas] == [1, 1, 1]
    assert deltas[-1].finish == "length"
    assert await backend.check(5) is None


async def test_a_refusal_crosses_ray_with_its_field(backend):
    [failure] = [chunk async for chunk in backend.generate(Call("refused", "", max_tokens=3))]
    assert (failure.code, failure.field) == ("invalid_input", "prompt")


async def test_closing_a_stream_stops_its_request_on_the_replica(backend):
    before = await waiting(backend)
    async with aclosing(backend.generate(Call("closed", "Hi", max_tokens=900))) as stream:
        await anext(stream)
        assert isinstance(await anext(stream), Delta)

    async def is_cancelled() -> bool:
        return await waiting(backend) == before + 1

    await soon(is_cancelled)


def test_the_baseline_leaves_the_choice_of_a_replica_to_ray_serve(text):
    replicas = standins.LocalBackend(standins.replica(standins.ScriptedEngine(text), text))
    own = args()
    pilot = Pilot("here", MODEL, own.models[0].slo.targets(), SnapshotCache(RemoteController()))
    assert isinstance(routed(replicas, pilot, own, lambda *_: None), RoutedBackend)
    baseline = parse_args(own.model_dump() | {"routing": "power_of_two"})
    assert routed(replicas, pilot, baseline, lambda *_: None) is replicas
    with pytest.raises(ConfigError, match="routing"):
        parse_args(own.model_dump() | {"routing": "best"})


async def test_a_killed_replica_is_a_failure_that_says_send_again(backend):
    import ray
    from ray.util import list_named_actors

    [name] = [
        each["name"]
        for each in list_named_actors(all_namespaces=True)
        if f"{APP}#{deployment_name(MODEL)}" in each["name"]
    ]
    async with aclosing(backend.generate(Call("killed", "Hi", max_tokens=900))) as stream:
        await anext(stream)
        ray.kill(ray.get_actor(name, namespace="serve"))
        *_, last = [chunk async for chunk in stream]
    assert isinstance(last, Failure)
    assert last.code == "unavailable"
    assert "send the request again" in last.message
