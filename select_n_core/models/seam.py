"""The two public seams into unmodified Hugging Face models.

*Attention*: one function registered with transformers' `AttentionInterface`. It finds the step's
context in a keyword that every supported model passes through, and hands it the new keys,
values and queries. *Weights*: the decoder layers as hookable modules, in traced call order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from select_n_core.errors import StreamingError, UnsupportedModelError

ATTENTION = "select_n"


@dataclass(frozen=True, slots=True)
class AttentionTraits:
    """What one layer's attention asks for beyond softmax(q k^T * scaling) v.

    Attributes:
        scaling: of the scores.
        window: a query sees the last `window` positions, itself among them; None is all.
        chunk: a query sees its own chunk of this many positions only (Llama 4); None is all.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: one extra logit per head [heads], in the softmax and without a value.
    """

    scaling: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class StepAttention(Protocol):
    """One step's attention: where new keys and values go and what each query sees.

    Attributes:
        positions: [tokens], of each packed token in its own request.
    """

    positions: Tensor

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, traits: AttentionTraits
    ) -> Tensor:
        """Store k, v and attend.

        Args:
            layer: index of the decoder layer.
            q: [heads, tokens, k_dim]. k: [kv_heads, tokens, k_dim]. v: [kv_heads, tokens, v_dim].

        Returns:
            [tokens, heads, v_dim].
        """
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    select_n: StepAttention | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if select_n is None:
        raise StreamingError("a model prepared for select-n was called without a step context")
    layer = int(module.layer_idx)
    traits = AttentionTraits(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=_window_of(module, layer) if sliding_window is None else sliding_window,
        chunk=_chunk_of(module, layer),
        softcap=softcap,
        sinks=s_aux,
    )
    query = _at_own_positions(module, query[0], select_n.positions)
    return select_n.attend(layer, query, key[0], value[0], traits)[None], None


def _at_own_positions(module: nn.Module, query: Tensor, positions: Tensor) -> Tensor:
    """Llama 4 tempers queries by their place in the packed input; make that their own position."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    floor_scale, attn_scale = module.floor_scale, module.attn_scale

    def temper(places: Tensor) -> Tensor:
        return torch.log1p(torch.floor((places.float() + 1.0) / floor_scale)) * attn_scale + 1.0

    packed = torch.arange(query.shape[1], device=query.device)
    return (query * (temper(positions) / temper(packed))[:, None]).to(query.dtype)


def _window_of(module: nn.Module, layer: int) -> int | None:
    """The window of a model that says so to the mask alone (Qwen2-MoE), which nobody builds."""
    return _size_of(module, layer, "sliding_attention", "sliding_window")


def _chunk_of(module: nn.Module, layer: int) -> int | None:
    return _size_of(module, layer, "chunked_attention", "attention_chunk_size")


def _size_of(module: nn.Module, layer: int, layer_type: str, size: str) -> int | None:
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types is None or types[layer] != layer_type:
        return None
    return int(getattr(config, size))


# Deliberately absent from AttentionMaskInterface: no mask is built, the context knows.
AttentionInterface.register(ATTENTION, _attention)


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Shape of one layer's keys and values per token."""

    kv_heads: int
    k_dim: int
    v_dim: int


@dataclass(slots=True)
class ChildCalls:
    """How one layer calls its child modules.

    Attributes:
        names: in call order, once per call.
        attends: position in `names` of the child that attends; None if the layer does so itself.
        nested: whether a child was called while another one ran.
    """

    names: list[str] = field(default_factory=list)
    attends: int | None = None
    nested: bool = False
    _running: int | None = None

    def enter(self, name: str) -> None:
        """The child `name` begins."""
        self.nested |= self._running is not None
        self._running = len(self.names)
        self.names.append(name)

    def leave(self) -> None:
        """The child that began last has ended."""
        self._running = None

    def attend(self) -> None:
        """Whoever runs now attends."""
        self.attends = self._running


@dataclass(frozen=True, slots=True)
class Trace:
    """What one forward showed.

    Attributes:
        order: indices into the layer list in call order.
        kv: per attention layer index.
        calls: of each layer's child modules, by index into the layer list.
    """

    order: tuple[int, ...]
    kv: tuple[LayerKV, ...]
    calls: tuple[ChildCalls, ...]


class _Recorder:
    """A step context that records shapes and attends causally without any cache."""

    def __init__(self, calls: Sequence[ChildCalls]) -> None:
        self.positions = torch.zeros(1, dtype=torch.long)
        self.kv: dict[int, LayerKV] = {}
        self._calls = calls

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, traits: AttentionTraits
    ) -> Tensor:
        self.kv[layer] = LayerKV(k.shape[0], k.shape[2], v.shape[2])
        if layer < len(self._calls):
            self._calls[layer].attend()
        group = q.shape[0] // k.shape[0]
        # One token sees only itself: its attention is its value.
        return v.repeat_interleave(group, dim=0).transpose(0, 1)


def trace(model: nn.Module, layers: nn.ModuleList) -> Trace:
    """Run one token through `model`: the layers' call order, their children's, and KV shapes.

    Raises:
        UnsupportedModelError: a layer is not called exactly once, or bypasses the attention seam.
    """
    calls: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, _a, index=index: calls.append(index))
        for index, layer in enumerate(layers)
    ]
    children = tuple(ChildCalls() for _ in layers)
    for layer, record in zip(layers, children, strict=True):
        for name, child in layer.named_children():
            handles += [
                child.register_forward_pre_hook(
                    lambda _m, _a, record=record, name=name: record.enter(name)
                ),
                child.register_forward_hook(lambda _m, _a, _o, record=record: record.leave()),
            ]
    recorder = _Recorder(children)
    try:
        with torch.inference_mode():
            model(
                input_ids=torch.zeros(1, 1, dtype=torch.long),
                position_ids=torch.zeros(1, 1, dtype=torch.long),
                use_cache=False,
                select_n=recorder,
            )
    finally:
        for handle in handles:
            handle.remove()
    if sorted(calls) != list(range(len(layers))):
        raise UnsupportedModelError(
            "its decoder layers are not each called exactly once in a forward"
        )
    if sorted(recorder.kv) != list(range(len(layers))):
        raise UnsupportedModelError("some of its layers do not attend through the attention seam")
    kv = tuple(recorder.kv[index] for index in range(len(layers)))
    return Trace(tuple(calls), kv, children)
