"""The picture of a plan: predicted iteration time against N, measured points on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from select_n_core.decisions.candidate import PlanInputs, decode_shape
from select_n_core.decisions.plan import Plan
from select_n_core.errors import InputError


def draw_plan(plan: Plan, inputs: PlanInputs, output: Path, measured: Path | None) -> None:
    """Write the picture to `output` (png, svg or pdf).

    Args:
        measured: what `python -m benchmarks.law --json` printed; its points of this link and
            ring are drawn over the curve, which is then predicted for their batch.

    Raises:
        InputError: matplotlib is not installed, or a file cannot be used.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "--plot needs matplotlib; install it with: pip install 'select-n[plot]'"
        ) from error
    batch, points = _points(measured, inputs) if measured is not None else (None, [])
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ks = [c.k for c in plan.candidates if c.k]
    predicted_ms = [1e3 * _predicted_s(inputs, k, batch or max(1, plan.max_batch)) for k in ks]
    axes.plot(ks, predicted_ms, color="tab:blue", label="predicted (recurrence)")
    if points:
        axes.plot(
            [k for k, _ in points],
            [1e3 * s for _, s in points],
            linestyle="none",
            marker="o",
            markersize=4,
            color="tab:orange",
            label="measured",
        )
    axes.axhline(1e3 * inputs.slo.tpot_s, color="tab:red", linestyle="--", label="TPOT target")
    _mark_range(axes, plan)
    axes.set_xlabel("interval N (one in every N layers is streamed)")
    axes.set_ylabel("iteration time (ms)")
    units = inputs.memory.units
    shown = [n for n in (1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 30) if units / n >= 1]
    axes.set_xticks([units / n for n in shown], [f"{n:g}" for n in shown], fontsize=8)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlim(max(ks) + 0.5, 0.5)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the plot to {output}: {error}") from error


def _predicted_s(inputs: PlanInputs, k: int, batch: int) -> float:
    shape = decode_shape(batch, inputs.prompt_tokens, inputs.output_tokens)
    return inputs.latency.iteration_s(shape, k, inputs.slots)


def _mark_range(axes: Any, plan: Plan) -> None:
    feasible = [c.k for c in plan.candidates if c.feasible and c.k]
    if feasible:
        axes.axvspan(
            min(feasible) - 0.4,
            max(feasible) + 0.4,
            color="tab:green",
            alpha=0.12,
            label="feasible: fits the arena and the targets",
        )
    if plan.feasible and plan.k:
        axes.axvline(plan.k, color="tab:green", label=f"chosen: N = {plan.interval:g}")


def _points(path: Path, inputs: PlanInputs) -> tuple[int, list[tuple[int, float]]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        link_bytes_per_s = max(inputs.memory.unit_bytes) / inputs.latency.transfer_s
        points = [
            (int(point["k"]), float(point["measured_iteration_s"]))
            for point in document["points"]
            if point["k"]
            and point["d"] == inputs.slots
            and abs(point["link_bytes_per_s"] / link_bytes_per_s - 1) < 0.05
        ]
        return int(document["batch"]), points
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not hold the points of benchmarks.law: {error!r}") from error
