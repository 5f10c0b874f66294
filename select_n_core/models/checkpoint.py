"""A directory's safetensors, each tensor read straight to where it will live.

The format's own library maps the file, and touched pages of a map count as this process's
memory until the file is closed; without the map it reads a whole tensor for every slice of it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from select_n_core.errors import UnsupportedModelError
from select_n_core.models.sizes import read_header

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PIECE_BYTES = 8 << 20  # of what is read beside its destination
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a model directory by name; nothing is held but the headers.

    Raises:
        UnsupportedModelError: a file is damaged, or holds a type of tensor that is not known.
    """

    def __init__(self, directory: Path) -> None:
        self._entries: dict[str, _Entry] = {}
        for path in _files(directory):
            self._entries |= _entries(path)

    @property
    def names(self) -> frozenset[str]:
        """Of every tensor."""
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._entries[name].shape

    def read(self, name: str, view: Tensor) -> None:
        """Write tensor `name` into `view`: contiguous, as many elements, any type and device."""
        entry = self._entries[name]
        target = view.reshape(-1)
        if target.numel() * entry.dtype.itemsize != entry.nbytes:
            raise UnsupportedModelError(
                f"source: tensor {name} of {entry.path} has shape {list(entry.shape)}, the model "
                f"has {list(view.shape)}; config.json and weights do not belong together",
                field="source",
            )
        if not entry.nbytes:
            return
        try:
            file = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(entry.path, str(error.strerror)) from error
        try:
            if entry.dtype == target.dtype and target.device.type == "cpu":
                _read_exactly(file, entry, 0, target)
            else:
                _read_by_pieces(file, entry, target)
        finally:
            os.close(file)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """Tensor `name` as `dtype`, in memory of its own."""
        tensor = torch.empty(self.shape(name), dtype=dtype)
        self.read(name, tensor)
        return tensor

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and elements."""
        first, second = self._entries[one], self._entries[other]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        step = _PIECE_BYTES // first.dtype.itemsize
        for begin in range(0, first.nbytes // first.dtype.itemsize, step):
            pieces = []
            for entry in (first, second):
                offset = begin * entry.dtype.itemsize
                nbytes = min(_PIECE_BYTES, entry.nbytes - offset)
                piece = torch.empty(nbytes, dtype=torch.uint8)
                with entry.path.open("rb") as opened:
                    _read_exactly(opened.fileno(), entry, offset, piece)
                pieces.append(piece)
            if not torch.equal(*pieces):
                return False
        return True


def _files(directory: Path) -> list[Path]:
    if (directory / _WHOLE).is_file():
        return [directory / _WHOLE]
    index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
    return [directory / name for name in sorted(set(index["weight_map"].values()))]


def _entries(path: Path) -> dict[str, _Entry]:
    """What the header says of each tensor; offsets count from behind it."""
    try:
        (header, begin), end = read_header(path), path.stat().st_size
        return {name: _entry(path, begin, end, facts) for name, facts in header.items()}
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, str(error)) from error


def _entry(path: Path, begin: int, end: int, facts: dict[str, Any]) -> _Entry:
    dtype = _DTYPES.get(facts["dtype"])
    if dtype is None:
        raise ValueError(f"tensors of type {facts['dtype']}")
    shape = tuple(int(size) for size in facts["shape"])
    low, high = facts["data_offsets"]
    elements = torch.Size(shape).numel()
    if not 0 <= low <= high <= end - begin or high - low != elements * dtype.itemsize:
        raise ValueError("offsets that do not fit; is the file cut off?")
    return _Entry(path, begin + low, high - low, dtype, shape)


def _read_exactly(file: int, entry: _Entry, offset: int, target: Tensor) -> None:
    """Fill `target`, a flat CPU tensor, from byte `offset` of the entry on."""
    left = memoryview(target.view(torch.uint8).numpy())
    position = entry.offset + offset
    while left.nbytes:
        done = os.preadv(file, [left], position)
        if done == 0:
            raise _unreadable(entry.path, "it is shorter than it was")
        left, position = left[done:], position + done


def _read_by_pieces(file: int, entry: _Entry, target: Tensor) -> None:
    """Fill `target`, of another type or on another device, through a small buffer."""
    step = _PIECE_BYTES // entry.dtype.itemsize
    buffer = torch.empty(min(step, target.numel()), dtype=entry.dtype)
    for begin in range(0, target.numel(), step):
        into = target[begin : begin + step]
        piece = buffer[: into.numel()]
        _read_exactly(file, entry, begin * entry.dtype.itemsize, piece)
        into.copy_(piece)


def _unreadable(path: Path, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"source: {path} cannot be read ({why}); download the model again", field="source"
    )
