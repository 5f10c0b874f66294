"""Attention of one step over the paged cache on a CPU, in torch's public operators.

Decoding rows of about the same length gather their pages once into dense keys and values, head by
head, so that one product gives all their scores and one more their outputs. Prompt chunks attend
request by request, some queries at a time: scores stay small enough for the cache, and keys that
none of these queries sees are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from select_n_core.kv.cache import KVCache
from select_n_core.models.seam import AttentionTraits

Position = TypeVar("Position", int, Tensor)

_HIDDEN = float("-inf")
# Queries of a chunk that attend at once, and how many scores they may make (4 MiB of float32).
_TILE_TOKENS = 128
_TILE_SCORES = 1 << 20
_LEAST_TILE_TOKENS = 16
# Rows share a gather while padding adds a quarter of their pages at most, or so few bytes that
# copying them costs no more than the operators of one more group.
_PADDING_SHARE = 0.25
_PADDING_BYTES = 1 << 20


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
        self._decodes = [_Decode(alike, size, device) for alike in _alike(decoding, cache)]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, traits: AttentionTraits
    ) -> Tensor:
        """See `StepAttention.attend`."""
        keys, values = self._cache.keys(layer), self._cache.values(layer)
        keys[self._blocks, :, self._offsets] = k.transpose(0, 1)
        values[self._blocks, :, self._offsets] = v.transpose(0, 1)
        if len(self._decodes) == 1 and not self._chunks:
            return self._decodes[0].attend(q, keys, values, traits)
        out = torch.empty(q.shape[1], q.shape[0], v.shape[2], dtype=q.dtype, device=q.device)
        for decode in self._decodes:
            rows = decode.starts
            out[rows] = decode.attend(q[:, rows], keys, values, traits)
        for chunk in self._chunks:
            part = slice(chunk.start, chunk.start + chunk.tokens)
            own = (k[:, part], v[:, part])
            chunk.attend(q[:, part], own, (keys, values), traits, out[part])
        return out


def _alike(rows: Sequence[tuple[int, Row]], cache: KVCache) -> Iterator[list[tuple[int, Row]]]:
    """Decoding rows in groups of about the same length, each in the rows' order."""
    pages = {start: row.context // cache.block_tokens + 1 for start, row in rows}
    spare = _PADDING_BYTES // (cache.keys(0)[0].nbytes + cache.values(0)[0].nbytes)
    group: list[tuple[int, Row]] = []
    width = used = 0  # pages of the group's longest row, and of all its rows
    for start, row in sorted(rows, key=lambda each: -pages[each[0]]):
        count = pages[start]
        padding = (len(group) + 1) * width - used - count
        if group and padding > max(spare, _PADDING_SHARE * (used + count)):
            yield sorted(group, key=lambda each: each[0])
            group, used = [], 0
        if not group:
            width = count
        group.append((start, row))
        used += count
    if group:
        yield sorted(group, key=lambda each: each[0])


class _Decode:
    """Rows with one new token each, of about the same length."""

    def __init__(
        self, rows: Sequence[tuple[int, Row]], block_tokens: int, device: torch.device
    ) -> None:
        tables = [row.blocks[: row.context // block_tokens + 1] for _, row in rows]
        width = max(map(len, tables))
        # A short row is padded with its own first block: written for sure, and masked.
        padded = [[*table, *[table[0]] * (width - len(table))] for table in tables]
        self.starts = torch.tensor([start for start, _ in rows], device=device)
        self._pages = torch.tensor(padded, device=device).flatten()
        self._last = torch.tensor([row.context for _, row in rows], device=device)
        self._grid = torch.arange(width * block_tokens, device=device)
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}
        self._places: dict[tuple[int, int], Tensor] = {}
        self._gathered: dict[tuple[int, ...], Tensor] = {}

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, traits: AttentionTraits) -> Tensor:
        """[rows, heads, v_dim] of q [heads, rows, k_dim] over the cache's views."""
        heads, rows, k_dim = q.shape
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        queries = q.view(kv_heads, group, rows, k_dim).transpose(1, 2)
        queries = queries.reshape(kv_heads * rows, group, k_dim)
        scores = torch.bmm(queries, self._gather(keys).mT)
        scores = scores.view(kv_heads, rows, group, -1)
        weights = _softmax(scores, self._mask(traits), traits, (kv_heads, 1, group))
        weights = weights.view(kv_heads * rows, group, -1).to(q.dtype)
        out = torch.bmm(weights, self._gather(values)).view(kv_heads, rows, group, -1)
        return out.transpose(0, 1).reshape(rows, heads, -1)

    def _mask(self, traits: AttentionTraits) -> Tensor:
        """[rows, 1, keys]: 0 where the key is seen, -inf elsewhere."""
        key = (traits.window, traits.chunk)
        if key not in self._masks:
            self._masks[key] = _mask(self._last[:, None], self._grid, traits)[:, None]
        return self._masks[key]

    def _gather(self, cached: Tensor) -> Tensor:
        """[kv_heads * rows, keys, dim] of the cache's [blocks, kv_heads, size, dim].

        The next gather of this shape overwrites it: fresh memory of this size costs page faults.
        """
        blocks, kv_heads, size, dim = cached.shape
        shape = (kv_heads, len(self._pages), size, dim)
        if shape not in self._gathered:
            self._gathered[shape] = cached.new_empty(shape)
        out = self._gathered[shape]
        stride, page = cached.stride(0), size * dim
        if stride % page:
            torch.index_select(cached.transpose(0, 1), 1, self._pages, out=out)
        else:
            # The same pages as rows of a matrix, which are copied a third faster.
            every = stride // page
            if (kv_heads, every) not in self._places:
                head = torch.arange(kv_heads, device=cached.device)[:, None]
                self._places[kv_heads, every] = (self._pages * every + head).flatten()
            matrix = cached.as_strided(((blocks - 1) * every + kv_heads, page), (page, 1))
            places = self._places[kv_heads, every]
            torch.index_select(matrix, 0, places, out=out.view(len(places), page))
        return out.view(kv_heads * len(self._last), -1, dim)


class _Chunk:
    """One request's prompt chunk of two or more tokens."""

    def __init__(self, start: int, row: Row, block_tokens: int, device: torch.device) -> None:
        self.start = start
        self.tokens = row.tokens
        self._context = row.context
        self._device = device
        pages = -(-(row.context + row.tokens) // block_tokens)
        self._pages = torch.tensor(list(row.blocks[:pages]), device=device)
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self,
        q: Tensor,
        own: tuple[Tensor, Tensor],
        cached: tuple[Tensor, Tensor],
        traits: AttentionTraits,
        out: Tensor,
    ) -> None:
        """Fill `out` [tokens, heads, v_dim]; `own` are the chunk's keys and values."""
        k, v = own if self._context == 0 else (self._gather(cached[0]), self._gather(cached[1]))
        heads, kv_heads, v_dim = q.shape[0], k.shape[0], v.shape[2]
        group = heads // kv_heads
        most = _TILE_SCORES // (heads * k.shape[1])
        tile = min(_TILE_TOKENS, max(_LEAST_TILE_TOKENS, most))
        for begin in range(0, self.tokens, tile):
            tokens = min(tile, self.tokens - begin)
            start, end = self._context + begin, self._context + begin + tokens
            first = max(0, _lowest(start, traits))
            queries = q[:, begin : begin + tokens].reshape(kv_heads, group * tokens, -1)
            scores = torch.bmm(queries, k[:, first:end].mT).view(kv_heads, group, tokens, -1)
            mask = self._mask(range(start, end), range(first, end), traits)
            weights = _softmax(scores, mask, traits, (kv_heads, group, 1)).to(q.dtype)
            part = torch.bmm(weights.view(kv_heads, group * tokens, -1), v[:, first:end])
            out[begin : begin + tokens] = part.view(heads, tokens, v_dim).transpose(0, 1)

    def _mask(self, queries: range, keys: range, traits: AttentionTraits) -> Tensor:
        """[queries, keys]; both end at the same position."""
        if traits.chunk is not None:
            return self._mask_over(queries, keys, traits)
        # The others depend on distance alone: one mask, aligned at its end, serves every tile.
        if traits.window not in self._masks:
            end = self._context + self.tokens
            widest = range(end - min(_TILE_TOKENS, self.tokens), end)
            seen = range(max(0, _lowest(widest.start, traits)), end)
            self._masks[traits.window] = self._mask_over(widest, seen, traits)
        return self._masks[traits.window][-len(queries) :, -len(keys) :]

    def _mask_over(self, queries: range, keys: range, traits: AttentionTraits) -> Tensor:
        at = torch.arange(queries.start, queries.stop, device=self._device)[:, None]
        return _mask(at, torch.arange(keys.start, keys.stop, device=self._device), traits)

    def _gather(self, cached: Tensor) -> Tensor:
        """[kv_heads, context + tokens, dim] of this request."""
        pages = cached.index_select(0, self._pages).transpose(0, 1)
        return pages.reshape(cached.shape[1], -1, cached.shape[3])[:, : self._context + self.tokens]


def _lowest(query: Position, traits: AttentionTraits) -> Position:
    """The lowest position a query sees; below 0 where it sees all."""
    if traits.chunk is not None:
        return query // traits.chunk * traits.chunk
    if traits.window is not None:
        return query - (traits.window - 1)
    return query * 0


def _mask(queries: Tensor, grid: Tensor, traits: AttentionTraits) -> Tensor:
    """[queries, keys] in float32: 0 where the key is seen, -inf elsewhere."""
    seen = (grid <= queries) & (grid >= _lowest(queries, traits))
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, _HIDDEN)


def _softmax(
    scores: Tensor, mask: Tensor, traits: AttentionTraits, heads: tuple[int, int, int]
) -> Tensor:
    """Weights over the last dimension in float32, of raw scores, scaled, capped and with sinks.

    Args:
        heads: how the sinks' heads lie over the scores' first three dimensions.
    """
    if traits.softcap is None:
        scores = torch.add(mask, scores, alpha=traits.scaling)
    else:
        capped = torch.tanh(scores.float() * (traits.scaling / traits.softcap))
        scores = torch.add(mask, capped, alpha=traits.softcap)
    if traits.sinks is None:
        return torch.softmax(scores, dim=-1)
    sinks = traits.sinks.float().view(*heads, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
