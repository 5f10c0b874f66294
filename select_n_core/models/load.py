"""Loading: a Hugging Face directory becomes units and static tensors, or is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from select_n_core.config import DType
from select_n_core.errors import UnsupportedModelError
from select_n_core.models.seam import ATTENTION, LayerKV, trace
from select_n_core.units import FlatUnit, named_tensors

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
    """A model taken apart into units, still bound to the checkpoint's tensors.

    Attributes:
        module: the unmodified Hugging Face model, in eval mode.
        layers: the modules of each unit, in call order.
        units: their flat layouts, in call order.
        static: every tensor that is in no unit.
        kv: shape of each layer's keys and values, by layer index.
        dtype: of weights, activations and KV.
        max_context: positions the model was made for.
        vocab_size: width of the logits.
    """

    module: nn.Module
    layers: list[nn.Module]
    units: list[FlatUnit]
    static: FlatUnit
    kv: tuple[LayerKV, ...]
    dtype: torch.dtype
    max_context: int
    vocab_size: int

    def release_source(self) -> None:
        """Forget the checkpoint's tensors once everything was placed."""
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


def load_model(directory: Path, dtype: DType) -> LoadedModel:
    """Load a safetensors directory and take it apart.

    Weights stay memory-mapped where the checkpoint already has `dtype`.

    Raises:
        UnsupportedModelError: the architecture does not fit, with its name and the reason.
    """
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    check_architecture(config)
    module = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=ATTENTION,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return take_apart(module)


def take_apart(module: Any) -> LoadedModel:
    """Split a causal language model into units (decoder layers) and static tensors.

    Raises:
        UnsupportedModelError: the model does not fit the seams.
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
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"model type '{config.model_type}': {error}", field="source"
        ) from error
    layers = [layer_list[index] for index in traced.order]
    units, static = _split(module, layers)
    embeddings = module.get_output_embeddings() or module.get_input_embeddings()
    return LoadedModel(
        module=module,
        layers=layers,
        units=units,
        static=static,
        kv=traced.kv,
        dtype=module.dtype,
        max_context=int(config.max_position_embeddings),
        vocab_size=int(embeddings.weight.shape[0]),
    )


def _layer_list(module: nn.Module, config: PretrainedConfig) -> nn.ModuleList:
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
            return child
    raise UnsupportedModelError(
        f"model type '{config.model_type}' has no list of its "
        f"{config.num_hidden_layers} decoder layers",
        field="source",
    )


def _split(module: nn.Module, layers: list[nn.Module]) -> tuple[list[FlatUnit], FlatUnit]:
    """A tensor reached from one layer alone belongs to its unit; everything else is static."""
    reached: dict[int, set[int]] = {}
    everything = named_tensors(module)
    inside = [named_tensors(layer) for layer in layers]
    for index, tensors in enumerate(inside):
        for _, _, tensor in tensors:
            reached.setdefault(id(tensor), set()).add(index)
    owned_inside: dict[int, int] = {}
    for tensors in inside:
        for _, _, tensor in tensors:
            owned_inside[id(tensor)] = owned_inside.get(id(tensor), 0) + 1
    holders: dict[int, int] = {}
    for _, _, tensor in everything:
        holders[id(tensor)] = holders.get(id(tensor), 0) + 1

    def in_unit(tensor: Tensor) -> bool:
        key = id(tensor)
        return len(reached.get(key, ())) == 1 and holders[key] == owned_inside[key]

    units = [
        FlatUnit(f"layer{index}", [entry for entry in tensors if in_unit(entry[2])])
        for index, tensors in enumerate(inside)
    ]
    static = FlatUnit("static", [entry for entry in everything if not in_unit(entry[2])])
    return units, static
