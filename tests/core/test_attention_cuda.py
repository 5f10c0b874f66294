"""The GPU's attention against the formula, on the CPU: torch's own, and FlashInfer's contract."""

import sys
from types import ModuleType
from unittest.mock import patch

import fake_flashinfer
import pytest
import test_kv_attention
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_attention import (
    CPU,
    Setting,
    all_traits,
    by_formula,
    check_shared_blocks,
    layer_shapes,
    pieces,
)

from select_n_core.errors import InputError
from select_n_core.kv.attention import PagedAttention, Row
from select_n_core.kv.attention_cuda import GatheredAttention, StaticDecode
from select_n_core.kv.cache import KVCache, block_bytes
from select_n_core.kv.flash import FlashAttention, FlashInfer, FlashStaticDecode
from select_n_core.kv.pick import AttentionKind, padded_width, pick_attention
from select_n_core.models.seam import AttentionTraits, LayerKV

torch.set_num_threads(1)


def with_attention(make):
    """Let the shared setting serve with another implementation."""
    return patch.object(test_kv_attention, "PagedAttention", make)


def flash() -> FlashInfer:
    with patch("select_n_core.kv.flash.WORKSPACE_BYTES", 1024):
        return FlashInfer(fake_flashinfer, CPU)


def flash_attention(cache, rows, device):
    return FlashAttention(flash(), cache, rows, device)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_gathered_pages_attend_as_the_formula_says(data):
    heads, kv = data.draw(layer_shapes())
    traits = data.draw(all_traits(heads))
    setting = Setting(kv, heads, data.draw(st.sampled_from([1, 3, 8])), blocks=200)
    requests = [setting.request(own) for own in data.draw(st.lists(pieces, min_size=1, max_size=4))]
    with with_attention(GatheredAttention):
        setting.check(requests, traits)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_flashinfer_is_planned_and_run_as_the_formula_says(data):
    heads, kv = data.draw(layer_shapes())
    kv = tuple(LayerKV(layer.kv_heads, layer.k_dim, layer.k_dim) for layer in kv)
    traits = data.draw(all_traits(heads))
    setting = Setting(kv, heads, data.draw(st.sampled_from([1, 3, 8])), blocks=200)
    requests = [setting.request(own) for own in data.draw(st.lists(pieces, min_size=1, max_size=4))]
    with with_attention(flash_attention):
        setting.check(requests, traits)


@pytest.mark.parametrize("make", [GatheredAttention, flash_attention])
@pytest.mark.parametrize("traits", test_kv_attention.TRAITS.values(), ids=test_kv_attention.TRAITS)
def test_rows_may_share_their_first_blocks(make, traits):
    with with_attention(make):
        check_shared_blocks(traits)


class Decoding:
    """A dirty cache with some rows' context in it, and one new token for each.

    Args:
        shared: first blocks that all rows have in common.
    """

    def __init__(self, contexts: list[int], cache: KVCache, seed: int = 0, shared: int = 0) -> None:
        self.cache, size, heads = cache, cache.block_tokens, 4
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(cache.blocks, generator=generator).tolist()
        self.rows, self.truths, self.new = [], [], []
        for context in contexts:
            blocks = [order.pop() for _ in range(context // size + 1)]
            q, k, v = (torch.randn(n, context + 1, 8, generator=generator) for n in (heads, 2, 2))
            if self.rows and shared:
                blocks[:shared] = self.rows[0].blocks[:shared]
                for mine, first in zip((q, k, v), self.truths[0], strict=True):
                    mine[:, : shared * size] = first[:, : shared * size]
            self.rows.append(Row(blocks, context, 1))
            self.truths.append((q, k, v))
            if context:
                before = PagedAttention(self.cache, [Row(blocks, 0, context)], CPU)
                before.attend(
                    0, q[:, :context], k[:, :context], v[:, :context], AttentionTraits(1.0)
                )
        self.tokens = list(range(len(contexts)))

    def packed(self, rows: int) -> list[torch.Tensor]:
        """q, k, v of the new tokens, [heads, rows, 8], filled up with the last row."""
        padded = [*self.truths, *[self.truths[-1]] * (rows - len(self.truths))]
        return [torch.stack([each[part][:, -1] for each in padded], dim=1) for part in range(3)]

    def check(self, out: torch.Tensor, traits: AttentionTraits) -> None:
        for row, (q, k, v) in zip(out, self.truths, strict=False):
            truth = by_formula(q, k, v, traits)[-1]
            torch.testing.assert_close(row.double(), truth, atol=1e-5, rtol=1e-5)


def dirty_cache() -> KVCache:
    kv = (LayerKV(2, 8, 8),)
    region = torch.full((64 * block_bytes(kv, 4, torch.float32),), 0xFF).byte()
    return KVCache(region, kv, 4, torch.float32)


TRAITS = {
    "plain": AttentionTraits(0.35),
    "window": AttentionTraits(0.35, window=5),
    "softcap": AttentionTraits(0.35, softcap=2.0),
    "sinks": AttentionTraits(0.35, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "chunk": AttentionTraits(0.35, chunk=3),
}


@pytest.mark.parametrize("make", [StaticDecode, FlashStaticDecode])
@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS.keys())
def test_static_rows_serve_one_batch_after_another_from_the_same_place(make, traits):
    cache = dirty_cache()
    static = _static(make, cache, rows=4, width=8)
    for contexts in ([9, 0, 4], [3, 17, 8, 1], [12]):
        setting = Decoding(contexts, cache, seed=len(contexts))
        static.load(setting.tokens, setting.rows)
        static.begin()
        assert static.positions.tolist()[: len(setting.rows)] == [r.context for r in setting.rows]
        out = static.attend(0, *setting.packed(4), traits)
        setting.check(out, traits)


@pytest.mark.parametrize("make", [StaticDecode, FlashStaticDecode])
def test_static_rows_may_share_their_first_blocks(make):
    cache = dirty_cache()
    static = _static(make, cache, rows=4, width=8)
    setting = Decoding([9, 8, 14], cache, shared=2)
    static.load(setting.tokens, setting.rows)
    static.begin()
    out = static.attend(0, *setting.packed(4), TRAITS["plain"])
    setting.check(out, TRAITS["plain"])


def test_rows_that_fill_up_a_batch_write_nothing_of_their_own():
    setting = Decoding([5, 2], dirty_cache())
    before = setting.cache._whole.clone()
    static = StaticDecode(setting.cache, 4, 8, CPU)
    static.load(setting.tokens, setting.rows)
    static.attend(0, *setting.packed(4), TRAITS["plain"])
    changed = (setting.cache._whole.view(torch.int32) != before.view(torch.int32)).any(dim=1)
    assert set(changed.nonzero()[:, 0].tolist()) <= {row.blocks[-1] for row in setting.rows}


def _static(make, cache, rows, width):
    if make is FlashStaticDecode:
        return FlashStaticDecode(flash(), cache, rows, width, CPU)
    return make(cache, rows, width, CPU)


def test_table_widths_come_in_few_sizes():
    assert [padded_width(n) for n in (1, 8, 9, 16, 17, 100)] == [8, 8, 16, 16, 32, 128]


@pytest.fixture
def cache() -> KVCache:
    kv = (LayerKV(2, 64, 64),)
    return KVCache(
        torch.zeros(2 * block_bytes(kv, 4, torch.bfloat16)).byte(), kv, 4, torch.bfloat16
    )


GPU = torch.device("cuda", 0)
LAYERS = (LayerKV(2, 64, 64),)


def test_a_cpu_keeps_its_own_attention(cache):
    assert pick_attention(cache, LAYERS, torch.bfloat16, CPU).kind is AttentionKind.PAGED


def test_a_gpu_gathers_where_flashinfer_is_not_installed(cache, caplog):
    caplog.set_level("INFO")
    with patch("importlib.util.find_spec", return_value=None):
        picked = pick_attention(cache, LAYERS, torch.bfloat16, GPU)
    assert picked.kind is AttentionKind.GATHERED
    assert "select-n[cuda]" in caplog.text


def installed() -> dict[str, ModuleType]:
    fake_flashinfer.__spec__ = ModuleType("flashinfer").__spec__
    return {"flashinfer": fake_flashinfer}


@pytest.mark.parametrize(
    ("layers", "dtype", "reason"),
    [
        (LAYERS, torch.float32, "float32"),
        ((LayerKV(2, 192, 128),), torch.bfloat16, "192 dimensions and values 128"),
        ((LayerKV(2, 80, 80),), torch.bfloat16, "80 dimensions"),
    ],
)
def test_flashinfer_is_refused_by_name_where_it_has_no_kernels(cache, layers, dtype, reason):
    with patch("importlib.util.find_spec", return_value=object()):
        assert pick_attention(cache, layers, dtype, GPU).kind is AttentionKind.GATHERED
        with pytest.raises(InputError, match=reason):
            pick_attention(cache, layers, dtype, GPU, AttentionKind.FLASHINFER)


def test_flashinfer_serves_where_it_is_installed_and_can(cache):
    with (
        patch("importlib.util.find_spec", return_value=object()),
        patch.dict(sys.modules, installed()),
        patch("select_n_core.kv.flash.WORKSPACE_BYTES", 1024),
    ):
        picked = pick_attention(cache, LAYERS, torch.bfloat16, CPU, AttentionKind.FLASHINFER)
    assert picked.kind is AttentionKind.FLASHINFER
    assert isinstance(picked.step([Row([0], 0, 2)]), FlashAttention)
    assert isinstance(picked.static(2, 8), FlashStaticDecode)
