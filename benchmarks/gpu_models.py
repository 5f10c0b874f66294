"""Models of real shapes with random weights, which no file holds and nobody has to download.

The module is built without memory for its weights; each is written where it will live, in the
arena or in a mirror, and always with the same elements.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, OPTConfig, PretrainedConfig
from transformers.utils import logging

from select_n_core.models.lazy import hollow_model
from select_n_core.models.load import LoadedModel, take_apart
from select_n_core.units import Reader

_TILE = 4 << 20  # elements

logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's shape.

    Attributes:
        config: made when it is needed; transformers' configurations are slow to make.
        all_slots: whether d = 1 and d = 3 are measured too, beside d = 2.
    """

    name: str
    dtype: torch.dtype
    config: Callable[[], PretrainedConfig]
    all_slots: bool = False


def _llama3_8b() -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )


def _llama2_13b() -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        vocab_size=32000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def _opt_13b() -> PretrainedConfig:
    return OPTConfig(
        hidden_size=5120,
        ffn_dim=20480,
        num_hidden_layers=40,
        num_attention_heads=40,
        vocab_size=50272,
        max_position_embeddings=2048,
        word_embed_proj_dim=5120,
        do_layer_norm_before=True,
    )


def tiny_config(layers: int = 6) -> PretrainedConfig:
    """A Llama for which a CPU is fast enough."""
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )


def _tiny_opt() -> PretrainedConfig:
    return OPTConfig(
        hidden_size=128,
        ffn_dim=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=1024,
        word_embed_proj_dim=128,
    )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3-8b", torch.bfloat16, _llama3_8b, all_slots=True),
        Shape("llama-2-13b", torch.bfloat16, _llama2_13b),
        Shape("opt-13b", torch.float16, _opt_13b),
        Shape("tiny", torch.float32, tiny_config, all_slots=True),
        Shape("tiny-opt", torch.float32, _tiny_opt),
    )
}


@cache
def random_model(shape: Shape) -> LoadedModel:
    """The model, taken apart, with no byte of its weights in memory; placed as often as wanted."""
    module = hollow_model(shape.config(), shape.dtype)
    return take_apart(module, readers=_readers(module))


def random_module(shape: Shape) -> Any:
    """The same model with all its weights in host memory, as transformers would load it."""
    module = hollow_model(shape.config(), shape.dtype)
    readers = _readers(module)
    for parameter in module.parameters():
        weights = torch.empty(parameter.shape, dtype=parameter.dtype)
        readers[id(parameter)](weights)
        parameter.data = weights
    module.set_attn_implementation("sdpa")
    module.requires_grad_(False)
    return module.eval()


def _readers(module: Any) -> dict[int, Reader]:
    return {
        id(parameter): _reader(name, parameter.dim())
        for name, parameter in module.named_parameters()
    }


def _reader(name: str, dims: int) -> Reader:
    constant = 1.0 if name.endswith("weight") else 0.0

    def write(view: Tensor) -> None:
        if dims == 1:  # norms and biases
            view.fill_(constant)
            return
        tile = _tile(view.dtype, view.device)
        flat = view.view(-1)
        start = zlib.crc32(name.encode()) % (_TILE // 2)  # not the same weights everywhere
        done = 0
        while done < flat.numel():
            count = min(flat.numel() - done, _TILE - start)
            flat[done : done + count].copy_(tile[start : start + count])
            done, start = done + count, 0

    return write


@cache
def _tile(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal elements, the same on every device: copying them is far faster than drawing them."""
    drawn = torch.randn(_TILE, generator=torch.Generator().manual_seed(0)) * 0.02
    return drawn.to(dtype).to(device)
