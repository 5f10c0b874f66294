"""The ingress' routes: OpenAI's chat, completions and models; health, metrics, the cluster."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from deployments.calls import Backend, Delta, Failure, Report
from deployments.control.cache import SnapshotCache
from deployments.control.messages import ReplicaReport, Snapshot
from deployments.control.view import cluster_document
from deployments.http import errors
from deployments.http.access import Access, caller_of, is_admin
from deployments.http.answer import Answer
from deployments.http.dialect import ChatDialect, CompletionDialect, Dialect
from deployments.http.errors import FailureError, error_body, error_response
from deployments.http.metrics import IngressMetrics, RequestTimer
from deployments.http.schema import ChatRequest, CompletionRequest
from deployments.tenants.charges import Charge, Quotas, expected_tokens
from deployments.tenants.gate import Caller, Gate, PolicySource, open_to_all
from deployments.tenants.terms import terms_of
from select_n_core.config import ServeArgs
from select_n_core.errors import QuotaError

_PROBE_TIMEOUT_S = 2.0
_SESSION_HEADER = "X-Session-Id"


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_api(
    backends: Mapping[str, Backend],
    args: ServeArgs,
    *,
    cluster: SnapshotCache | None = None,
    policy: PolicySource = open_to_all,
    quotas: Quotas | None = None,
    metrics: IngressMetrics | None = None,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """The ASGI application that serves `backends`, one per model of `args`.

    Args:
        cluster: what the controller says, where there is one.
        policy: the live policy as of now: tenants, classes.
        quotas: that tenants' requests are charged to; None shares them with no other ingress.
        metrics: where requests are counted; None keeps them to this API.
        lifespan: entered when the server starts, left when it ends.
    """
    # JSON is read only under its own content type, which no web page of another origin can send
    # without asking first.
    api = FastAPI(title="select-n", strict_content_type=True, lifespan=lifespan)
    errors.install(api)
    if metrics is None:
        metrics = IngressMetrics({model.name: model.slo.targets() for model in args.models})
    ingress = _Ingress(backends, args, metrics, quotas or Quotas(), cluster)
    api.post("/v1/chat/completions")(ingress.chat)
    api.post("/v1/completions")(ingress.complete)
    api.get("/v1/models")(ingress.models)
    # A model's name may hold slashes.
    api.get("/v1/models/{model:path}")(ingress.model)
    api.get("/health")(ingress.health)
    api.get("/metrics")(ingress.metrics)
    api.get("/cluster")(ingress.cluster)
    api.add_middleware(Access(Gate(policy), metrics).middleware)
    return api


class EventStream(StreamingResponse):
    """Server-sent events, whose source is closed however the response ends."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, then close their source."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A client that leaves cancels the sender, which may not be inside the source then.
            await self._events.aclose()


class _Ingress:
    """The endpoints' state: the models, and what was measured."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        args: ServeArgs,
        metrics: IngressMetrics,
        quotas: Quotas,
        cluster: SnapshotCache | None,
    ) -> None:
        self._backends = backends
        self._models = args.models
        self._cluster = cluster
        self._stream_timeout_s = args.stream_timeout
        self._metrics = metrics
        self._quotas = quotas
        self._created = int(time.time())

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        return await self._answer(request, body, ChatDialect(logprobs=bool(body.logprobs)))

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """Continue one or more prompts."""
        dialect = CompletionDialect(logprobs=body.logprobs is not None)
        return await self._answer(request, body, dialect)

    async def models(self, request: Request) -> dict[str, Any]:
        """List the models that the caller may use."""
        return {"object": "list", "data": [self._card(name) for name in self._usable(request)]}

    async def model(self, request: Request, model: str) -> dict[str, Any]:
        """Describe one model."""
        self._backend(request, model, field=None)
        return self._card(model)

    async def health(self, request: Request) -> Response:
        """200 when every model has a replica that answers, else 503; admins learn why."""
        answers = await asyncio.gather(
            *(backend.check(_PROBE_TIMEOUT_S) for backend in self._backends.values())
        )
        broken = {
            name: answer.message
            for name, answer in zip(self._backends, answers, strict=True)
            if answer is not None
        }
        if broken:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
            if not is_admin(request):
                reasons = "not every model answers"
            return error_response(Failure("unavailable", reasons))
        models = {"models": list(self._backends)} if is_admin(request) else {}
        return JSONResponse({"status": "ok"} | models)

    async def metrics(self) -> Response:
        """Prometheus metrics of this ingress and of every replica."""
        return Response(self._metrics.page(await self._reports()), media_type=CONTENT_TYPE_LATEST)

    async def cluster(self) -> dict[str, Any]:
        """Nodes and replicas as the controller knows them; without one, as the replicas say."""
        snapshot = None if self._cluster is None else self._cluster.snapshot
        if self._cluster is not None and snapshot is not None:
            age_s = self._cluster.age_s
            return cluster_document(snapshot, age_s=age_s, now_s=time.time())
        said = await self._reports()
        replicas = {
            report.replica: ReplicaReport.of(report, model)
            for model in self._models
            for report in said[model.name]
        }
        return cluster_document(Snapshot(0, 0, replicas=replicas), age_s=None, now_s=time.time())

    async def _reports(self) -> dict[str, list[Report]]:
        """What every replica says of itself, by its model."""
        reports = await asyncio.gather(
            *(backend.reports(_PROBE_TIMEOUT_S) for backend in self._backends.values())
        )
        return dict(zip(self._backends, reports, strict=True))

    def _card(self, model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": self._created, "owned_by": "select-n"}

    def _usable(self, request: Request) -> list[str]:
        return [name for name in self._backends if caller_of(request).may_use(name)]

    def _backend(self, request: Request, model: str, field: str | None = "model") -> Backend:
        # A model that the caller may not use is none at all: nobody learns what others have.
        usable = self._usable(request)
        if model not in usable:
            known = ", ".join(usable) or "none"
            raise FailureError(
                Failure("model_not_found", f"there is no model {model!r}; there is {known}", field)
            )
        return self._backends[model]

    async def _answer(
        self, request: Request, body: ChatRequest | CompletionRequest, dialect: Dialect
    ) -> Response:
        backend = self._backend(request, body.model)
        caller, own = caller_of(request), self._metrics.slos[body.model]
        terms = terms_of(caller, request.headers, own)
        request_id = dialect.id_prefix + uuid.uuid4().hex
        session = request.headers.get(_SESSION_HEADER, "")
        calls = [replace(each, terms=terms, session=session) for each in body.calls(request_id)]
        timer = RequestTimer(self._metrics, body.model, dialect.operation, terms)
        answer = Answer(
            backend,
            calls,
            choices_per_prompt=body.n or 1,
            stream_timeout_s=self._stream_timeout_s,
            verdict_s=(terms.slo or own).longest_wait_s,
            timer=timer,
            charge=self._charge(caller, expected_tokens(calls, body.n or 1), timer),
        )
        await answer.open()
        frame = {"id": request_id, "created": int(time.time()), "model": body.model}
        if not body.stream:
            return JSONResponse(await _whole(answer, dialect, frame))
        deltas = answer.deltas()
        opened = False
        try:
            # Whatever breaks before the first token still gets its own status.
            first = await anext(deltas)
            opened = True
        finally:
            if not opened:
                await deltas.aclose()
        return EventStream(_events(answer, first, deltas, dialect, frame, usage=body.include_usage))

    def _charge(self, caller: Caller, tokens: int, timer: RequestTimer) -> Charge:
        if caller.tenant is None:
            return Charge.of_nobody()
        try:
            return self._quotas.charge(caller.tenant, tokens)
        except QuotaError as error:
            timer.failed(Failure.of(error))
            raise


async def _whole(answer: Answer, dialect: Dialect, frame: dict[str, Any]) -> dict[str, Any]:
    """The response of a request that is not streamed."""
    choices: dict[int, list[Delta]] = {}
    async with aclosing(answer.deltas()) as deltas:
        async for index, delta in deltas:
            choices.setdefault(index, []).append(delta)
    return {
        **frame,
        "object": dialect.object_name,
        "choices": [dialect.whole(index, choices[index]) for index in sorted(choices)],
        "usage": answer.usage,
    }


async def _events(
    answer: Answer,
    first: tuple[int, Delta],
    rest: AsyncGenerator[tuple[int, Delta], None],
    dialect: Dialect,
    frame: dict[str, Any],
    *,
    usage: bool,
) -> AsyncGenerator[str, None]:
    """A streamed response: one event per delta, then the usage if asked for, then [DONE]."""
    frame = {**frame, "object": dialect.chunk_name}
    absent = {"usage": None} if usage else {}
    async with aclosing(rest):
        yield _event({**frame, "choices": [dialect.chunk(*first)], **absent})
        try:
            async for index, delta in rest:
                yield _event({**frame, "choices": [dialect.chunk(index, delta)], **absent})
        except FailureError as error:
            yield _event(error_body(error.failure))
            return
        if usage:
            yield _event({**frame, "choices": [], "usage": answer.usage})
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
