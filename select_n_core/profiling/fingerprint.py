"""What a performance record is valid for: this machine, this software, this model."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from select_n_core.config import DType, LinkConfig, UnitKind
from select_n_core.models.source import model_config_hash
from select_n_core.packed import signature
from select_n_core.record import Fingerprint


def device_name(link_kind: str) -> str:
    """The GPU's name, or the CPU's where the link is emulated."""
    if link_kind == "cuda" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return _cpu_name()


def compute_cores(link_kind: str) -> int:
    """CPU cores that compute may use; 0 where a GPU computes."""
    return 0 if link_kind == "cuda" else len(os.sched_getaffinity(0))


def fingerprint(
    source: str, directory: Path, dtype: DType, link: LinkConfig, units: UnitKind = "layer"
) -> Fingerprint:
    """The fingerprint of `source` (found at `directory`) on this machine."""
    return Fingerprint(
        device=device_name(link.kind),
        threads=compute_cores(link.kind),
        torch=torch.__version__,
        transformers=transformers.__version__,
        link_kind=link.kind,
        link_bytes_per_s=link.bandwidth,
        link_latency_s=link.latency,
        model=source,
        model_hash=model_config_hash(directory),
        dtype=dtype,
        units=units,
    )


def weights_key(directory: Path, dtype: DType, units: UnitKind, device: torch.device) -> str:
    """Names the bytes that the units of this checkpoint have in memory for `device`.

    Two replicas whose keys are equal may share them, so it covers the files themselves, not only
    what the model is called.
    """
    files = sorted(path.resolve() for path in directory.glob("*.safetensors"))
    stats = [(path.name, path.stat()) for path in files]
    facts = [
        [name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns] for name, stat in stats
    ]
    versions = [version("select-n"), torch.__version__, transformers.__version__]
    layout = signature(getattr(torch, dtype), device)
    said = json.dumps([facts, model_config_hash(directory), dtype, units, layout, versions])
    return hashlib.sha256(said.encode()).hexdigest()[:24]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware_here(recorded: Fingerprint) -> Fingerprint:
    """`recorded` with this machine's hardware and software in place of its own."""
    return recorded.model_copy(
        update={
            "device": device_name(recorded.link_kind),
            "threads": compute_cores(recorded.link_kind),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    )
