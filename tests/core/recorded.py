"""Performance records made up from a few numbers, and configurations that are paced by them."""

from pathlib import Path
from typing import Any

from select_n_core.config import ModelConfig
from select_n_core.record import (
    ColdSample,
    Fingerprint,
    ModeRecord,
    PerformanceRecord,
    TransferSample,
)

UNIT_BYTES = 1 << 16
KV_BYTES_PER_TOKEN = 512


def mode(
    unit_s: float,
    outside_s: float = 0.0,
    cold: ColdSample | None = None,
    grid: tuple[tuple[int, float], ...] | None = None,
    **slopes: float,
) -> ModeRecord:
    facts = {"per_context_token_s": 0.0, "per_pair_s": 0.0, "outside_per_row_s": 0.0} | slopes
    return ModeRecord(
        threads=1,
        samples=(),
        cold=cold,
        token_grid=grid or ((1, unit_s),),
        outside_s=outside_s,
        fit_error=0.0,
        **facts,
    )


def record(
    units: int = 6,
    unit_s: float = 1e-4,
    outside_s: float = 1e-4,
    transfer_s: float = 1e-4,
    *,
    unit_bytes: int = UNIT_BYTES,
    streaming: ModeRecord | None = None,
    resident: ModeRecord | None = None,
    **changes: Any,
) -> PerformanceRecord:
    """Of a device that nobody has: `units` units, each computed in `unit_s`, copied in
    `transfer_s`."""
    facts = {
        "fingerprint": Fingerprint(
            device="a device far away",
            threads=0,
            torch="none",
            transformers="none",
            link_kind="emulated",
            link_bytes_per_s=unit_bytes / transfer_s,
            link_latency_s=0.0,
            model="nobody/nothing",
            model_hash="0" * 64,
            dtype="bfloat16",
        ),
        "static_bytes": 1024,
        "unit_bytes": (unit_bytes,) * units,
        "kv_bytes_per_token": KV_BYTES_PER_TOKEN,
        "max_context": 4096,
        "transfers": (TransferSample(direction="h2d", nbytes=unit_bytes, seconds=(transfer_s,)),),
        "transfer_s": transfer_s,
        "streaming": streaming or mode(unit_s, outside_s),
        "resident": resident,
        "seconds": 1.0,
    }
    return PerformanceRecord(**(facts | changes))


def paced_config(path: Path, made: PerformanceRecord, **changes: Any) -> ModelConfig:
    """A configuration paced by `made`, which is saved at `path`; six of its units do not fit."""
    made.save(path)
    facts = {
        "name": "far",
        "source": "nobody/nothing",
        "device_memory": "512KiB",
        "host_memory": "1MiB",
        "link": {"kind": "emulated", "bandwidth": max(made.unit_bytes) / made.transfer_s},
        "slo": {"tpot": "5s", "ttft": "30s"},
        "compute": {"kind": "paced", "record": str(path)},
        "max_batch": 4,
        "max_step_tokens": 64,
        "workload": {"prompt_tokens": 64, "output_tokens": 32},
    }
    return ModelConfig(**(facts | changes))
