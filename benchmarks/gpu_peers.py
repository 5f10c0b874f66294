"""Peers on the same model, batch and device memory: accelerate, and FlexGen where it runs."""

from __future__ import annotations

import gc
import importlib.util
import re
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.environment import note
from benchmarks.gpu_bench import Rig
from benchmarks.gpu_models import Shape, random_module

STEPS = 4
NOT_INSTALLED = "not installed"
_FLEXGEN_RATE = re.compile(r"decode throughput: *([0-9.]+)")


def accelerate_peer(
    rig: Rig, shape: Shape, *, device_bytes: int, requests: int, context: int
) -> dict[str, Any]:
    """Decode iterations under accelerate: every weight in host memory, and split by layers.

    Args:
        device_bytes: for weights, as much as our executor gives them at the k compared with.
    """
    if importlib.util.find_spec("accelerate") is None:
        return {"peer": "accelerate", "model": shape.name, "status": NOT_INSTALLED}
    import accelerate

    module = random_module(shape)
    found: dict[str, Any] = {
        "peer": "accelerate",
        "version": accelerate.__version__,
        "model": shape.name,
        "status": "measured",
        "device_bytes": device_bytes,
    }
    accelerate.cpu_offload(module, execution_device=rig.device)
    found["cpu_offload"] = _decode(rig, module, requests, context)
    accelerate.hooks.remove_hook_from_submodules(module)
    if rig.device.type == "cuda" and rig.budget.left_s > 30:
        device_map = accelerate.infer_auto_device_map(
            module,
            max_memory={rig.device.index or 0: device_bytes, "cpu": 1 << 40},
            no_split_module_classes=module._no_split_modules,
        )
        accelerate.dispatch_model(module, device_map, main_device=rig.device)
        found["dispatch"] = _decode(rig, module, requests, context)
        found["dispatch"]["on_device"] = sum(place != "cpu" for place in device_map.values())
    for kind in ("cpu_offload", "dispatch"):
        if kind in found:
            note(f"accelerate {kind}: {shape.name}: {found[kind]['iteration_s'] * 1e3:.1f} ms")
    del module
    gc.collect()
    return found


def _decode(rig: Rig, module: Any, requests: int, context: int) -> dict[str, Any]:
    """Iterations with `context` tokens in transformers' own cache."""
    ids = torch.full((requests, context), 7, device=rig.device)
    seconds = []
    with torch.inference_mode():
        begun_s = time.perf_counter()
        out = module(ids, use_cache=True, logits_to_keep=1)
        rig.synchronize()
        prefill_s = time.perf_counter() - begun_s
        for _ in range(STEPS):
            if seconds and rig.budget.left_s < 2 * seconds[-1]:
                break
            begun_s = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            out = module(token, past_key_values=out.past_key_values, use_cache=True)
            out.logits[:, -1].argmax(-1).tolist()
            seconds.append(time.perf_counter() - begun_s)
    return {
        "prefill_s": prefill_s,
        "iteration_s": statistics.median(seconds),
        "iterations": len(seconds),
    }


def flexgen_peer(
    rig: Rig, shape: Shape, *, device_share: float, requests: int, context: int
) -> dict[str, Any]:
    """FlexGen's own benchmark on dummy weights, where it is installed and the model is an OPT.

    Args:
        device_share: of the weights that stay on the device.
    """
    found: dict[str, Any] = {"peer": "flexgen", "model": shape.name}
    if "opt" not in shape.name:
        return found | {"status": "serves OPT only"}
    if importlib.util.find_spec("flexgen") is None:
        return found | {"status": NOT_INSTALLED}
    percent = round(100 * device_share)
    command = [
        *(sys.executable, "-m", "flexgen.flex_opt", "--model", f"facebook/{shape.name}"),
        *("--path", "_DUMMY_", "--prompt-len", str(context), "--gen-len", "16"),
        *("--gpu-batch-size", str(requests), "--num-gpu-batches", "1"),
        *("--percent", str(percent), str(100 - percent), "100", "0", "100", "0"),
    ]
    limit_s = max(10.0, rig.budget.left_s - 5)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return found | {"status": f"took longer than {limit_s:.0f} s"}
    rate = _FLEXGEN_RATE.search(done.stdout)
    if done.returncode != 0 or rate is None:
        last = (done.stderr or done.stdout).strip().splitlines()
        return found | {"status": "failed", "error": last[-1] if last else "it printed nothing"}
    return found | {
        "status": "measured",
        "decode_tokens_per_s": float(rate[1]),
        "iteration_s": requests / float(rate[1]),
    }
