"""Whoever comes in is known first: before a route is chosen, and before a body is read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.calls import Failure
from deployments.http.errors import error_response
from deployments.http.metrics import IngressMetrics
from deployments.series import ADMISSIONS
from deployments.tenants.gate import Caller, Gate
from select_n_core.errors import ForbiddenError, SelectNError

_OPEN = "/health"  # probes have no key; who is no admin learns only whether all is well
_TENANTS = "/v1/"  # the rest concerns everybody, such as metrics that name every tenant


class Access:
    """Lets requests in by their key.

    Args:
        metrics: told of everyone who is not let in.
    """

    def __init__(self, gate: Gate, metrics: IngressMetrics) -> None:
        self._gate = gate
        self._metrics = metrics

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """An ASGI application around `app`, whose requests all have a caller; see `caller_of`."""

        async def known(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            path = _path(scope)
            caller: Caller | None = None
            try:
                caller = self._gate.caller(Headers(scope=scope).get("authorization"))
                if not caller.is_admin and path != _OPEN and not path.startswith(_TENANTS):
                    raise ForbiddenError(f"{path} is for tenants with admin: true only")
            except SelectNError as error:
                if path != _OPEN:
                    self._refused(caller, error)
                    await error_response(Failure.of(error))(scope, receive, send)
                    return
            scope.setdefault("state", {})["caller"] = caller
            await app(scope, receive, send)

        return known

    def _refused(self, caller: Caller | None, error: SelectNError) -> None:
        who = {"tenant": caller.tenant.name} if caller is not None and caller.tenant else {}
        self._metrics.record(ADMISSIONS, 1, {"outcome": "refused", "reason": error.code} | who)


def caller_of(request: Request) -> Caller:
    """Who sent the request, as `Access` found out; it lets nobody in who is not known."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


def is_admin(request: Request) -> bool:
    """Whether its sender sees what concerns everybody, on the path that is open to strangers."""
    caller: Caller | None = request.state.caller
    return caller is not None and caller.is_admin


def _path(scope: Scope) -> str:
    """Without the prefix that the application is mounted under."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
