"""What a run should come to before it is measured: bytes over bandwidth, and launches.

Also the facts of the machine that the figures depend on.
"""

from __future__ import annotations

import csv
import io
import shutil
import statistics
import subprocess
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from benchmarks.gpu_bench import BLOCK_TOKENS, Rig, batch, copy_seconds
from benchmarks.gpu_models import Shape, random_model
from select_n_core.kv.pick import AttentionKind
from select_n_core.links.base import Direction
from select_n_core.models.load import take_apart
from select_n_core.offload.placement import model_memory

_NVIDIA_SMI = (
    "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.gen.current,"
    "pcie.link.width.max,pcie.link.width.current,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
)


_LAUNCH_S = 5e-6  # of a kernel from Python, roughly


def floor(
    rig: Rig, shapes: list[Shape], nbytes: int, requests: int, context: int
) -> dict[str, Any]:
    """The least times to be expected, from two bandwidths measured now and from sizes.

    Args:
        nbytes: of the copies that measure the bandwidths.
        requests, context: of the decoding batch.
    """
    device_rate = device_bytes_per_s(rig, nbytes)
    link_rate = nbytes / statistics.median(copy_seconds(rig, nbytes, Direction.TO_DEVICE, 5))
    models = []
    for shape in shapes:
        memory = model_memory(random_model(shape), BLOCK_TOKENS)
        weights = memory.static_bytes + sum(memory.unit_bytes)
        kv = requests * memory.blocks_of(context + 1) * memory.kv_block_bytes
        per_layer, outside = launches(rig, shape)
        models.append(
            {
                "model": shape.name,
                "weight_bytes": weights,
                "unit_bytes": memory.slot_bytes,
                "kv_bytes": kv,
                "compute_s": (weights + kv) / device_rate,
                "unit_transfer_s": memory.slot_bytes / link_rate,
                "launches_per_layer": per_layer,
                "launches_outside": outside,
                "launch_s": (memory.units * per_layer + outside) * _LAUNCH_S,
            }
        )
    return {"device_bytes_per_s": device_rate, "link_bytes_per_s": link_rate, "models": models}


def floor_lines(found: dict[str, Any]) -> list[str]:
    """The floor for people."""
    return [
        f"floor: device {found['device_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"link {found['link_bytes_per_s'] / 1e9:.1f} GB/s",
        *(
            f"floor: {model['model']}: {model['weight_bytes'] / 1e9:.2f} GB of weights and "
            f"{model['kv_bytes'] / 1e9:.2f} GB of KV an iteration, "
            f"{model['compute_s'] * 1e3:.2f} ms; "
            f"about {model['launches_per_layer']} launches a layer, "
            f"{model['launch_s'] * 1e3:.1f} ms from Python in all; a unit of "
            f"{model['unit_bytes'] / 1e6:.1f} MB crosses in {model['unit_transfer_s'] * 1e3:.2f} ms"
            for model in found["models"]
        ),
    ]


class _Launches(TorchDispatchMode):
    """Counts operators that make a new tensor or write one: about one kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {_storage(each) for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        writes = func._schema.is_mutable
        made = any(
            _storage(each) not in inputs for each in tree_leaves(out) if torch.is_tensor(each)
        )
        self.count += bool(writes or made)
        return out


def launches(rig: Rig, shape: Shape) -> tuple[int, int]:
    """(per layer, outside the layers): operators of a decode step, from two small models."""
    counts = []
    for layers in (1, 2):
        config = shape.config()
        for name, value in _SMALL.items():
            if hasattr(config, name):
                setattr(config, name, value)
        config.num_hidden_layers = layers
        model = take_apart(AutoModelForCausalLM.from_config(config))
        cpu = Rig(rig.link, torch.device("cpu"), 1, rig.budget)
        with batch(
            cpu, model, slots=1, requests=2, context=8, mirrors=0, attention=AttentionKind.GATHERED
        ) as decoding:
            with _Launches() as counted:
                decoding.logits()
            counts.append(counted.count)
    return counts[1] - counts[0], 2 * counts[0] - counts[1]


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "word_embed_proj_dim": 64,
    "vocab_size": 64,
}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def device_bytes_per_s(rig: Rig, nbytes: int) -> float:
    """Bytes read plus bytes written per second by a copy within the device."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=rig.device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        rig.synchronize()
        begun_s = time.perf_counter()
        target.copy_(source)
        rig.synchronize()
        seconds.append(time.perf_counter() - begun_s)
    return 2 * nbytes / statistics.median(seconds)


def gpu_facts() -> dict[str, str] | None:
    """What nvidia-smi tells of the first GPU; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if done.returncode != 0:
        return {"error": (done.stderr or done.stdout).strip()[:200]}
    rows = list(csv.DictReader(io.StringIO(done.stdout), skipinitialspace=True))
    return rows[0] if rows else None
