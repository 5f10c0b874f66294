"""Attention of one step by FlashInfer: paged kernels that read the cache where it lies.

The library takes any strides as long as keys and values share them, so a layer's views of our
block-major cache are its pages (layout HND). It plans once per step and kind of layer, on the
host and before the kernels; a captured graph is replayed after planning anew into the same
buffers. Layers that it cannot serve (chunked attention, sinks) go the way of `GatheredAttention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from select_n_core.kv.attention import Row
from select_n_core.kv.attention_cuda import GatheredAttention, StaticDecode, begun_blocks
from select_n_core.kv.cache import KVCache
from select_n_core.kv.upload import upload
from select_n_core.models.seam import AttentionTraits, LayerKV

WORKSPACE_BYTES = 128 << 20
_HEAD_DIMS = frozenset({64, 128, 256})
_DTYPES = frozenset({torch.float16, torch.bfloat16})
_TENSOR_CORES_FROM_GROUP = 4  # query heads per kv head; below, plain cores keep up with memory


def refusal(kv: Sequence[LayerKV], dtype: torch.dtype) -> str | None:
    """Why FlashInfer cannot serve a model of these layers; None where it can."""
    if dtype not in _DTYPES:
        return f"it has no kernels for {dtype}"
    for layer in kv:
        if layer.k_dim != layer.v_dim:
            return f"keys have {layer.k_dim} dimensions and values {layer.v_dim}"
        if layer.k_dim not in _HEAD_DIMS:
            return f"it has no kernels for heads of {layer.k_dim} dimensions"
    return None


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a plan is made for, beside the rows."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    scaling: float
    window: int | None
    softcap: float | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, traits: AttentionTraits) -> _Kind:
        return cls(
            q.shape[0],
            k.shape[0],
            q.shape[2],
            q.dtype,
            traits.scaling,
            traits.window,
            traits.softcap,
        )

    def shape(self, page_size: int) -> dict[str, int]:
        return {
            "num_qo_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "page_size": page_size,
        }

    def options(self) -> dict[str, Any]:
        return {
            "sm_scale": self.scaling,
            "window_left": -1 if self.window is None else self.window - 1,
            "logits_soft_cap": self.softcap,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }

    @property
    def tensor_cores(self) -> bool:
        return self.heads // self.kv_heads >= _TENSOR_CORES_FROM_GROUP


@dataclass(frozen=True, slots=True)
class _Pages:
    """The rows' pages as the library wants them, int32 in host memory."""

    new: Tensor  # [rows + 1] prefix sums of new tokens
    indptr: Tensor  # [rows + 1] prefix sums of pages
    indices: Tensor
    last: Tensor  # [rows] tokens in the last page

    @classmethod
    def of(cls, rows: Sequence[Row], size: int) -> _Pages:
        new, indptr = [0], [0]
        indices: list[int] = []
        last: list[int] = []
        for row in rows:
            end = row.context + row.tokens
            indices += row.blocks[: -(-end // size)]
            new.append(new[-1] + row.tokens)
            indptr.append(len(indices))
            last.append((end - 1) % size + 1)
        return cls(
            *(torch.tensor(each, dtype=torch.int32) for each in (new, indptr, indices, last))
        )


@dataclass(slots=True)
class FlashInfer:
    """The library with its workspace, shared by all steps of an executor."""

    library: Any
    device: torch.device
    _workspace: Tensor = field(init=False)
    _wrappers: dict[tuple[bool, _Kind], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)

    def planned(self, kind: _Kind, pages: _Pages, page_size: int) -> Any:
        """A wrapper that is planned for this step's rows."""
        decode = bool(pages.new[-1] == len(pages.last))
        wrapper = self._wrappers.get((decode, kind))
        if wrapper is None:
            if decode:
                wrapper = self.library.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, "HND", use_tensor_cores=kind.tensor_cores
                )
            else:
                wrapper = self.library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
            self._wrappers[decode, kind] = wrapper
        if decode:
            plan_decode(wrapper, kind, pages, page_size)
        else:
            wrapper.plan(
                qo_indptr=pages.new,
                paged_kv_indptr=pages.indptr,
                paged_kv_indices=pages.indices,
                paged_kv_last_page_len=pages.last,
                head_dim_qk=kind.dim,
                causal=True,
                **kind.shape(page_size),
                **kind.options(),
            )
        return wrapper

    def static(self, kind: _Kind, rows: int, most_pages: int) -> Any:
        """A decode wrapper of its own for a graph of `rows` rows."""
        buffers = {
            "paged_kv_indptr_buffer": rows + 1,
            "paged_kv_indices_buffer": most_pages,
            "paged_kv_last_page_len_buffer": rows,
        }
        return self.library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=kind.tensor_cores,
            **{
                name: torch.zeros(count, dtype=torch.int32, device=self.device)
                for name, count in buffers.items()
            },
        )


def plan_decode(wrapper: Any, kind: _Kind, pages: _Pages, page_size: int) -> None:
    """Plan a decode wrapper for these rows; on the host, outside any graph."""
    wrapper.plan(
        indptr=pages.indptr,
        indices=pages.indices,
        last_page_len=pages.last,
        head_dim=kind.dim,
        **kind.shape(page_size),
        **kind.options(),
    )


def _served(traits: AttentionTraits) -> bool:
    return traits.chunk is None and traits.sinks is None


class FlashAttention:
    """A step context, see `StepAttention`: any mix of prompt chunks and decoding rows."""

    def __init__(
        self, flash: FlashInfer, cache: KVCache, rows: Sequence[Row], device: torch.device
    ) -> None:
        self._flash, self._cache, self._rows, self._device = flash, cache, rows, device
        size = cache.block_tokens
        self._pages = _Pages.of(rows, size)
        own = [range(row.context, row.context + row.tokens) for row in rows]
        self.positions, self._blocks, begun = upload(
            [
                [position for positions in own for position in positions],
                [
                    row.blocks[position // size]
                    for row, positions in zip(rows, own, strict=True)
                    for position in positions
                ],
                begun_blocks(rows, size),
            ],
            device,
        )
        if len(begun):
            cache.clear(begun)
        self._offsets = self.positions % size
        self._planned: dict[_Kind, Any] = {}
        self._gathered: GatheredAttention | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, traits: AttentionTraits
    ) -> Tensor:
        """See `StepAttention.attend`."""
        if not _served(traits):
            if self._gathered is None:
                self._gathered = GatheredAttention(self._cache, self._rows, self._device)
            return self._gathered.attend(layer, q, k, v, traits)
        keys, values = self._cache.keys(layer), self._cache.values(layer)
        keys[self._blocks, :, self._offsets] = k.transpose(0, 1)
        values[self._blocks, :, self._offsets] = v.transpose(0, 1)
        kind = _Kind.of(q, k, traits)
        if kind not in self._planned:
            self._planned[kind] = self._flash.planned(kind, self._pages, self._cache.block_tokens)
        out: Tensor = self._planned[kind].run(q.transpose(0, 1), (keys, values))
        return out


class FlashStaticDecode(StaticDecode):
    """`StaticDecode` with FlashInfer's kernels; wrappers are made in the first forward."""

    def __init__(
        self, flash: FlashInfer, cache: KVCache, rows: int, width: int, device: torch.device
    ) -> None:
        super().__init__(cache, rows, width, device)
        self._flash = flash
        self._wrappers: dict[_Kind, Any] = {}
        self._pages: _Pages | None = None

    def load(self, tokens: Sequence[int], rows: Sequence[Row]) -> None:
        """See `StaticDecode.load`."""
        super().load(tokens, rows)
        padded = [*rows, *[rows[-1]] * (self.rows - len(rows))]
        self._pages = _Pages.of(padded, self._cache.block_tokens)
        for kind, wrapper in self._wrappers.items():
            plan_decode(wrapper, kind, self._pages, self._cache.block_tokens)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, traits: AttentionTraits
    ) -> Tensor:
        """See `StepAttention.attend`."""
        if not _served(traits):
            return super().attend(layer, q, k, v, traits)
        keys, values = self._write(layer, k, v)
        kind = _Kind.of(q, k, traits)
        if kind not in self._wrappers:
            assert self._pages is not None  # `load` comes before any forward
            wrapper = self._flash.static(kind, self.rows, self.rows * self.width)
            plan_decode(wrapper, kind, self._pages, self._cache.block_tokens)
            self._wrappers[kind] = wrapper
        out: Tensor = self._wrappers[kind].run(q.transpose(0, 1), (keys, values))
        return out
