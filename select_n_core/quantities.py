"""The one parser of sizes, times and rates written with units (`256MiB`, `2GB/s`, `50ms`).

Pint knows the units; this module knows which dimension a field wants and how to say so
when it does not get it. Inside the program every quantity is a plain number in SI units
(bytes, seconds, bytes per second) and its name says which.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Annotated, Any

import pint
from pydantic import BeforeValidator, WithJsonSchema

from select_n_core.errors import InputError


@cache
def _registry() -> pint.UnitRegistry[float]:
    return pint.UnitRegistry(cache_folder=":auto:")


def _parse(text: object, unit: str, example: str) -> float:
    mend = f"{text!r} is not a {unit} quantity; write it with a unit, for example {example!r}"
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise InputError(mend)
    try:
        value = _in_unit(text, unit) if isinstance(text, str) else float(text)
    except Exception as error:  # pint raises a dozen kinds, AssertionError among them
        raise InputError(mend) from error
    if not math.isfinite(value):
        raise InputError(mend)
    return value


def _in_unit(text: str, unit: str) -> float:
    registry = _registry()
    quantity = registry.Quantity(text)
    # To pint a bit is a plain number: "256", "5 rad" and "50%" would all be bytes.
    if quantity.to_root_units().units != registry.Quantity(1, unit).to_root_units().units:
        raise InputError(f"{text!r} is of another dimension than {unit}")
    return float(quantity.to(unit).magnitude)


def parse_bytes(text: object) -> int:
    """Bytes from `256MiB`, `1.5GB` or a plain number of bytes."""
    return round(_parse(text, "byte", "256MiB"))


def parse_seconds(text: object) -> float:
    """Seconds from `50ms`, `2s` or a plain number of seconds."""
    return _parse(text, "second", "50ms")


def parse_bytes_per_s(text: object) -> float:
    """Bytes per second from `2GB/s` or a plain number of bytes per second."""
    return _parse(text, "byte/second", "2GB/s")


def format_bytes(value: float, *, up: bool = False) -> str:
    """`268435456` as `256 MiB`, for people; `up` never rounds down (for "give at least ...")."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{_digits(value, 4, up)} {unit}"
        value /= 1024
    return f"{_digits(value, 4, up)} GiB"


def format_seconds(value: float, *, up: bool = False) -> str:
    """`0.0431` as `43.1 ms`, for people; `up` never rounds down (for "give at least ...")."""
    if abs(value) < 1:
        return f"{_digits(value * 1e3, 3, up)} ms"
    return f"{_digits(value, 3, up)} s"


def _digits(value: float, digits: int, up: bool) -> str:
    text = f"{value:.{digits}g}"
    if up and float(text) < value:
        value += 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
        text = f"{value:.{digits}g}"
    return text


def _field(parse: Any, example: str) -> Any:
    return (
        BeforeValidator(parse),
        WithJsonSchema({"type": ["string", "number"], "examples": [example]}),
    )


Bytes = Annotated[int, *_field(parse_bytes, "256MiB")]
Seconds = Annotated[float, *_field(parse_seconds, "50ms")]
BytesPerSecond = Annotated[float, *_field(parse_bytes_per_s, "2GB/s")]
