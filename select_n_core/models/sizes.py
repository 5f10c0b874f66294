"""How many bytes a model's weights take, from the headers of its files alone: no torch, no load."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from select_n_core.errors import InputError
from select_n_core.models import demo
from select_n_core.record import load_record

_MOST_HEADER_BYTES = 100 << 20  # the format's own limit


def weights_bytes(source: str, element_bytes: int) -> int | None:
    """What the weights take in a type of so many bytes; None where they are not on this machine.

    Nothing is downloaded or converted for it, and nothing said about files that are broken: who
    loads them does.
    """
    directory = _directory(source)
    try:
        headers = [read_header(path)[0] for path in sorted(directory.glob("*.safetensors"))]
        sizes = [math.prod(each["shape"]) for header in headers for each in header.values()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return element_bytes * sum(sizes) if sizes else None


def recorded_bytes(record: str) -> int | None:
    """The same of the machine that a record stands in for; None where there is no such record."""
    try:
        found = load_record(Path(record).expanduser())
    except InputError:
        return None
    return found.static_bytes + sum(found.unit_bytes)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's tensors by name, and the bytes of the header itself.

    Raises:
        OSError: it cannot be read. ValueError: it has no such header.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= _MOST_HEADER_BYTES:
            raise ValueError(f"a header of {header_bytes} bytes")
        header = json.loads(file.read(header_bytes))
    if not isinstance(header, dict):
        raise ValueError("a header that is no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + header_bytes


def _directory(source: str) -> Path:
    if source.startswith(demo.SCHEME):
        return demo.directory_of(source.removeprefix(demo.SCHEME))
    return Path(os.path.expanduser(source))
