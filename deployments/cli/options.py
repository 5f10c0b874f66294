"""Values on the command line: quantities with units, links, intervals, and a model from them."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from select_n_core.config import ModelConfig
from select_n_core.errors import InputError
from select_n_core.quantities import parse_bytes, parse_bytes_per_s, parse_seconds
from select_n_core.strict import config_error


def positive_bytes(text: str) -> int:
    """`256MiB` as bytes, above zero."""
    return int(_above_zero(parse_bytes(text), text))


def some_bytes(text: str) -> int:
    """`1GiB` as bytes, zero or more."""
    value = parse_bytes(text)
    if value < 0:
        raise InputError(f"{text} must not be negative")
    return value


def positive_seconds(text: str) -> float:
    """`50ms` as seconds, above zero."""
    return _above_zero(parse_seconds(text), text)


def link(text: str) -> dict[str, Any]:
    """`cuda`, or `emulated:1GB/s`, as the configuration's `link`."""
    kind, _, bandwidth = text.partition(":")
    if kind == "cuda" and not bandwidth:
        return {"kind": "cuda"}
    if kind == "emulated" and bandwidth:
        return {"kind": "emulated", "bandwidth": _above_zero(parse_bytes_per_s(bandwidth), text)}
    raise InputError(f"{text!r} is no link; write 'cuda' or 'emulated:1GB/s'")


def model_config(**fields: Any) -> ModelConfig:
    """A model from command-line values; raises InputError naming the option."""
    try:
        return ModelConfig.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as error:
        problem = config_error(error, prefix="")
        raise InputError(str(problem).lstrip("."), field=problem.field) from error


def _above_zero(value: float, text: str) -> float:
    if not value > 0:
        raise InputError(f"{text} must be above zero")
    return value
