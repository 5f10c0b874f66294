"""`profile`, `plan` and `check`: everything that is decided before a weight is placed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from deployments.cli.options import model_config
from deployments.cli.output import progress_bar
from select_n_core.config import DeployConfig
from select_n_core.decisions.candidate import PlanInputs
from select_n_core.decisions.plan import Plan, make_plan
from select_n_core.engine.planning import UNIT_NAMES, Prepared, plan_inputs, prepare, record_path
from select_n_core.links.open import open_link
from select_n_core.models.load import load_model
from select_n_core.models.source import resolve
from select_n_core.profiling.fingerprint import fingerprint, hardware_here
from select_n_core.profiling.measure import Effort, measure_record
from select_n_core.quantities import format_bytes, format_seconds
from select_n_core.record import PerformanceRecord, load_record

_NOISY = 0.08  # of `ModeRecord.noise`


def profile(
    source: str, link: dict[str, Any], dtype: str, units: str, output: Path | None
) -> dict[str, Any]:
    """Measure `source` on this machine; writes `output` and the cache that `serve` reads."""
    config = model_config(
        name="profile",
        source=source,
        dtype=dtype,
        units=units,
        device_memory=1,
        host_memory=0,
        link=link,
        slo={"tpot": 1.0},
    )
    opened, _ = open_link(config.link)  # missing hardware is refused before minutes of work
    opened.close()
    directory = resolve(source)
    here = fingerprint(source, directory, config.dtype, config.link, config.units)
    model = load_model(directory, config.dtype, config.units)
    with progress_bar(f"profiling {source}") as progress:
        record = measure_record(model, here, config.link, Effort(), progress)
    record.save(record_path(here))
    if output is not None:
        record.save(output)
    return _profile_summary(record, output or record_path(here))


def _profile_summary(record: PerformanceRecord, path: Path) -> dict[str, Any]:
    latency = record.latency_model()
    return {
        "record": str(path),
        "model": record.fingerprint.model,
        "device": record.fingerprint.device,
        "units": len(record.unit_bytes),
        "unit_kind": record.fingerprint.units,
        "unit_bytes": max(record.unit_bytes),
        "static_bytes": record.static_bytes,
        "kv_bytes_per_token": record.kv_bytes_per_token,
        "transfer_s": record.transfer_s,
        "link": {
            "kind": record.fingerprint.link_kind,
            "bandwidth_bytes_per_s": record.link_bytes_per_s,
        },
        "unit_compute_s": latency.streaming.token_grid[0][1],
        "outside_s": latency.streaming.outside(1),
        "fit_error": record.streaming.fit_error,
        "noise": record.streaming.noise,
        "seconds": record.seconds,
    }


def profile_lines(summary: dict[str, Any]) -> list[str]:
    """A profile's summary for people."""
    what = UNIT_NAMES[summary["unit_kind"]]
    lines = [
        f"{summary['model']} on {summary['device']}: {summary['units']} {what} of at most "
        f"{format_bytes(summary['unit_bytes'])}",
        f"copy of a layer {format_seconds(summary['transfer_s'])} "
        f"({summary['link']['bandwidth_bytes_per_s'] / 1e9:.3g} GB/s, {summary['link']['kind']}), "
        f"compute of one {format_seconds(summary['unit_compute_s'])} at one token, "
        f"outside the layers {format_seconds(summary['outside_s'])}",
        f"largest error of the fit {summary['fit_error']:.1%}; "
        f"measured in {format_seconds(summary['seconds'])}, written to {summary['record']}",
    ]
    if summary["noise"] > _NOISY:
        lines.append(
            f"the machine was busy with something else: its sweeps took {summary['noise']:.0%} "
            "longer than the fastest; profile again when it is idle"
        )
    return lines


def plan_record(path: Path, **fields: Any) -> tuple[PerformanceRecord, PlanInputs, Plan]:
    """Plan from a record file; the record must be this machine's."""
    record = load_record(path)
    record.check(hardware_here(record.fingerprint), where=str(path))
    config = model_config(
        name="plan",
        source=record.fingerprint.model,
        dtype=record.fingerprint.dtype,
        units=record.fingerprint.units,
        link={"kind": "emulated", "bandwidth": record.link_bytes_per_s},
        **fields,
    )
    inputs = plan_inputs(config, record)
    return record, inputs, make_plan(inputs)


def plan_document(plan: Plan, inputs: PlanInputs) -> dict[str, Any]:
    """The plan as the JSON contract has it."""
    return {
        "feasible": plan.feasible,
        "interval": plan.interval,
        "k": plan.k,
        "interval_range": None if plan.interval_range is None else list(plan.interval_range),
        "predicted_tpot_s": plan.predicted_tpot_s,
        "predicted_ttft_s": plan.predicted_ttft_s,
        "device_bytes": plan.device_bytes,
        "host_bytes": plan.host_bytes,
        "max_batch": plan.max_batch,
        "kv_tokens": plan.kv_tokens,
        "reason": plan.reason,
        "note": plan.note,
        "message": plan.message,
        "slots": plan.slots,
        "prompt_tokens": inputs.prompt_tokens,
        "output_tokens": inputs.output_tokens,
        "rate_per_s": inputs.rate_per_s,
    }


def plan_lines(plan: Plan, inputs: PlanInputs) -> list[str]:
    """The plan as a table over k, with the choice and its reason."""
    rate = "the most it can do" if inputs.rate_per_s is None else f"{inputs.rate_per_s:g}/s"
    lines = [
        f"for requests of {inputs.prompt_tokens} prompt and {inputs.output_tokens} output tokens "
        f"(--prompt-tokens, --output-tokens), {rate} (--rate), "
        f"tpot {format_seconds(inputs.slo.tpot_s)}, ttft {format_seconds(inputs.slo.ttft_s)}",
        f"{'':2}{'k':>3} {'N':>6} {'TPOT':>9} {'TTFT':>9} {'host':>10} {'KV tokens':>9} "
        f"{'batch':>5} {'req/s':>7}",
    ]
    for c in plan.candidates:
        mark = "->" if plan.feasible and c.k == plan.k else "  " if c.feasible else " x"
        interval = "off" if c.interval is None else f"{c.interval:.3g}"
        lines.append(
            f"{mark}{c.k:>3} {interval:>6} {format_seconds(c.serving.tpot_s):>9} "
            f"{format_seconds(c.serving.ttft_s):>9} {format_bytes(c.host_bytes):>10} "
            f"{c.kv_tokens:>9} {c.serving.batch:>5} {c.requests_per_s:>7.2f}"
        )
    shown = "off" if plan.interval is None else f"{plan.interval:g}"
    verdict = (
        f"N = {shown} (k = {plan.k}): {plan.message}"
        if plan.feasible
        else f"infeasible, {plan.reason}: {plan.message}"
    )
    return [*lines, verdict]


def check(config: DeployConfig) -> list[Prepared]:
    """Everything that serving does before weights are loaded, for every model."""
    from deployments.cli.serve import check_capacity, check_port

    check_port(config.http)
    check_capacity(config.serve, {"GPU": _gpus()})
    prepared = []
    for model in config.serve.models:
        link, _ = open_link(model.link)
        link.close()
        with progress_bar(f"checking {model.name}") as progress:
            found = prepare(model, progress)
        prepared.append(replace(found, loaded=None))
    return prepared


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
