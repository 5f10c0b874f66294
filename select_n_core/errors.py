"""Everything this project raises on purpose: each error says what was wrong and what to do."""

from __future__ import annotations


class SelectNError(Exception):
    """Base of all errors raised on purpose.

    `code` is the stable word that logs, HTTP bodies and tests match on.
    """

    code = "select_n_error"

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross processes; Exception's own way calls the class with its message alone.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(
    kind: type[SelectNError], args: tuple[object, ...], state: dict[str, object]
) -> SelectNError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InputError(SelectNError, ValueError):
    """The caller asked for something malformed; `field` names the offending input, if one does."""

    code = "invalid_input"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(InputError):
    """A configuration file or argument is broken."""

    code = "invalid_config"


class RequestError(InputError):
    """One request cannot be served as asked; nobody else's is affected."""

    code = "invalid_request"


class ContextLengthError(RequestError):
    """Prompt plus max_tokens is more than this replica can ever hold."""

    code = "context_length_exceeded"


class UnsupportedModelError(InputError):
    """The architecture does not fit the attention and weight seams."""

    code = "unsupported_model"


class ModelNotFoundError(InputError):
    """A model name or directory does not exist."""

    code = "model_not_found"


class RecordMismatchError(InputError):
    """A performance record was measured on other hardware, software or model."""

    code = "record_mismatch"


class InfeasibleError(SelectNError):
    """No plan meets the SLO in the memory given; `reason` is the planner's word for why."""

    code = "infeasible"

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class OverloadedError(SelectNError):
    """A request was returned, not refused for ever: it may be sent again after `retry_after_s`.

    `reason` is the decision's word for why; the code is `overloaded_` and that word.
    """

    code = "overloaded"

    def __init__(self, message: str, *, reason: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.code = f"{type(self).code}_{reason}"


class AuthenticationError(SelectNError):
    """Nobody knows who sends this request."""

    code = "invalid_api_key"


class ForbiddenError(SelectNError):
    """The sender is known, and may not do this."""

    code = "insufficient_permissions"


class QuotaError(SelectNError):
    """A tenant asks for more than its quota; None: it may never ask for so much at once."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LinkError(SelectNError):
    """A copy between host and device failed or cannot be made."""

    code = "link_error"


class StreamingError(SelectNError):
    """The streaming protocol was misused: a ticket, slot or unit out of order."""

    code = "streaming_error"


class DeviceMemoryError(SelectNError):
    """The device arena cannot hold what was asked of it."""

    code = "device_memory"


class HostMemoryError(SelectNError):
    """Host memory cannot hold what was asked of it, holds something else, or stays in use."""

    code = "host_memory"


class UnavailableError(SelectNError):
    """A part of the cluster does not answer, or is not there; it may be later."""

    code = "unavailable"


class EngineError(SelectNError):
    """The engine failed while serving a request, or is no longer running."""

    code = "engine_error"
