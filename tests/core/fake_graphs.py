"""CUDA graphs without CUDA: a tape of torch's operators, replayed on the very same tensors.

As on a GPU, everything that Python computed while recording is baked in: addresses, shapes,
numbers. What a capture would forbid raises: reading a value back, shapes that depend on data,
bringing host data in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FORBIDDEN = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.lift_fresh.default,
}


class Tape(TorchDispatchMode):
    """Recorded operators with their arguments and the tensors that their results live in."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = {_storage(each) for each in tree_leaves((args, kwargs)) if _is_tensor(each)}
        fresh = [
            each for each in tree_leaves(out) if _is_tensor(each) and _storage(each) not in inputs
        ]
        self.steps.append((func, args, kwargs, fresh))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, fresh in self.steps:
            again = [each for each in tree_leaves(func(*args, **kwargs)) if _is_tensor(each)]
            if fresh:  # views and in-place results need no copy
                for target, value in zip(fresh, again, strict=True):
                    target.copy_(value)


class TapeGraphs:
    """Implements `select_n_core.offload.capture.GraphRuntime`."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.recording = False

    @contextmanager
    def session(self) -> Iterator[None]:
        yield
        assert not self.recording

    def begin(self) -> None:
        assert not self.recording, "captures do not nest"
        self.recording = True
        self.tapes.append(Tape())
        self.tapes[-1].__enter__()

    def end(self) -> Tape:
        assert self.recording
        self.recording = False
        self.tapes[-1].__exit__(None, None, None)
        return self.tapes[-1]

    def abort(self) -> None:
        if self.recording:
            self.end()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
