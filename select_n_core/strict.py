"""What every part of the configuration file shares: strict fields, and errors of one line."""

from __future__ import annotations

import reprlib

from pydantic import BaseModel, ConfigDict, ValidationError

from select_n_core.errors import ConfigError


class Strict(BaseModel):
    """A field nobody knows is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def config_error(error: ValidationError, *, prefix: str) -> ConfigError:
    """The first problem of a pydantic error as one line that names the field."""
    first = error.errors(include_url=False)[0]
    steps = [str(step) for step in first["loc"] if not _is_branch(step)]
    field = ".".join([prefix, *steps])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field; remove it or check its spelling"
    elif first["type"] == "model_type":
        message = f"needs its fields, as a mapping, got {reprlib.repr(first['input'])}"
    elif first["type"] not in ("value_error", "missing"):
        message = f"{message}, got {reprlib.repr(first['input'])}"
    more = error.error_count() - 1
    rest = f" (and {more} more)" if more else ""
    return ConfigError(f"{field}: {message}{rest}", field=field)


def _is_branch(step: int | str) -> bool:
    """Whether a location step is pydantic's name for a union branch, not a field."""
    return isinstance(step, str) and (
        "[" in step or "(" in step or step in {"float", "int", "str", "constrained-float"}
    )
