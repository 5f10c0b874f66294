"""Weights of linear layers in the layout that oneDNN's kernels read, in place in a flat buffer.

A plain bfloat16 weight is brought into that layout again at every call. A packed one takes as many
bytes and gives the same product, bit for bit; it can be copied from buffer to buffer like any
bytes, as its layout follows from shape, processor and torch alone. The operators are those that
torch's compiler calls; where they are missing or differ, weights stay plain.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_log = logging.getLogger(__name__)

_PROBE = torch.Size((64, 128))
_STAYS_PLAIN = "torch's packed weights cannot be used here, plain ones are slower: %s"


class PackedWeight(nn.Parameter):  # type: ignore[misc]
    """A packed weight; `torch.nn.functional.linear` takes it as it takes a plain one.

    Attributes:
        packed: the same weight as oneDNN's opaque tensor.
        bytes: the view of the buffer that it lies in.
    """

    packed: Tensor
    bytes: Tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Linear layers only; everything else sees an opaque tensor, and mostly refuses it."""
        if func is linear:
            return _product(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def _product(tokens: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        tokens, weight.packed, bias, "none", [], ""
    )
    return product


@cache
def layout_of(shape: torch.Size, dtype: torch.dtype) -> bytes | None:
    """How a weight of `shape` [out, in] is packed, in oneDNN's words; None where it stays plain.

    It does where packing would change its size, and in other types than bfloat16, whose plain
    kernels need no packing or round differently.
    """
    if dtype != torch.bfloat16 or len(shape) != 2 or not _available():
        return None
    plain = torch.zeros(shape, dtype=dtype)
    packed = _pack(plain)
    return _layout(packed) if torch.ops.mkldnn._nbytes(packed) == plain.nbytes else None


def signature(dtype: torch.dtype, device: torch.device) -> str:
    """Names the layout that weights of `dtype` get on `device`: equal names, equal bytes."""
    layout = layout_of(_PROBE, dtype) if device.type == "cpu" else None
    return "plain" if layout is None else hashlib.sha256(layout).hexdigest()[:16]


def pack(weight: Tensor) -> None:
    """Bring a contiguous weight that has a layout into it, in place; takes as much again."""
    packed = _pack(weight)
    ctypes.memmove(weight.data_ptr(), torch.ops.mkldnn.data_ptr(packed), weight.nbytes)


def packed_view(weight: Tensor, layout: bytes) -> PackedWeight:
    """The parameter over bytes that were packed in `layout`, here or where they were copied from.

    Args:
        weight: a contiguous view of the bytes, in the shape and type of the plain weight.
    """
    opaque = _opaque(weight, layout)
    parameter: PackedWeight = torch.Tensor._make_subclass(PackedWeight, opaque, False)
    parameter.packed, parameter.bytes = opaque, weight
    return parameter


def _pack(weight: Tensor) -> Tensor:
    with torch.inference_mode():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _layout(packed: Tensor) -> bytes:
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())


@cache
def _available() -> bool:
    """Whether this machine and torch pack, and the product over packed bytes is the plain one."""
    if not torch.backends.mkldnn.is_available():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:
        plain = torch.linspace(-1, 1, _PROBE.numel()).view(_PROBE).to(torch.bfloat16)
        copied = plain.clone()
        pack(copied)
        view = packed_view(copied, _layout(_pack(plain)))
        tokens = torch.linspace(1, -1, 3 * _PROBE[1]).view(3, -1).to(torch.bfloat16)
        with torch.inference_mode():
            same = bool(torch.equal(linear(tokens, view), linear(tokens, plain)))
    except (AttributeError, OSError, RuntimeError, TypeError) as error:
        _log.warning(_STAYS_PLAIN, error)
        return False
    if not same:
        _log.warning(_STAYS_PLAIN, "they give another product")
    return same


@cache
def _library() -> ctypes.CDLL:
    """torch's C interface, which alone makes an opaque tensor over bytes that are given."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    integers = ctypes.POINTER(ctypes.c_int64)
    library.aoti_torch_create_tensor_from_blob_v2.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        integers,
        integers,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.c_int64,
    ]
    return library


def _opaque(weight: Tensor, layout: bytes) -> Tensor:
    """oneDNN's tensor over the bytes of `weight`, which must outlive it."""
    library, handle = _library(), ctypes.c_void_p()
    sizes = (ctypes.c_int64 * 2)(*weight.shape)
    strides = (ctypes.c_int64 * 2)(*weight.stride())
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        weight.data_ptr(),
        2,
        sizes,
        strides,
        0,
        library.aoti_torch_dtype_bfloat16(),
        library.aoti_torch_device_type_cpu(),
        0,
        ctypes.byref(handle),
        library.aoti_torch_layout__mkldnn(),
        layout,
        len(layout),
    )
    if failed:
        raise RuntimeError(f"no opaque tensor could be made of a weight {list(weight.shape)}")
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object
    capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    opaque: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(
        capsule(handle, None, None)
    )
    return opaque
