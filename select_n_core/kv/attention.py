"""Attention of one step over the paged cache, in torch's public operators.

Decoding rows gather their pages once and take the queries to the pages (pages are the batch
dimension, no padding of keys or values); only the scores, which are small, are laid out per
request for one softmax. Prompt chunks attend request by request with SDPA.
Source: flash-decoding's page-wise split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from select_n_core.kv.cache import KVCache
from select_n_core.models.seam import AttentionTraits

_HIDDEN = float("-inf")


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part of a step.

    Attributes:
        blocks: its block table, long enough for `context + tokens`.
        context: tokens already in the cache.
        tokens: new tokens, computed now.
    """

    blocks: Sequence[int]
    context: int
    tokens: int


class PagedAttention:
    """The step context handed to the model: writes new K/V into the cache and attends.

    Args:
        rows: in the order in which their tokens are packed into `[1, T]`.
    """

    def __init__(self, cache: KVCache, rows: Sequence[Row], device: torch.device) -> None:
        self._cache = cache
        size = cache.block_tokens
        positions: list[int] = []
        blocks: list[int] = []
        self._chunks: list[_Chunk] = []
        decoding: list[tuple[int, Row]] = []
        begun: list[int] = []  # last blocks that this step begins and leaves partly unwritten
        for row in rows:
            start = len(positions)
            if row.tokens == 1:
                decoding.append((start, row))
            else:
                self._chunks.append(_Chunk(start, row, size, device))
            for position in range(row.context, row.context + row.tokens):
                positions.append(position)
                blocks.append(row.blocks[position // size])
            end = row.context + row.tokens
            if end % size and (end - 1) // size * size >= row.context:
                begun.append(row.blocks[end // size])
        if begun:
            cache.clear(torch.tensor(begun, device=device))
        self.positions = torch.tensor(positions, device=device)
        self._blocks = torch.tensor(blocks, device=device)
        self._offsets = self.positions % size
        self._decode = _Decode(decoding, size, device) if decoding else None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, traits: AttentionTraits
    ) -> Tensor:
        """See `StepAttention.attend`."""
        keys, values = self._cache.keys(layer), self._cache.values(layer)
        keys[self._blocks, :, self._offsets] = k.transpose(0, 1)
        values[self._blocks, :, self._offsets] = v.transpose(0, 1)
        if self._decode is not None and not self._chunks:
            return self._decode.attend(q, keys, values, traits)
        out = torch.empty(q.shape[1], q.shape[0], v.shape[2], dtype=q.dtype, device=q.device)
        if self._decode is not None:
            rows = self._decode.starts
            out[rows] = self._decode.attend(q[:, rows], keys, values, traits)
        for chunk in self._chunks:
            part = slice(chunk.start, chunk.start + chunk.tokens)
            own = (k[:, part], v[:, part])
            out[part] = chunk.attend(q[:, part], own, keys, values, traits)
        return out


class _Decode:
    """All rows with one new token."""

    def __init__(
        self, rows: Sequence[tuple[int, Row]], block_tokens: int, device: torch.device
    ) -> None:
        pages: list[int] = []
        owners: list[int] = []
        counts = [row.context // block_tokens + 1 for _, row in rows]
        self.width = max(counts)  # pages of the longest row
        scattered: list[int] = []  # place of each page in the padded [rows, width] grid
        for index, ((_, row), count) in enumerate(zip(rows, counts, strict=True)):
            pages += row.blocks[:count]
            owners += [index] * count
            scattered += range(index * self.width, index * self.width + count)
        self.rows = len(rows)
        self.starts = torch.tensor([start for start, _ in rows], device=device)
        self.pages = torch.tensor(pages, device=device)
        self.owners = torch.tensor(owners, device=device)
        self.dense = len(pages) == self.rows * self.width
        self.scattered = torch.tensor(scattered, device=device)
        self._last = torch.tensor([row.context for _, row in rows], device=device)
        self._grid = torch.arange(self.width * block_tokens, device=device)
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}

    def _mask(self, traits: AttentionTraits) -> Tensor:
        """[rows, 1, 1, width * block_tokens]: 0 where the key is seen, -inf elsewhere."""
        key = (traits.window, traits.chunk)
        if key not in self._masks:
            last = self._last[:, None]
            seen = (self._grid <= last) & (self._grid >= _lowest(last, traits))
            mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, _HIDDEN)
            self._masks[key] = mask[:, None, None]
        return self._masks[key]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, traits: AttentionTraits) -> Tensor:
        heads, rows, k_dim = q.shape
        kv_heads, size, v_dim = keys.shape[1], keys.shape[2], values.shape[3]
        group = heads // kv_heads
        queries = (q * traits.scaling).transpose(0, 1).reshape(rows, kv_heads, group, k_dim)
        scores = queries.index_select(0, self.owners) @ keys.index_select(0, self.pages).mT
        # [pages, kv_heads, group, size] -> [rows, kv_heads, group, width * size]
        grid = scores.float()
        if not self.dense:
            padded = grid.new_zeros(rows * self.width, kv_heads, group, size)
            grid = padded.index_copy_(0, self.scattered, grid)
        grid = grid.view(rows, self.width, kv_heads, group, size).permute(0, 2, 3, 1, 4)
        grid = grid.reshape(rows, kv_heads, group, self.width * size)
        weights = _softmax(grid, self._mask(traits), traits, kv_heads, group)
        weights = weights.view(rows, kv_heads, group, self.width, size).permute(0, 3, 1, 2, 4)
        weights = weights.reshape(rows * self.width, kv_heads, group, size).to(q.dtype)
        if not self.dense:
            weights = weights.index_select(0, self.scattered)
        parts = weights @ values.index_select(0, self.pages)
        if self.width == 1:
            return parts.view(rows, heads, v_dim)
        out = parts.new_zeros(rows, kv_heads, group, v_dim, dtype=torch.float32)
        out.index_add_(0, self.owners, parts.float())
        return out.view(rows, heads, v_dim).to(q.dtype)


class _Chunk:
    """One request's prompt chunk of two or more tokens."""

    def __init__(self, start: int, row: Row, block_tokens: int, device: torch.device) -> None:
        self.start = start
        self.tokens = row.tokens
        self._context = row.context
        self._device = device
        pages = -(-(row.context + row.tokens) // block_tokens)
        self._pages = torch.tensor(list(row.blocks[:pages]), device=device)
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}

    def _seen(self, traits: AttentionTraits) -> Tensor:
        """[tokens, context + tokens], true where the key is seen."""
        key = (traits.window, traits.chunk)
        if key not in self._masks:
            end = self._context + self.tokens
            queries = torch.arange(self._context, end, device=self._device)[:, None]
            grid = torch.arange(end, device=self._device)
            self._masks[key] = (grid <= queries) & (grid >= _lowest(queries, traits))
        return self._masks[key]

    def attend(
        self,
        q: Tensor,
        own: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        traits: AttentionTraits,
    ) -> Tensor:
        end = self._context + self.tokens
        k, v = own if self._context == 0 else (self._gather(keys), self._gather(values))
        if traits.softcap is not None or traits.sinks is not None:
            return self._explicit(q, k, v, traits)
        whole = traits.chunk is None and (traits.window is None or traits.window >= end)
        causal = whole and self._context == 0
        out = scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=None if causal else self._seen(traits),
            is_causal=causal,
            scale=traits.scaling,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)

    def _gather(self, cached: Tensor) -> Tensor:
        """[heads, context + tokens, dim] of this request."""
        pages = cached.index_select(0, self._pages).transpose(0, 1)
        return pages.reshape(cached.shape[1], -1, cached.shape[3])[:, : self._context + self.tokens]

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, traits: AttentionTraits) -> Tensor:
        heads, kv_heads = q.shape[0], k.shape[0]
        group = heads // kv_heads
        queries = (q * traits.scaling).reshape(kv_heads, group * self.tokens, -1)
        scores = (queries @ k.mT).float().view(1, kv_heads, group, self.tokens, -1)
        hidden = torch.zeros(scores.shape[-2:], device=q.device)
        hidden.masked_fill_(~self._seen(traits), _HIDDEN)
        # [1, kv_heads, group, tokens, keys] -> rows of queries, as _softmax wants them
        weights = _softmax(
            scores[0].permute(2, 0, 1, 3), hidden[:, None, None], traits, kv_heads, group
        )
        weights = weights.permute(1, 2, 0, 3).reshape(kv_heads, group * self.tokens, -1)
        out = (weights.to(q.dtype) @ v).view(heads, self.tokens, -1)
        return out.transpose(0, 1)


def _lowest(query: Tensor, traits: AttentionTraits) -> Tensor:
    """The lowest position each query sees."""
    if traits.chunk is not None:
        return query // traits.chunk * traits.chunk
    if traits.window is not None:
        return query - (traits.window - 1)
    return torch.zeros_like(query)


def _softmax(
    scores: Tensor, mask: Tensor, traits: AttentionTraits, kv_heads: int, group: int
) -> Tensor:
    """Softmax over the last dimension of [rows, kv_heads, group, keys], with cap and sinks."""
    if traits.softcap is not None:
        scores = torch.tanh(scores / traits.softcap) * traits.softcap
    scores = scores + mask
    if traits.sinks is None:
        return torch.softmax(scores, dim=-1)
    sinks = traits.sinks.float().view(1, kv_heads, group, 1).expand(scores.shape[0], -1, -1, 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
