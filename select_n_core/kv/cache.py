"""The block-major cache: `[block][layer][K, V][kv_heads][block_tokens][head_dim]` in the arena."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from select_n_core.models.seam import LayerKV
from select_n_core.units import align


def block_bytes(kv: tuple[LayerKV, ...], block_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one block: all layers, K and V, rounded up to the arena's alignment."""
    per_token = sum(layer.kv_heads * (layer.k_dim + layer.v_dim) for layer in kv)
    return align(per_token * block_tokens * dtype.itemsize)


class KVCache:
    """Views of every layer's keys and values over one flat region of whole blocks.

    One copy moves a block with all its layers; strides give each layer its view.

    Args:
        region: flat uint8, `blocks * block_bytes` long; parts of it may hold weights for now.
        kv: shape per layer.
    """

    def __init__(
        self, region: Tensor, kv: tuple[LayerKV, ...], block_tokens: int, dtype: torch.dtype
    ) -> None:
        self.block_tokens = block_tokens
        nbytes = block_bytes(kv, block_tokens, dtype)
        self.blocks = region.numel() // nbytes
        elements = region[: self.blocks * nbytes].view(dtype)
        stride = nbytes // dtype.itemsize
        self._whole = elements.view(self.blocks, stride)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        offset = 0
        for layer in kv:
            for views, dim in ((self._keys, layer.k_dim), (self._values, layer.v_dim)):
                views.append(
                    elements.as_strided(
                        (self.blocks, layer.kv_heads, block_tokens, dim),
                        (stride, block_tokens * dim, dim, 1),
                        elements.storage_offset() + offset,
                    )
                )
                offset += layer.kv_heads * block_tokens * dim

    def clear(self, blocks: Tensor) -> None:
        """Zero whole blocks (int64 ids) before their first token.

        What lay there before (another request's, weights) can be NaN, and NaN times a masked
        zero is NaN.
        """
        self._whole.index_fill_(0, blocks, 0)

    def move(self, moves: Mapping[int, int]) -> None:
        """Copy blocks, old id -> new id, on the compute stream; no id is both."""
        if moves:
            device = self._whole.device
            targets = torch.tensor(list(moves.values()), device=device)
            sources = torch.tensor(list(moves), device=device)
            self._whole.index_copy_(0, targets, self._whole.index_select(0, sources))

    def bytes_of(self, block: int) -> Tensor:
        """The flat uint8 bytes of one block, all layers."""
        return self._whole[block].view(torch.uint8)

    def keys(self, layer: int) -> Tensor:
        """[blocks, kv_heads, block_tokens, k_dim]."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """[blocks, kv_heads, block_tokens, v_dim]."""
        return self._values[layer]
