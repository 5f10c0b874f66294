"""Loading: a Hugging Face directory becomes units and static tensors, or is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from select_n_core.config import DType, UnitKind
from select_n_core.errors import UnsupportedModelError
from select_n_core.models.lazy import NotLazyError, lazy_model
from select_n_core.models.parts import Run, runs_of, split
from select_n_core.models.seam import ATTENTION, LayerKV, trace
from select_n_core.units import FlatUnit, Reader

_log = logging.getLogger(__name__)

# Each has a contract test: tokens equal transformers' own, resident and at every interval.
ARCHITECTURES = frozenset(
    {
        "cohere",
        "deepseek_v3",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "llama4_text",
        "mistral",
        "mixtral",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)
# Their frequencies follow the longest row of a packed batch, so rows would disturb each other.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(slots=True)
class LoadedModel:
    """A model taken apart into units, which can be filled until their source is released.

    Attributes:
        module: the unmodified Hugging Face model, in eval mode.
        layers: the decoder layers, in call order.
        runs: the modules of each unit, in call order.
        units: their flat layouts, in call order.
        static: every tensor that is in no unit.
        kv: shape of each layer's keys and values, by layer index.
        dtype: of weights, activations and KV.
        max_context: positions the model was made for.
        vocab_size: width of the logits.
    """

    module: nn.Module
    layers: list[nn.Module]
    runs: list[Run]
    units: list[FlatUnit]
    static: FlatUnit
    kv: tuple[LayerKV, ...]
    dtype: torch.dtype
    max_context: int
    vocab_size: int

    def release_source(self) -> None:
        """Forget the checkpoint once everything was placed."""
        for unit in [*self.units, self.static]:
            unit.release_source()


def check_architecture(config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError, naming model and reason, unless it fits the seams."""
    name = config.model_type
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model type '{name}' is not supported: it has no contract test against transformers; "
            f"supported are {', '.join(sorted(ARCHITECTURES))}",
            field="source",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"model type '{name}' is quantised; give the unquantised safetensors checkpoint",
            field="source",
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(
            f"model type '{name}' with use_bidirectional_attention is not supported: "
            "only causal models generate",
            field="source",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    # Gemma 3 keeps one set of parameters per layer type.
    variants = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for variant in variants:
        kind = variant.get("rope_type")
        if kind in _BATCH_DEPENDENT_ROPE:
            raise UnsupportedModelError(
                f"model type '{name}' with rope_type '{kind}' is not supported: its frequencies "
                "depend on the longest request in the batch",
                field="source",
            )


def load_model(directory: Path, dtype: DType, units: UnitKind = "layer") -> LoadedModel:
    """Load a safetensors directory and take it apart.

    No weight is in memory afterwards: each is read from the checkpoint when a unit is filled,
    straight to where it will live. Where transformers cannot say what becomes of a weight
    without looking at it, the model is read whole first, and a warning says so.

    Raises:
        UnsupportedModelError: the architecture does not fit, with its name and the reason, or
            the checkpoint is damaged.
    """
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    check_architecture(config)
    readers: dict[int, Reader] = {}
    try:
        module, readers = lazy_model(directory, config, getattr(torch, dtype))
    except NotLazyError as reason:
        _log.warning(
            "the weights in %s are read whole before they are placed, which takes host memory "
            "twice for a while: %s",
            directory,
            reason,
        )
        module = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    return take_apart(module, units, readers)


def take_apart(
    module: Any, units: UnitKind = "layer", readers: Mapping[int, Reader] | None = None
) -> LoadedModel:
    """Split a causal language model into units and static tensors.

    Args:
        units: whether a decoder layer is one unit or two.
        readers: by the id of each tensor that is a stand-in, what brings its elements; the
            stand-ins are forgotten.

    Raises:
        UnsupportedModelError: the model does not fit the seams, or its layers cannot be cut.
    """
    config: PretrainedConfig = module.config
    check_architecture(config)
    if not getattr(module, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"model type '{config.model_type}' does not take registered attention functions",
            field="source",
        )
    module.set_attn_implementation(ATTENTION)
    module.eval()
    module.requires_grad_(False)
    layer_list = _layer_list(module, config)
    try:
        traced = trace(module, layer_list)
        layers = [layer_list[index] for index in traced.order]
        runs = runs_of(layers, [traced.calls[index] for index in traced.order], units)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"model type '{config.model_type}': {error}", field=error.field or "source"
        ) from error
    flat, static = split(module, runs, readers or {})
    embeddings = module.get_output_embeddings() or module.get_input_embeddings()
    model = LoadedModel(
        module=module,
        layers=layers,
        runs=runs,
        units=flat,
        static=static,
        kv=traced.kv,
        dtype=module.dtype,
        max_context=int(config.max_position_embeddings),
        vocab_size=int(embeddings.weight.shape[0]),
    )
    if readers:
        for unit in [*flat, static]:
            unit.unbind()
    return model


def _layer_list(module: nn.Module, config: PretrainedConfig) -> nn.ModuleList:
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
            return child
    raise UnsupportedModelError(
        f"model type '{config.model_type}' has no list of its "
        f"{config.num_hidden_layers} decoder layers",
        field="source",
    )
