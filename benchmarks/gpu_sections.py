"""The short sections of `benchmarks.gpu` on our own executor: parity, the link, leases."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.environment import note
from benchmarks.gpu_bench import BLOCK_TOKENS, Batch, Rig, batch, copy_seconds, spread
from benchmarks.gpu_models import Shape, tiny_config
from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.links.base import Direction
from select_n_core.links.cuda import PIECE_BYTES, CudaLink
from select_n_core.models.load import LoadedModel, take_apart
from select_n_core.offload.executor import Executor
from select_n_core.offload.graphs import Graphs
from select_n_core.offload.placement import Placement, StepRow, model_memory

PROMPTS = (17, 1, 33, 64)  # tokens of each
OUTPUT = 24
PLACEMENTS = ((0, 2), (1, 1), (1, 2), (2, 2), (3, 2), (3, 3), (6, 1), (6, 2))  # (k, d)


def parity(rig: Rig) -> dict[str, Any]:
    """Greedy tokens of a small random model in float32 against transformers' `generate`."""
    module = AutoModelForCausalLM.from_config(tiny_config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:  # large weights, so that tokens vary
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    module.eval()
    prompts = [torch.randint(2, 512, (n,), generator=generator).tolist() for n in PROMPTS]
    expected = _generated(module.to(rig.device), prompts)
    model = take_apart(module.cpu())
    runs = []
    for graphs in rig.modes:
        for k, slots in PLACEMENTS:
            found = _greedy(rig, model, prompts, k, slots, graphs)
            equal = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
            runs.append({"k": k, "d": slots, "graphs": graphs, "equal": equal})
            note(f"parity: k = {k}, d = {slots}, graphs {graphs}: {equal} of {len(prompts)} equal")
    return {
        "prompt_tokens": list(PROMPTS),
        "tokens_each": OUTPUT,
        "runs": runs,
        "all_equal": all(run["equal"] == len(prompts) for run in runs),
    }


def _generated(module: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    module.set_attn_implementation("eager")
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 0
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=module.device)
        out = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUT, do_sample=False
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def _greedy(
    rig: Rig,
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    k: int,
    slots: int,
    graphs: Graphs,
) -> list[list[int]]:
    memory = model_memory(model, BLOCK_TOKENS)
    blocks = sum(memory.blocks_of(len(prompt) + OUTPUT) for prompt in prompts)
    runtime = rig.graphs() if rig.graphs is not None and graphs is not Graphs.OFF else None
    executor = Executor(
        model,
        Placement(
            arena_bytes=arena_bytes_for(memory, k, slots, blocks) + 256,
            k=k,
            slots=slots,
            block_tokens=BLOCK_TOKENS,
            threads=1,
            graphs=graphs,
        ),
        rig.link,
        rig.device,
        graphs=runtime,
    )
    try:
        tokens = [list(prompt) for prompt in prompts]
        for index, prompt in enumerate(prompts):
            executor.blocks.reserve(str(index), len(prompt) + OUTPUT)
        for step in range(OUTPUT):
            rows = []
            for index, own in enumerate(tokens):
                cached = len(own) - 1 if step else 0
                table = executor.blocks.table(str(index))
                rows.append(StepRow(table, cached, own[cached:]))
            for own, token in zip(tokens, executor.step(rows).argmax(-1).tolist(), strict=True):
                own.append(token)
        return [own[len(prompt) :] for own, prompt in zip(tokens, prompts, strict=True)]
    finally:
        executor.close()


def link(rig: Rig, sizes: Sequence[int]) -> dict[str, Any]:
    """Copies of registered memory both ways: by size, and how registration in pieces matters."""
    points = []
    for nbytes in sorted(set(sizes)):
        for direction in Direction:
            seconds = copy_seconds(rig, nbytes, direction, rig.iterations)
            points.append(_link_point(nbytes, direction, seconds, pieces=True))
    if isinstance(rig.link, CudaLink):
        whole = CudaLink(rig.device, piece_bytes=1 << 40)
        for nbytes in sorted(size for size in set(sizes) if size > PIECE_BYTES):
            for direction in Direction:
                seconds = copy_seconds(rig, nbytes, direction, rig.iterations, whole)
                points.append(_link_point(nbytes, direction, seconds, pieces=False))
        whole.close()
    return {"points": points}


def _link_point(
    nbytes: int, direction: Direction, seconds: list[float], *, pieces: bool
) -> dict[str, Any]:
    rate = nbytes / statistics.median(seconds)
    registered = "in pieces" if pieces else "whole"
    note(f"link: {nbytes / 1e6:.2f} MB {direction}, registered {registered}: {rate / 1e9:.2f} GB/s")
    return {
        "nbytes": nbytes,
        "direction": direction.value,
        "registered": registered,
        "bytes_per_s": rate,
        **spread(seconds),
    }


def leases(rig: Rig, shape: Shape, model: LoadedModel) -> dict[str, Any]:
    """Host memory is offered, used, and revoked while a batch decodes.

    Mirrors are written and registered between steps as the lease grows; then k jumps up to what
    is mirrored, back down, and the lease is revoked. What counts is the longest iteration.
    """
    few = max(1, len(model.units) // 8)
    many = max(few + 1, len(model.units) // 2)
    with batch(rig, model, slots=2, mirrors=few) as decoding:
        executor = decoding.executor
        few_bytes, many_bytes = (executor.memory.mirrored_bytes(k) for k in (few, many))
        calm_s = {k: spread(decoding.iterations(k)) for k in (0, few)}
        executor.lease(many_bytes)
        offered_s = _tended(rig, decoding, lambda: executor.m == many)
        used_s = [decoding.iteration(many) for _ in range(4)]
        back_s = [decoding.iteration(few) for _ in range(4)]
        executor.lease(few_bytes)
        revoked_s = _tended(rig, decoding, lambda: executor.host_bytes <= few_bytes)
        found = {
            "model": shape.name,
            "mirrored": [few, many],
            "host_bytes": [few_bytes, many_bytes],
            "calm": [{"k": k, **facts} for k, facts in calm_s.items()],
            "offer": _phase(offered_s),
            "jump_up": _phase(used_s),
            "jump_down": _phase(back_s),
            "revoke": _phase(revoked_s),
        }
    note(
        f"lease: {shape.name}: {few} -> {many} mirrors in {sum(offered_s):.2f} s, longest "
        f"iteration {max(offered_s) * 1e3:.1f} ms (calm {calm_s[few]['p50_s'] * 1e3:.1f} ms); "
        f"revoked in {sum(revoked_s):.2f} s, longest {max(revoked_s) * 1e3:.1f} ms"
    )
    return found


def _tended(rig: Rig, decoding: Batch, ready: Any) -> list[float]:
    """Seconds of each iteration, its tending included, until `ready` or out of budget."""
    seconds = []
    executor = decoding.executor
    while not ready() and rig.budget.left_s > 5:
        seconds.append(decoding.iteration(executor.k, before=executor.tend))
    if not ready():
        raise TimeoutError(f"{executor.m} units are mirrored after {len(seconds)} iterations")
    return seconds


def _phase(seconds: list[float]) -> dict[str, float]:
    return {
        "iterations": len(seconds),
        "seconds": sum(seconds),
        "longest_s": max(seconds),
        "median_s": statistics.median(seconds),
    }
