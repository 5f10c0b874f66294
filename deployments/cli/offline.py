"""`profile`, `plan` and `check`: everything that is decided before a weight is placed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deployments.cli.options import model_config
from deployments.cli.output import progress_bar
from select_n_core.config import DeployConfig
from select_n_core.decisions.candidate import Candidate, PlanInputs
from select_n_core.decisions.latency import StepShape
from select_n_core.decisions.plan import Plan, make_plan
from select_n_core.engine.planning import UNIT_NAMES, Prepared, plan_inputs, prepare, record_path
from select_n_core.links.open import open_link
from select_n_core.models.load import load_model
from select_n_core.models.source import resolve
from select_n_core.profiling.fingerprint import fingerprint, hardware_here
from select_n_core.profiling.heldout import goal
from select_n_core.profiling.measure import Effort, measure_record
from select_n_core.quantities import format_bytes, format_seconds
from select_n_core.record import PerformanceRecord, TransferSample, load_record

_NOISY = 0.08  # of `ModeRecord.noise`
_TABLE_WIDTH = 120
_WAYS = {"h2d": "to the device", "d2h": "to the host"}


def profile(
    source: str,
    link: dict[str, Any],
    dtype: str,
    units: str,
    output: Path | None,
    *,
    brief: bool = False,
) -> dict[str, Any]:
    """Measure `source` on this machine; writes `output` and the cache that `serve` reads.

    Args:
        brief: a fifth of the effort, and no verdict on the fit.
    """
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
    effort = Effort.brief(config.max_batch, config.max_step_tokens) if brief else Effort.full()
    with progress_bar(f"profiling {source}") as progress:
        record = measure_record(model, here, config.link, effort, progress)
    record.save(record_path(here))
    if output is not None:
        record.save(output)
    return _profile_summary(record, output or record_path(here))


def _profile_summary(record: PerformanceRecord, path: Path) -> dict[str, Any]:
    latency = record.latency_model()
    noise = record.held_out_noise
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
        "transfers": [_transfer_summary(sample) for sample in record.transfers],
        "link": {
            "kind": record.fingerprint.link_kind,
            "bandwidth_bytes_per_s": record.link_bytes_per_s,
        },
        "unit_compute_s": latency.streaming.unit_s(StepShape(decode_rows=1)),
        "outside_s": latency.streaming.outside(1),
        "compute_slowdown": latency.streaming.copy_slowdown,
        "fit_error": record.streaming.fit_error,
        "held_out_shapes": len({sample.shape() for sample in record.held_out}),
        "held_out_steps": len(record.held_out),
        "held_out_p95": record.held_out_p95,
        "held_out_noise": noise,
        "held_out_goal": None if noise is None else goal(noise),
        "noise": record.streaming.noise,
        "seconds": record.seconds,
    }


def _transfer_summary(sample: TransferSample) -> dict[str, Any]:
    p5, p50, p95 = np.percentile(sample.seconds, [5, 50, 95])
    return {
        "direction": sample.direction,
        "nbytes": sample.nbytes,
        "p5_s": float(p5),
        "p50_s": float(p50),
        "p95_s": float(p95),
        "compute_slowdown": sample.compute_slowdown,
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
    ]
    lines += [
        f"{_WAYS[each['direction']]} {format_bytes(each['nbytes'])}: p5 "
        f"{format_seconds(each['p5_s'])}, p50 {format_seconds(each['p50_s'])}, p95 "
        f"{format_seconds(each['p95_s'])}; {each['compute_slowdown']:.1%} longer beside compute"
        for each in summary["transfers"]
    ]
    lines.append(
        f"compute {summary['compute_slowdown']:.1%} longer beside copies that never pause; "
        f"largest error of the fit on its own shapes {summary['fit_error']:.1%}"
    )
    if summary["held_out_p95"] is not None:
        lines.append(
            f"held out: {summary['held_out_steps']} steps of {summary['held_out_shapes']} other "
            f"shapes, P95 of the error {summary['held_out_p95']:.1%}, split-half noise "
            f"{summary['held_out_noise']:.1%}, goal {summary['held_out_goal']:.1%}"
        )
    lines.append(
        f"measured in {format_seconds(summary['seconds'])}, written to {summary['record']}"
    )
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
        "candidates": [_candidate_document(each) for each in plan.candidates],
    }


def _candidate_document(candidate: Candidate) -> dict[str, Any]:
    return {
        "k": candidate.k,
        "interval": candidate.interval,
        "host_bytes": candidate.host_bytes,
        "kv_tokens": candidate.kv_tokens,
        "batch": candidate.serving.batch,
        "tpot_s": candidate.serving.tpot_s,
        "ttft_s": candidate.serving.ttft_s,
        "requests_per_s": candidate.requests_per_s,
        "meets_tpot": candidate.meets_tpot,
        "meets_ttft": candidate.meets_ttft,
        "fits_device": candidate.fits_device,
        "fits_host": candidate.fits_host,
        "feasible": candidate.feasible,
    }


def plan_lines(plan: Plan, inputs: PlanInputs) -> list[str]:
    """The plan as a table over N, with the choice and its reason."""
    rate = "the most it can do" if inputs.rate_per_s is None else f"{inputs.rate_per_s:g}/s"
    shown = "off" if plan.interval is None else f"{plan.interval:g}"
    verdict = (
        f"N = {shown} (k = {plan.k}): {plan.message}"
        if plan.feasible
        else f"infeasible, {plan.reason}: {plan.message}"
    )
    console = Console(highlight=False)
    console.width = max(console.width, _TABLE_WIDTH)
    with console.capture() as captured:
        console.print(_table(plan))
    return [
        f"for requests of {inputs.prompt_tokens} prompt and {inputs.output_tokens} output tokens "
        f"(--prompt-tokens, --output-tokens), {rate} (--rate), "
        f"tpot {format_seconds(inputs.slo.tpot_s)}, ttft {format_seconds(inputs.slo.ttft_s)}",
        *(line.rstrip() for line in captured.get().strip("\n").split("\n")),
        verdict,
    ]


def _table(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("", "N", "k", "host", "KV tokens", "batch", "TPOT", "TTFT", "goodput"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("TPOT ok", "TTFT ok", "memory ok"):
        table.add_column(title, justify="center", no_wrap=True)
    for c in plan.candidates:
        chosen = plan.feasible and c.k == plan.k
        style = "bold green" if chosen else None if c.feasible else "dim"
        table.add_row(
            "->" if chosen else "",
            "off" if c.interval is None else f"{c.interval:.3g}",
            str(c.k),
            format_bytes(c.host_bytes),
            str(c.kv_tokens),
            str(c.serving.batch),
            format_seconds(c.serving.tpot_s),
            format_seconds(c.serving.ttft_s),
            f"{c.requests_per_s:.2f}/s" if c.feasible else "-",
            _said(c.meets_tpot),
            _said(c.meets_ttft),
            _memory_said(c),
            style=style,
        )
    return table


def _said(holds: bool) -> str:
    return "yes" if holds else "no"


def _memory_said(candidate: Candidate) -> str:
    """Which memory is too small, if one is."""
    small = [
        name
        for name, fits in (("device", candidate.fits_device), ("host", candidate.fits_host))
        if not fits
    ]
    return f"no: {', '.join(small)}" if small else "yes"


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
