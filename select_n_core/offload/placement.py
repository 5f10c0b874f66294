"""Where a model is put and what a step is made of: the plain facts that an executor takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from select_n_core.decisions.layout import ModelMemory
from select_n_core.kv.cache import block_bytes
from select_n_core.kv.pick import AttentionKind
from select_n_core.models.load import LoadedModel
from select_n_core.offload.graphs import Graphs


def model_memory(model: LoadedModel, block_tokens: int) -> ModelMemory:
    """The sizes that layouts and plans are made from."""
    return ModelMemory(
        static_bytes=model.static.nbytes,
        unit_bytes=tuple(unit.nbytes for unit in model.units),
        kv_block_bytes=block_bytes(model.kv, block_tokens, model.dtype),
        block_tokens=block_tokens,
    )


def compute_threads(k: int) -> int:
    """Torch threads on a CPU: one beside a link worker, all cores when nothing is streamed."""
    return 1 if k else len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model is to be put.

    Attributes:
        arena_bytes: the whole device budget for weights, KV and ring, exactly.
        k: units streamed at first. slots: of the ring.
        k_min: the least k may become; these units have no home. None is k.
        k_max: the most k may become, if as many are mirrored. None is k.
        mirrors: units mirrored at first (m), at least k. None is k.
        lease_bytes: host bytes that mirrors may take. None is what those at first take.
        threads: torch threads on a CPU device; None follows `compute_threads`.
        resident_threads: the same while nothing is streamed; None is `threads`.
        poison: fill released slots with NaN.
        attention: the implementation; None picks by device and what is installed.
        graphs: which decode steps are captured, on a GPU.
    """

    arena_bytes: int
    k: int
    slots: int = 2
    k_min: int | None = None
    k_max: int | None = None
    mirrors: int | None = None
    lease_bytes: int | None = None
    block_tokens: int = 32
    threads: int | None = None
    resident_threads: int | None = None
    poison: bool = False
    attention: AttentionKind | None = None
    graphs: Graphs = Graphs.OFF


@dataclass(frozen=True, slots=True)
class StepRow:
    """One request's part of a step: its KV blocks, what is cached, and the new tokens.

    Attributes:
        logits: whether the logits after its last new token are wanted.
    """

    blocks: Sequence[int]
    context: int
    tokens: Sequence[int]
    logits: bool = True


@dataclass(frozen=True, slots=True)
class LinkTime:
    """What the link took of some steps.

    Attributes:
        stall_s: compute waited for copies; None where the host cannot tell.
        transfer_s: median copy of the largest unit; None where no copy was used.
        copied_s: copies that were used took in all.
    """

    stall_s: float | None
    transfer_s: float | None
    copied_s: float
