"""The application as Ray Serve builds it: one ingress, one replica deployment per model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from deployments.backend import HandleBackend
from deployments.calls import Backend
from deployments.control.cache import SnapshotCache
from deployments.control.lessee import HostLessee
from deployments.control.messages import Receipt, ReplicaReport
from deployments.control.node_budget import NodeBudget
from deployments.control.policy import HeardPolicy, has_controller
from deployments.control.remote import RemoteController
from deployments.control.reporter import reporter_of_ingress, reporter_of_replica
from deployments.control.sharing import SharedQuotas
from deployments.http.api import create_api
from deployments.http.live import LiveRequests
from deployments.http.metrics import IngressMetrics
from deployments.naming import INGRESS, deployment_name
from deployments.replica import Replica
from deployments.routing.attempts import RoutedBackend, Told
from deployments.routing.pilot import Pilot
from deployments.routing.router import ROUTER
from deployments.sizing import SMALL_CPUS, actor_options
from deployments.telemetry import Telemetry
from select_n_core.config import ModelConfig, ServeArgs, parse_args
from select_n_core.engine.client import EngineClient
from select_n_core.engine.text import TextCodec

HEADROOM_POLICY = "autoscaler.policy:HeadroomPolicy"

# Slots beyond the engine's own queue, so that the engine's verdict, not Ray's, refuses a call.
_SPARE_SLOTS = 32
_HEALTH = {
    "health_check_period_s": 2.0,
    "health_check_timeout_s": 5.0,
}
# How long a replaced replica may finish its streams. Ctrl-C on `select-n serve` drains first.
_SHUTDOWN = {"graceful_shutdown_timeout_s": 20.0, "graceful_shutdown_wait_loop_s": 0.1}

Load = Callable[[ModelConfig], Awaitable[tuple[TextCodec, EngineClient]]]


async def load(model: ModelConfig) -> tuple[TextCodec, EngineClient]:
    """The text side of a model and its engine, not started yet."""
    from select_n_core.engine.factory import create_client
    from select_n_core.models.source import resolve, resolve_text

    find = resolve if model.compute is None else resolve_text
    directory = await asyncio.to_thread(find, model.source)
    codec = await asyncio.to_thread(TextCodec.load, directory)
    return codec, create_client(model)


class ReplicaDeployment(Replica):
    """A replica as Ray Serve starts and stops it; a failed start is the deployment's error."""

    async def __init__(self, model: ModelConfig, load: Load = load) -> None:  # type: ignore[misc]
        name = serve.get_replica_context().replica_id.unique_id
        # First, so that what is wrong with it is said before a model is loaded.
        telemetry = Telemetry.open(
            "replica", {"select_n.model": model.name, "select_n.replica": name}
        )
        codec, client = await load(model)
        controller, self._budget = RemoteController(), NodeBudget(f"{model.name}, its actor")
        await self._budget.ask(controller)
        # A controller lends what goes beyond the floor; it may be away, and come back.
        lent = await asyncio.to_thread(has_controller)
        info = await client.start(lent=lent)
        self._lessee = None
        if info.ladder is not None:
            self._lessee = HostLessee.here(
                model.name, client, info.ladder, info.mirrors_group, model.slo.ttft
            )
        node = ray.get_runtime_context().get_node_id()
        super().__init__(name, codec, client, info, model.slo.targets(), node=node)
        telemetry.observe(self.report)
        self._telemetry = telemetry
        reporter = reporter_of_replica(
            lambda sequence: ReplicaReport.of(
                self.report(), model, sequence, self._lessee.memory if self._lessee else None
            ),
            controller,
            self._hear,
        )
        self._reporting = asyncio.gather(
            reporter.run(), *([] if self._lessee is None else [self._lessee.run()])
        )

    async def _hear(self, receipt: Receipt) -> None:
        if self._lessee is not None:
            self._lessee.hear(receipt)
        await self._budget.hear(receipt)

    async def drain(self, grace_s: float) -> None:
        """See `Replica.drain`; then the last metrics leave."""
        await super().drain(grace_s)
        await self._telemetry.close()

    async def __del__(self) -> None:
        # Ray Serve awaits this once its streams are done; without it the engine process would
        # only notice its parent's death.
        if hasattr(self, "_reporting"):  # else it never started
            self._reporting.cancel()
            await self.close()
            self._budget.close()
            await self._telemetry.close()


class IngressDeployment:
    """Answers HTTP; Ray Serve asks it for its ASGI application once it is constructed."""

    def __init__(self, handles: dict[str, DeploymentHandle], args: ServeArgs) -> None:
        self._handles = handles
        self._args = args
        self._live = LiveRequests()
        self._cluster = SnapshotCache(RemoteController())
        self._policy = HeardPolicy(self._cluster)
        name = serve.get_replica_context().replica_id.unique_id
        self._name = name
        self._shared = SharedQuotas(name, self._cluster)
        self._telemetry = Telemetry.open("ingress", {"select_n.replica": name})

    def __serve_build_asgi_app__(self) -> Any:
        metrics = IngressMetrics(
            {model.name: model.slo.targets() for model in self._args.models},
            self._telemetry.sinks(),
        )
        api = create_api(
            {model.name: self._backend(model, metrics) for model in self._args.models},
            self._args,
            cluster=self._cluster,
            policy=self._policy,
            quotas=self._shared.quotas,
            metrics=metrics,
            lifespan=self._lifespan,
        )
        api.add_middleware(self._live.middleware)
        return api

    def _backend(self, model: ModelConfig, metrics: IngressMetrics) -> Backend:
        return routed(
            HandleBackend(self._handles[model.name], model.name),
            Pilot(self._name, model.name, model.slo.targets(), self._cluster),
            self._args,
            metrics.retried(model.name),
        )

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        await self._policy.find_out()
        reporter = reporter_of_ingress(self._shared.report, RemoteController())
        tasks = [asyncio.create_task(each.run()) for each in (self._cluster, reporter)]
        yield
        for task in tasks:
            task.cancel()
        await self._telemetry.close()

    async def settle(self, timeout_s: float) -> None:
        """Wait until no request is being answered, or `timeout_s`; then the last metrics leave."""
        await self._live.none_left(timeout_s)
        await self._telemetry.close()


def routed(replicas: Backend, pilot: Pilot, args: ServeArgs, retried: Told) -> Backend:
    """A model's replicas behind whoever chooses among them; see `ServeArgs.routing`."""
    if args.routing == "power_of_two":
        return replicas
    return RoutedBackend(replicas, pilot, stream_timeout_s=args.stream_timeout, retried=retried)


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application of a configuration's `args`; raises `ConfigError` naming a broken field."""
    return assemble(parse_args(args))


def assemble(args: ServeArgs, load: Load = load) -> serve.Application:
    """The application of validated arguments; `load` brings a model's text side and engine."""
    replicas = {model.name: _replica(model, load) for model in args.models}
    slots = sum(_slots(model) * model.replicas.max for model in args.models)
    ingress = serve.deployment(serve.ingress()(IngressDeployment)).options(
        name=INGRESS,
        ray_actor_options={"num_cpus": SMALL_CPUS},
        max_ongoing_requests=slots + _SPARE_SLOTS,
        **_HEALTH,
        **_SHUTDOWN,
    )
    return ingress.bind(replicas, args)


def _replica(model: ModelConfig, load: Load) -> serve.Application:
    deployment = serve.deployment(ReplicaDeployment).options(
        name=deployment_name(model.name),
        ray_actor_options=actor_options(model),
        max_ongoing_requests=_slots(model),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        **_scale(model),
        **_HEALTH,
        **_SHUTDOWN,
    )
    return deployment.bind(model, load)


def _slots(model: ModelConfig) -> int:
    return model.max_batch + model.max_queue + _SPARE_SLOTS


def _scale(model: ModelConfig) -> dict[str, Any]:
    replicas = model.replicas
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    config = AutoscalingConfig(
        min_replicas=replicas.min,
        max_replicas=replicas.max,
        initial_replicas=replicas.min,
        upscale_delay_s=replicas.upscale_delay,
        downscale_delay_s=replicas.downscale_delay,
        # Without it a policy sees its metrics ten seconds late.
        metrics_interval_s=0.5,
        look_back_period_s=2.0,
        policy=AutoscalingPolicy(policy_function=HEADROOM_POLICY),
    )
    return {"autoscaling_config": config}
