"""Attention of one step for a GPU, in torch's public operators: few launches, no host wait.

Decoding rows are padded to one number of pages: two gathers and one SDPA per layer, with shapes
and addresses that do not change from step to step, so that a graph can be captured over them.
Prompt chunks attend request by request. Everything a step needs is uploaded by one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from select_n_core.kv.attention import Row
from select_n_core.kv.cache import KVCache
from select_n_core.kv.upload import upload
from select_n_core.models.seam import AttentionTraits

_HIDDEN = float("-inf")


def begun_blocks(rows: Sequence[Row], block_tokens: int) -> list[int]:
    """The last blocks that this step begins and leaves partly unwritten."""
    found = []
    for row in rows:
        end = row.context + row.tokens
        if end % block_tokens and (end - 1) // block_tokens * block_tokens >= row.context:
            found.append(row.blocks[end // block_tokens])
    return found


class GatheredAttention:
    """A step context, see `StepAttention`: any mix of prompt chunks and decoding rows.

    Args:
        rows: in the order in which their tokens are packed into `[1, T]`.
    """

    def __init__(self, cache: KVCache, rows: Sequence[Row], device: torch.device) -> None:
        self._cache = cache
        size = cache.block_tokens
        decoding: list[tuple[int, Row]] = []
        chunks: list[tuple[int, Row]] = []
        positions: list[int] = []
        blocks: list[int] = []
        for row in rows:
            (decoding if row.tokens == 1 else chunks).append((len(positions), row))
            own = range(row.context, row.context + row.tokens)
            positions += own
            blocks += [row.blocks[position // size] for position in own]
        width = max((row.context // size + 1 for _, row in decoding), default=0)
        self.positions, self._blocks, starts, table, begun, pages = upload(
            [
                positions,
                blocks,
                [start for start, _ in decoding],
                [block for _, row in decoding for block in padded_table(row, width, size)],
                begun_blocks(rows, size),
                [block for _, row in chunks for block in _pages(row, size)],
            ],
            device,
        )
        if len(begun):
            cache.clear(begun)
        self._offsets = self.positions % size
        self._decode: PaddedDecode | None = None
        if decoding:
            self._starts = starts
            last = self.positions if not chunks else self.positions[starts]
            self._decode = PaddedDecode(table.view(len(decoding), width), last, size)
        counts = [len(_pages(row, size)) for _, row in chunks]
        self._chunks = [
            _Chunk(start, row, own)
            for (start, row), own in zip(chunks, pages.split(counts), strict=True)
        ]

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
            out[self._starts] = self._decode.attend(q[:, self._starts], keys, values, traits)
        for chunk in self._chunks:
            part = slice(chunk.start, chunk.start + chunk.tokens)
            own = (k[:, part], v[:, part])
            out[part] = chunk.attend(q[:, part], own, keys, values, traits)
        return out


class StaticDecode:
    """Decoding rows whose inputs stay where they are: what a captured graph reads.

    `load` says which rows a replay is for. All that depends on them is computed on the device
    from three tensors; nothing else about them may reach the graph.

    Args:
        rows, width: of the padded batch, and blocks of the longest row.
    """

    def __init__(self, cache: KVCache, rows: int, width: int, device: torch.device) -> None:
        self.rows = rows
        self.width = width
        self._cache = cache
        self._device = device
        self._input = torch.zeros(rows * (2 + width), dtype=torch.long, device=device)
        self.tokens, self.positions, table = self._input.split([rows, rows, rows * width])
        self._table = table.view(rows, width)
        self.begin()

    def begin(self) -> None:
        """Forget what an earlier forward computed from the inputs; before each forward."""
        self._decode: PaddedDecode | None = None
        self._places: tuple[Tensor, Tensor] | None = None  # blocks and offsets of the new tokens

    def load(self, tokens: Sequence[int], rows: Sequence[Row]) -> None:
        """Take other rows; fewer than `self.rows` are filled up with copies of the last.

        A copy writes the same keys and values to the same place as its original.
        """
        padded = [*rows, *[rows[-1]] * (self.rows - len(rows))]
        tokens = [*tokens, *[tokens[-1]] * (self.rows - len(rows))]
        size = self._cache.block_tokens
        table = [block for row in padded for block in padded_table(row, self.width, size)]
        begun = begun_blocks(rows, size)
        state, blocks = upload(
            [[*tokens, *[row.context for row in padded], *table], begun], self._device
        )
        self._input.copy_(state)
        if begun:
            self._cache.clear(blocks)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, traits: AttentionTraits
    ) -> Tensor:
        """See `StepAttention.attend`."""
        keys, values = self._write(layer, k, v)
        if self._decode is None:
            self._decode = PaddedDecode(self._table, self.positions, self._cache.block_tokens)
        return self._decode.attend(q, keys, values, traits)

    def _write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens; the layer's keys and values."""
        if self._places is None:
            size = self._cache.block_tokens
            page = self.positions.div(size, rounding_mode="floor")
            self._places = self._table.gather(1, page[:, None])[:, 0], self.positions % size
        keys, values = self._cache.keys(layer), self._cache.values(layer)
        blocks, offsets = self._places
        keys[blocks, :, offsets] = k.transpose(0, 1)
        values[blocks, :, offsets] = v.transpose(0, 1)
        return keys, values


def padded_table(row: Row, width: int, block_tokens: int) -> list[int]:
    """`width` blocks: those that hold its tokens, then its first one, which is always written."""
    own = _pages(row, block_tokens)
    return own + [own[0]] * (width - len(own))


def _pages(row: Row, block_tokens: int) -> list[int]:
    return list(row.blocks[: -(-(row.context + row.tokens) // block_tokens)])


class PaddedDecode:
    """Rows of one new token each over tables of equal width.

    Args:
        table: [rows, width] blocks. last: [rows], position of each new token.
    """

    def __init__(self, table: Tensor, last: Tensor, block_tokens: int) -> None:
        self._pages = table.flatten()
        self._rows, self._width = table.shape
        self._last = last
        self._keys = torch.arange(self._width * block_tokens, device=table.device)
        self._masks: dict[tuple[int | None, int | None, torch.dtype], Tensor] = {}

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, traits: AttentionTraits) -> Tensor:
        """q [heads, rows, k_dim] over the cache's [blocks, kv_heads, size, dim] views.

        Returns:
            [rows, heads, v_dim].
        """
        heads, rows, k_dim = q.shape
        kv_heads = keys.shape[1]
        # The heads of a group are its rows: they see the same keys, which are not repeated.
        grouped = q.view(kv_heads, heads // kv_heads, rows, k_dim).permute(2, 0, 1, 3)
        out = _attend(
            grouped, self._gather(keys), self._gather(values), self._mask(traits, q.dtype), traits
        )
        return out.reshape(rows, heads, -1)

    def _gather(self, cached: Tensor) -> Tensor:
        """[rows, kv_heads, width * size, dim], by one copy."""
        kv_heads, dim = cached.shape[1], cached.shape[3]
        pages = cached.transpose(0, 1).index_select(1, self._pages)
        return pages.view(kv_heads, self._rows, -1, dim).transpose(0, 1)

    def _mask(self, traits: AttentionTraits, dtype: torch.dtype) -> Tensor:
        """[rows, 1, 1, width * size]: 0 where the key is seen, -inf elsewhere."""
        key = (traits.window, traits.chunk, dtype)
        if key not in self._masks:
            mask = _hidden(self._last[:, None], self._keys, traits, dtype)
            self._masks[key] = mask[:, None, None]
        return self._masks[key]


class _Chunk:
    """One request's prompt chunk of two or more tokens."""

    def __init__(self, start: int, row: Row, pages: Tensor) -> None:
        self.start = start
        self.tokens = row.tokens
        self._context = row.context
        self._pages = pages
        self._masks: dict[tuple[int | None, int | None, torch.dtype], Tensor] = {}

    def attend(
        self,
        q: Tensor,
        own: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        traits: AttentionTraits,
    ) -> Tensor:
        """[tokens, heads, v_dim]; `own` are the chunk's keys and values, all there are at first."""
        end = self._context + self.tokens
        k, v = own if self._context == 0 else (self._gather(keys), self._gather(values))
        plain = traits.softcap is None and traits.sinks is None
        whole = traits.chunk is None and (traits.window is None or traits.window >= end)
        if plain and whole and self._context == 0:
            out = scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=traits.scaling, enable_gqa=True
            )
            return out[0].transpose(0, 1)
        heads, kv_heads = q.shape[0], k.shape[0]
        group = heads // kv_heads
        # kv heads are the batch and a group's heads share one pair of keys and values, expanded.
        grouped = q.view(kv_heads, group, self.tokens, -1)
        k, v = (each[:, None].expand(-1, group, -1, -1) for each in (k, v))
        out = _attend(grouped, k, v, self._mask(traits, q.dtype), traits, by_group=True)
        return out.reshape(heads, self.tokens, -1).transpose(0, 1)

    def _gather(self, cached: Tensor) -> Tensor:
        """[kv_heads, context + tokens, dim] of this request."""
        pages = cached.transpose(0, 1).index_select(1, self._pages)
        return pages.view(cached.shape[1], -1, cached.shape[3])[:, : self._context + self.tokens]

    def _mask(self, traits: AttentionTraits, dtype: torch.dtype) -> Tensor:
        """[tokens, context + tokens]: 0 where the key is seen, -inf elsewhere."""
        key = (traits.window, traits.chunk, dtype)
        if key not in self._masks:
            end, device = self._context + self.tokens, self._pages.device
            queries = torch.arange(self._context, end, device=device)[:, None]
            self._masks[key] = _hidden(queries, torch.arange(end, device=device), traits, dtype)
        return self._masks[key]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    traits: AttentionTraits,
    *,
    by_group: bool = False,
) -> Tensor:
    """SDPA, or its steps one by one where scores are capped or sinks take a share.

    Args:
        q: [rows, kv_heads, group, dim]; `by_group`: [kv_heads, group, tokens, dim].
    """
    if traits.softcap is None and traits.sinks is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=traits.scaling)
    scores = ((q * traits.scaling) @ k.mT).float()
    if traits.softcap is not None:
        scores = torch.tanh(scores / traits.softcap) * traits.softcap
    scores = scores + mask
    if traits.sinks is None:
        return torch.softmax(scores, dim=-1).to(v.dtype) @ v
    shape = (q.shape[0], q.shape[1], 1, 1) if by_group else (1, q.shape[1], q.shape[2], 1)
    sinks = traits.sinks.float().view(shape).expand(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    return weights.to(v.dtype) @ v


def _hidden(queries: Tensor, keys: Tensor, traits: AttentionTraits, dtype: torch.dtype) -> Tensor:
    """[queries, keys]: 0 where a query at that position sees the key, -inf elsewhere."""
    seen = keys <= queries
    if traits.chunk is not None:
        seen &= keys >= queries.div(traits.chunk, rounding_mode="floor") * traits.chunk
    elif traits.window is not None:
        seen &= keys > queries - traits.window
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, _HIDDEN)
