"""A Hugging Face model without its weights, and for each weight what brings it when it is placed.

transformers builds the module and decides what a checkpoint's tensors become: which names they
are loaded under, what is fused, what is tied, in which type. It is given stand-ins that take no
memory; the same decisions, kept as readers, are carried out when a unit is filled.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from select_n_core.errors import UnsupportedModelError
from select_n_core.models.checkpoint import Checkpoint
from select_n_core.models.seam import ATTENTION
from select_n_core.units import Reader


class NotLazyError(Exception):
    """This checkpoint must be read whole; the text says why."""


@dataclass(slots=True)
class _Recipe:
    """How one tensor of the module, or several, come out of the checkpoint.

    Attributes:
        target: name in the module; of several, the first.
        parts: (name in the checkpoint, the converter's pattern that matched it), in the order
            that the converter expects. converter: None where there is nothing but one part.
    """

    target: str
    converter: WeightConverter | None
    parts: list[tuple[str, str]] = field(default_factory=list)


def lazy_model(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[Any, dict[int, Reader]]:
    """The module over stand-ins of zeros, and the readers of its tensors by their id.

    Tensors without a reader are real: they do not come from the checkpoint.

    Raises:
        NotLazyError: transformers would have to see the weights to decide what to do with them.
        UnsupportedModelError: config and checkpoint do not belong together.
    """
    if getattr(config, "transformers_weights", None) or getattr(config, "extra_files", None):
        raise NotLazyError("its config names weight files of its own")
    checkpoint = Checkpoint(directory)
    skeleton = _skeleton(config, dtype)
    recipes = _recipes(skeleton, checkpoint)
    _untangle_ties(skeleton, checkpoint, recipes)
    module = hollow_model(config, dtype, skeleton=skeleton, present=recipes)
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    readers: dict[int, Reader] = {}
    for name, recipe in recipes.items():
        tensor = named[name]
        _check_shape(directory, name, recipe, checkpoint, tensor)
        readers[id(tensor)] = _reader(name, recipe, checkpoint, module)
    return module, readers


def hollow_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    skeleton: Any = None,
    present: Collection[str] | None = None,
) -> Any:
    """The module of `config` with zeros that take no memory in place of its weights.

    Non-persistent buffers (rotary frequencies) are real.

    Args:
        skeleton: the module on the meta device, if there is one already.
        present: names of the state dict that a checkpoint has; None is all.

    Raises:
        UnsupportedModelError: a tensor that is not present cannot be done without.
    """
    skeleton = _skeleton(config, dtype) if skeleton is None else skeleton
    shapes: dict[str, Tensor] = skeleton.state_dict()
    names = shapes.keys() if present is None else shapes.keys() & set(present)
    zeros = _zeros(max((shapes[name].nbytes for name in names), default=0))
    module, info = type(skeleton).from_pretrained(
        None,
        config=config,
        state_dict={name: _like(zeros, shapes[name]) for name in names},
        dtype=dtype,
        attn_implementation=ATTENTION,
        output_loading_info=True,
    )
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if twice := unexpected or [name for name in missing if name in names]:
        raise NotLazyError(f"its tensor {twice[0]} is renamed twice")
    if missing:
        raise UnsupportedModelError(
            f"source: the weights lack {len(missing)} tensors of the model, the first is "
            f"{missing[0]}; download the model again",
            field="source",
        )
    return module


def _skeleton(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
        )


def _zeros(nbytes: int) -> Tensor:
    # Private and never written: every page of it is the system's one page of zeros.
    return torch.frombuffer(
        mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
        dtype=torch.uint8,
    )


def _like(zeros: Tensor, meta: Tensor) -> Tensor:
    return zeros[: meta.nbytes].view(meta.dtype).view(meta.shape)


def _recipes(skeleton: Any, checkpoint: Checkpoint) -> dict[str, _Recipe]:
    """What transformers does with each name of the checkpoint, by name in the module."""
    shapes: Mapping[str, Tensor] = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    recipes: dict[str, _Recipe] = {}
    for name in sorted(checkpoint.names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
        if target not in shapes and name in shapes:
            target, pattern = rename_source_key(name, [], [], prefix, shapes)
        if target not in shapes:
            continue  # the model has no use for it
        converter = None if pattern is None else by_pattern[pattern]
        recipe = recipes.get(target)
        if recipe is None:
            recipe = _Recipe(target, converter)
            for each in _targets(target, converter):
                recipes[each] = recipe
        elif converter is None:
            raise NotLazyError(f"{name} and {recipe.parts[0][0]} are both loaded as {target}")
        recipe.parts.append((name, name if pattern is None else pattern))
    return {name: recipe for name, recipe in recipes.items() if name in shapes}


def _targets(target: str, converter: WeightConverter | None) -> list[str]:
    if converter is None:
        return [target]
    first = converter.target_patterns[0]
    if first not in target:
        raise NotLazyError(f"the name {target} cannot be told from its pattern")
    return [target.replace(first, pattern) for pattern in converter.target_patterns]


def _untangle_ties(skeleton: Any, checkpoint: Checkpoint, recipes: dict[str, _Recipe]) -> None:
    """Tied tensors that are both in the checkpoint are one if they are equal, as by transformers.

    Stand-ins are always equal, so it cannot be left to it.
    """
    for target, source in skeleton.all_tied_weights_keys.items():
        if target not in recipes or source not in recipes:
            continue
        pair = (recipes[target], recipes[source])
        if any(recipe.converter is not None for recipe in pair) or not checkpoint.equal(
            *(recipe.parts[0][0] for recipe in pair)
        ):
            raise NotLazyError(f"{target} and {source} should be tied but differ")
        del recipes[target]


def _check_shape(
    directory: Path, name: str, recipe: _Recipe, checkpoint: Checkpoint, tensor: Tensor
) -> None:
    if recipe.converter is None and checkpoint.shape(recipe.parts[0][0]) != tuple(tensor.shape):
        raise UnsupportedModelError(
            f"source: tensor {recipe.parts[0][0]} in {directory} has shape "
            f"{list(checkpoint.shape(recipe.parts[0][0]))}, the model's {name} has "
            f"{list(tensor.shape)}; config.json and weights do not belong together",
            field="source",
        )


def _reader(name: str, recipe: _Recipe, checkpoint: Checkpoint, module: Any) -> Reader:
    if recipe.converter is None:
        source = recipe.parts[0][0]
        return lambda view: checkpoint.read(source, view)
    config = module.config

    def convert(view: Tensor) -> None:
        """One tensor of the module from several, or the other way round, at most a unit's."""
        converter = copy.deepcopy(recipe.converter)
        assert converter is not None
        # One block for all parts goes back to the system when it is freed; many small ones do not.
        sizes = [torch.Size(checkpoint.shape(part)).numel() for part, _ in recipe.parts]
        block = torch.empty(sum(sizes), dtype=view.dtype)
        for (part, pattern), flat in zip(recipe.parts, block.split(sizes), strict=True):
            tensor = flat.view(checkpoint.shape(part))
            checkpoint.read(part, tensor)
            converter.add_tensor(recipe.target, part, pattern, lambda tensor=tensor: tensor)
        del block, flat, tensor
        made = converter.convert(recipe.target, model=module, config=config)[name]
        view.copy_(made[0] if isinstance(made, list) else made)

    return convert
