"""Which attention an executor runs: picked once, by device, model and what is installed."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from select_n_core.errors import InputError
from select_n_core.kv.attention import PagedAttention, Row
from select_n_core.kv.attention_cuda import GatheredAttention, StaticDecode
from select_n_core.kv.cache import KVCache
from select_n_core.kv.flash import FlashAttention, FlashInfer, FlashStaticDecode, refusal
from select_n_core.models.seam import LayerKV, StepAttention

_LOG = logging.getLogger(__name__)
_LIBRARY = "flashinfer"
_LEAST_WIDTH = 8  # blocks


class AttentionKind(StrEnum):
    """The implementations there are."""

    PAGED = "paged"  # torch, pages as the batch: for a CPU
    GATHERED = "gathered"  # torch, pages gathered for SDPA: for a GPU
    FLASHINFER = "flashinfer"  # FlashInfer's paged kernels, from the extra `cuda`


@dataclass(frozen=True, slots=True)
class Attention:
    """What was picked.

    Attributes:
        kind: shown wherever the engine says what it runs.
        step: the context of one step's rows.
        static: decoding rows for a captured graph; (padded rows, blocks of the longest row).
    """

    kind: AttentionKind
    step: Callable[[Sequence[Row]], StepAttention]
    static: Callable[[int, int], StaticDecode]


def padded_width(blocks: int) -> int:
    """The table width of a captured graph: few sizes, so that few graphs serve all lengths."""
    return max(_LEAST_WIDTH, 1 << (blocks - 1).bit_length())


def pick_attention(
    cache: KVCache,
    kv: tuple[LayerKV, ...],
    dtype: torch.dtype,
    device: torch.device,
    wanted: AttentionKind | None = None,
) -> Attention:
    """The attention for a model's layers; `wanted` insists on one.

    Raises:
        InputError: what is wanted cannot run here.
    """
    kind = _kind(kv, dtype, device, wanted)
    if kind is AttentionKind.FLASHINFER:
        flash = FlashInfer(importlib.import_module(_LIBRARY), device)
        return Attention(
            kind,
            lambda rows: FlashAttention(flash, cache, rows, device),
            lambda rows, width: FlashStaticDecode(flash, cache, rows, width, device),
        )
    context = PagedAttention if kind is AttentionKind.PAGED else GatheredAttention
    return Attention(
        kind,
        lambda rows: context(cache, rows, device),
        lambda rows, width: StaticDecode(cache, rows, width, device),
    )


def _kind(
    kv: tuple[LayerKV, ...],
    dtype: torch.dtype,
    device: torch.device,
    wanted: AttentionKind | None,
) -> AttentionKind:
    if wanted is None and device.type == "cpu":
        return AttentionKind.PAGED
    if wanted in (AttentionKind.PAGED, AttentionKind.GATHERED):
        return wanted
    reason = _why_not_flashinfer(kv, dtype)
    if wanted is AttentionKind.FLASHINFER and reason is not None:
        raise InputError(f"attention 'flashinfer' cannot serve here: {reason}", field="attention")
    if reason is not None:
        _LOG.info("attention: gathered pages through torch's SDPA; not FlashInfer: %s", reason)
        return AttentionKind.GATHERED
    _LOG.info("attention: FlashInfer's paged kernels")
    return AttentionKind.FLASHINFER


def _why_not_flashinfer(kv: tuple[LayerKV, ...], dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec(_LIBRARY) is None:
        return "it is not installed (pip install 'select-n[cuda]')"
    return refusal(kv, dtype)
