"""OpenAI-shaped errors: which failure gets which status, and the handlers that answer with them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from deployments.calls import Failure
from select_n_core.decisions.facts import Reason
from select_n_core.errors import (
    AuthenticationError,
    ForbiddenError,
    InputError,
    OverloadedError,
    QuotaError,
    SelectNError,
)

_log = logging.getLogger(__name__)

_STATUS = {
    AuthenticationError.code: 401,
    ForbiddenError.code: 403,
    QuotaError.code: 429,
    "context_length_exceeded": 400,
    "invalid_input": 400,
    "invalid_request": 400,
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "engine_error": 503,
    "stream_timeout": 503,
    "unavailable": 503,
    **{f"{OverloadedError.code}_{reason}": 429 for reason in Reason},
}
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}


_NO_OBJECT = "the body must be a JSON object, sent with Content-Type: application/json"


class FailureError(Exception):
    """Carries a failure out of an endpoint to the handler that answers with it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def status_of(failure: Failure) -> int:
    """The HTTP status of a failure; 500 for what nobody foresaw."""
    return _STATUS.get(failure.code, 500)


def error_body(failure: Failure) -> dict[str, Any]:
    """The failure as OpenAI spells errors."""
    return {
        "error": {
            "message": failure.message,
            "type": _TYPES.get(status_of(failure), "invalid_request_error"),
            "param": failure.field,
            "code": failure.code,
        }
    }


def error_response(failure: Failure) -> Response:
    """The whole response of a request that failed before its first token."""
    headers, status = {}, status_of(failure)
    if failure.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(failure.retry_after_s)))
    elif status == 429:
        headers["X-Should-Retry"] = "false"  # OpenAI's clients would, three times
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _json(failure, status, headers)


def _json(failure: Failure, status: int, headers: Mapping[str, str] | None) -> Response:
    # Errors quote the client, whose strings may not be encodable: JSON's own escapes always are.
    body = json.dumps(error_body(failure))
    return Response(body, status, headers, media_type="application/json")


def install(api: FastAPI) -> None:
    """Answer every error of `api` in OpenAI's shape."""
    api.add_exception_handler(FailureError, _on_failure)
    api.add_exception_handler(SelectNError, _on_error)
    api.add_exception_handler(RequestValidationError, _on_invalid)
    api.add_exception_handler(HTTPException, _on_http)
    api.add_exception_handler(Exception, _on_unforeseen)


async def _on_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, FailureError)
    return error_response(error.failure)


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(Failure.of(error))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(_first_problem(error.errors()))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    failure = {
        404: Failure("not_found", f"there is no {where}"),
        405: Failure("method_not_allowed", f"{where} is not allowed"),
    }.get(error.status_code, Failure("invalid_request", str(error.detail)))
    return _json(failure, error.status_code, error.headers)


async def _on_unforeseen(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(Failure.of(error))


def _first_problem(problems: Sequence[dict[str, Any]]) -> Failure:
    """The first problem of a body as one line that names the field."""
    first = problems[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):  # from one of our own validators
        return Failure("invalid_request", str(cause), cause.field)
    if first["type"] == "json_invalid":
        return Failure("invalid_request", f"the body is not valid JSON: {cause}")
    # The location is ("body", field, ...): the rest is the way to it.
    field = ".".join(str(step) for step in first["loc"][1:])
    if not field:
        return Failure("invalid_request", _NO_OBJECT)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field; remove it or check its spelling"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Failure("invalid_request", f"{field}: {message}{more}", field)
