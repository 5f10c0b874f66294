"""Paged attention against the formula, over ragged steps, odd shapes and dirty caches."""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from select_n_core.kv import attention
from select_n_core.kv.attention import PagedAttention, Row
from select_n_core.kv.cache import KVCache, block_bytes
from select_n_core.models.seam import AttentionTraits, LayerKV

torch.set_num_threads(1)

CPU = torch.device("cpu")


def by_formula(q: Tensor, k: Tensor, v: Tensor, traits: AttentionTraits) -> Tensor:
    """Causal attention of one whole request in float64: [heads, T, d] x3 -> [T, heads, v_dim]."""
    q, k, v = q.double(), k.double(), v.double()
    heads, length, _ = q.shape
    out = torch.empty(length, heads, v.shape[2], dtype=torch.float64)
    for head in range(heads):
        kv_head = head * k.shape[0] // heads
        for i in range(length):
            first = 0
            if traits.window is not None:
                first = max(0, i - traits.window + 1)
            if traits.chunk is not None:
                first = i - i % traits.chunk
            scores = k[kv_head, first : i + 1] @ q[head, i] * traits.scaling
            if traits.softcap is not None:
                scores = traits.softcap * torch.tanh(scores / traits.softcap)
            weights = scores.exp()
            total = weights.sum()
            if traits.sinks is not None:
                total = total + traits.sinks[head].double().exp()
            out[i, head] = weights @ v[kv_head, first : i + 1] / total
    return out


@dataclass
class Request:
    """All queries, keys and values of a request, one set per layer, and its block table."""

    pieces: list[int]
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    blocks: list[int]
    done: int = 0

    @property
    def length(self) -> int:
        return sum(self.pieces)


def _pack(parts: list[Tensor]) -> Tensor:
    """[heads, T, d], laid out token by token as a model's projections are."""
    return torch.cat([part.transpose(0, 1) for part in parts]).transpose(0, 1)


class Setting:
    """A cache over a dirty region, and requests that are served step by step."""

    def __init__(
        self,
        kv: tuple[LayerKV, ...],
        heads: int,
        block_tokens: int,
        dtype: torch.dtype = torch.float32,
        blocks: int = 40,
        seed: int = 0,
    ) -> None:
        self.kv, self.heads, self.dtype, self.size = kv, heads, dtype, block_tokens
        region = torch.full((blocks * block_bytes(kv, block_tokens, dtype),), 0xFF).byte()
        self.cache = KVCache(region, kv, block_tokens, dtype)
        self.generator = torch.Generator().manual_seed(seed)
        self.free = list(range(blocks))
        random.Random(seed).shuffle(self.free)

    def random(self, heads: int, length: int, dim: int) -> Tensor:
        return torch.randn(heads, length, dim, generator=self.generator).to(self.dtype)

    def request(self, pieces: list[int]) -> Request:
        length = sum(pieces)
        return Request(
            pieces,
            [self.random(self.heads, length, layer.k_dim) for layer in self.kv],
            [self.random(layer.kv_heads, length, layer.k_dim) for layer in self.kv],
            [self.random(layer.kv_heads, length, layer.v_dim) for layer in self.kv],
            [self.free.pop() for _ in range(-(-length // self.size))],
        )

    def follow(self, other: Request, blocks: int, pieces: list[int]) -> Request:
        """A request that goes on from the first `blocks` blocks of one that was served."""
        own, done = self.request(pieces), blocks * self.size
        for mine, others in ((own.q, other.q), (own.k, other.k), (own.v, other.v)):
            mine[:] = [
                torch.cat([theirs[:, :done], each], dim=1)
                for theirs, each in zip(others, mine, strict=True)
            ]
        own.blocks[:0] = other.blocks[:blocks]
        own.done = done
        return own

    def serve(self, requests: list[Request], traits: AttentionTraits) -> list[list[Tensor]]:
        """Outputs [length, heads, v_dim] by request and layer, from one step per piece."""
        out: list[list[list[Tensor]]] = [[[] for _ in self.kv] for _ in requests]
        for step in range(max(len(request.pieces) for request in requests)):
            active = [i for i, request in enumerate(requests) if step < len(request.pieces)]
            parts = {}
            rows = []
            for i in active:
                tokens = requests[i].pieces[step]
                parts[i] = slice(requests[i].done, requests[i].done + tokens)
                rows.append(Row(requests[i].blocks, requests[i].done, tokens))
                requests[i].done += tokens
            step_attention = PagedAttention(self.cache, rows, CPU)
            assert step_attention.positions.tolist() == [
                position for part in parts.values() for position in range(part.start, part.stop)
            ]
            for layer in range(len(self.kv)):
                packed = [
                    _pack([of(requests[i])[layer][:, parts[i]] for i in active])
                    for of in (lambda r: r.q, lambda r: r.k, lambda r: r.v)
                ]
                result = step_attention.attend(layer, *packed, traits)
                assert result.dtype == self.dtype
                for i, piece in zip(
                    active, result.split([row.tokens for row in rows]), strict=True
                ):
                    out[i][layer].append(piece)
        return [[torch.cat(pieces) for pieces in layers] for layers in out]

    def check(self, requests: list[Request], traits: AttentionTraits, atol: float = 1e-5) -> None:
        for request, layers in zip(requests, self.serve(requests, traits), strict=True):
            for layer, result in enumerate(layers):
                truth = by_formula(request.q[layer], request.k[layer], request.v[layer], traits)
                truth = truth[-len(result) :]
                torch.testing.assert_close(result.double(), truth, atol=atol, rtol=atol)


pieces = st.lists(st.one_of(st.just(1), st.integers(1, 9)), min_size=1, max_size=5)


@st.composite
def layer_shapes(draw: st.DrawFn) -> tuple[int, tuple[LayerKV, ...]]:
    groups = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (6, 2)]))
    dims = st.sampled_from([4, 6, 8])
    layers = tuple(LayerKV(groups[1], draw(dims), draw(dims)) for _ in range(2))
    return groups[0], layers


@st.composite
def all_traits(draw: st.DrawFn, heads: int) -> AttentionTraits:
    window = draw(st.none() | st.integers(1, 12))
    return AttentionTraits(
        scaling=draw(st.sampled_from([1.0, 0.35])),
        window=window,
        chunk=None if window is not None else draw(st.none() | st.integers(1, 12)),
        softcap=draw(st.none() | st.just(2.0)),
        sinks=draw(st.none() | st.just(torch.linspace(-1.0, 2.0, heads))),
    )


@given(st.data(), st.lists(pieces, min_size=1, max_size=4), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=80, deadline=None)
def test_any_ragged_steps_with_any_traits_give_what_the_formula_says(data, lengths, block_tokens):
    heads, kv = data.draw(layer_shapes())
    traits = data.draw(all_traits(heads))
    setting = Setting(kv, heads, block_tokens, blocks=200, seed=data.draw(st.integers(0, 99)))
    setting.check([setting.request(each) for each in lengths], traits)


TRAITS = {
    "plain": AttentionTraits(scaling=0.5),
    "window": AttentionTraits(scaling=0.5, window=5),
    "window of one": AttentionTraits(scaling=0.5, window=1),
    "chunk": AttentionTraits(scaling=0.5, chunk=6),
    "softcap": AttentionTraits(scaling=0.5, softcap=1.5),
    "sinks": AttentionTraits(scaling=0.5, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])),
    "all at once": AttentionTraits(0.5, window=5, softcap=1.5, sinks=torch.full((4,), 1.0)),
}
BATCHES = {
    "one prompt": [[13]],
    "prompts that end on block boundaries": [[4], [8], [16]],
    "chunks after context": [[5, 4, 7], [8, 8]],
    "decoding rows of unequal length": [[1] * 3, [9, 1, 1], [4, 1, 1, 1, 1]],
    "decoding rows of equal length": [[5, 1, 1], [5, 1, 1]],
    "decoding rows beside chunks": [[6, 1, 1, 1], [2, 5, 5], [1, 1, 6, 1]],
}


@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_grouped_heads_of_unequal_dims(lengths, traits):
    setting = Setting((LayerKV(2, 8, 6), LayerKV(2, 4, 4)), heads=4, block_tokens=4)
    setting.check([setting.request(each) for each in lengths], traits)


def check_shared_blocks(traits: AttentionTraits) -> None:
    """Rows and chunks that go on from the same blocks, in one step."""
    setting = Setting((LayerKV(2, 8, 8), LayerKV(2, 4, 4)), heads=4, block_tokens=4)
    first = setting.request([13])
    setting.check([first], traits)
    before = setting.cache._whole[first.blocks[:3]].clone()
    followers = [setting.follow(first, 3, pieces) for pieces in ([1, 1], [5, 1], [1, 6], [1])]
    setting.check(followers, traits)
    assert torch.equal(setting.cache._whole[first.blocks[:3]], before), "they are only read"


@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
def test_rows_may_share_their_first_blocks(traits):
    check_shared_blocks(traits)


@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
def test_half_precision_stays_within_its_rounding(traits):
    setting = Setting((LayerKV(2, 8, 8),), heads=4, block_tokens=4, dtype=torch.bfloat16)
    setting.check(
        [setting.request(each) for each in ([6, 1, 1, 1], [2, 5, 5], [9, 1])], traits, atol=3e-2
    )


def test_a_block_is_zeroed_behind_its_first_tokens_whatever_it_held():
    setting = Setting((LayerKV(2, 4, 6),), heads=4, block_tokens=4)
    request = setting.request([5])
    setting.serve([request], TRAITS["plain"])
    for cached in (setting.cache.keys(0), setting.cache.values(0)):
        full, begun = cached[request.blocks]
        assert full.ne(0).all()
        assert begun[:, 0].ne(0).all()
        assert begun[:, 1:].eq(0).all()


# Chunks in tiles of few tokens, rows that share no gather, and rows that all do.
CUTS = {
    "tiles of three": {"_TILE_TOKENS": 3},
    "tiles as small as scores ask": {"_TILE_SCORES": 1, "_LEAST_TILE_TOKENS": 2},
    "no padding": {"_PADDING_SHARE": 0, "_PADDING_BYTES": 0},
    "a little padding": {"_PADDING_SHARE": 0.25, "_PADDING_BYTES": 0},
    "any padding": {"_PADDING_SHARE": 100},
}


@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_how_the_work_is_cut_changes_nothing(monkeypatch, cut, traits):
    for name, value in cut.items():
        monkeypatch.setattr(attention, name, value)
    setting = Setting((LayerKV(2, 8, 6), LayerKV(2, 8, 8)), heads=4, block_tokens=4, blocks=80)
    lengths = [[1, 1, 1], [30, 1, 1], [6, 1, 11], [9, 7, 1], [29, 1, 1], [8, 8, 8]]
    setting.check([setting.request(each) for each in lengths], traits)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30, 12345.0])
@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
def test_what_an_earlier_owner_left_in_a_block_changes_nothing(traits, garbage):
    lengths = [[6, 1, 1, 1], [1] * 6, [9, 1, 4], [4, 1, 1], [1, 3]]
    clean = Setting((LayerKV(2, 8, 6),), heads=4, block_tokens=4)
    dirty = Setting((LayerKV(2, 8, 6),), heads=4, block_tokens=4)
    dirty.cache.keys(0).fill_(garbage)
    dirty.cache.values(0).fill_(garbage)
    expected = clean.serve([clean.request(each) for each in lengths], traits)
    requests = [dirty.request(each) for each in lengths]
    for answer, truth in zip(dirty.serve(requests, traits), expected, strict=True):
        assert torch.equal(answer[0], truth[0])


def test_a_request_writes_into_its_own_blocks_alone():
    setting = Setting((LayerKV(2, 8, 6), LayerKV(1, 4, 4)), heads=2, block_tokens=4)
    setting.cache.keys(0).zero_()
    setting.cache.keys(1).fill_(7.0)
    request = setting.request([6, 1, 1])
    setting.serve([request], TRAITS["plain"])
    for block in range(setting.cache.blocks):
        mine = block in request.blocks
        assert bool((setting.cache.keys(0)[block] != 0).any()) == mine
        assert bool((setting.cache.keys(1)[block] != 7.0).any()) == mine


def test_two_rows_do_not_see_each_other():
    setting = Setting((LayerKV(2, 8, 8),), heads=4, block_tokens=4)
    alone = Setting((LayerKV(2, 8, 8),), heads=4, block_tokens=4)
    first = setting.request([7, 1, 1])
    stranger = setting.request([3, 1, 6])
    twin = Request(first.pieces, first.q, first.k, first.v, first.blocks)
    together = setting.serve([first, stranger], TRAITS["plain"])[0][0]
    torch.testing.assert_close(
        together, alone.serve([twin], TRAITS["plain"])[0][0], atol=1e-6, rtol=1e-6
    )


def test_a_block_holds_all_layers_and_is_aligned():
    kv = (LayerKV(2, 8, 6), LayerKV(1, 4, 4))
    assert block_bytes(kv, 4, torch.float32) == 768  # (2*14 + 8) * 4 tokens * 4 bytes, up to 256s
    cache = Setting(kv, heads=2, block_tokens=4, blocks=3).cache
    assert cache.blocks == 3
    starts = [cache.keys(layer)[1].data_ptr() - cache.keys(0)[0].data_ptr() for layer in (0, 1)]
    assert starts == [768, 768 + 2 * 14 * 4 * 4]
