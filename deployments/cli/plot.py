"""The picture of a plan: what every N costs and gives, which of them hold, and which is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from select_n_core.decisions.candidate import Candidate, PlanInputs, decode_shape, serve
from select_n_core.decisions.plan import Plan
from select_n_core.errors import InputError

_INK, _PALE = "#1b2a3a", "#9aa7b4"
_LINE, _CHOSEN, _LIMIT, _MEASURED = "#1f5fa8", "#0b7a4b", "#c0392b", "#e07b00"
_BOTH, _TTFT, _TPOT = "#def0e3", "#fbeacf", "#d8e7f8"
_RANGES = (((True, True), _BOTH), ((False, True), _TTFT), ((True, False), _TPOT))
_HELD = {
    (True, True): "TTFT and TPOT hold",
    (False, True): "TTFT alone holds",
    (True, False): "TPOT alone holds",
}
_MIB, _GIB = 1 << 20, 1 << 30


class _Panel(NamedTuple):
    """One quantity over k.

    Attributes:
        limit: what it must keep to, and how that is called.
    """

    title: str
    value: Callable[[Candidate], float]
    shown: str
    limit: tuple[float, str] | None = None


def draw_plan(plan: Plan, inputs: PlanInputs, output: Path, measured: Path | None) -> None:
    """Write the picture to `output` (png, svg or pdf): four panels over one axis of N.

    Args:
        measured: what `python -m benchmarks.law --json` printed; its points of this link and
            ring are drawn with the time that is predicted for an iteration of their batch.

    Raises:
        InputError: matplotlib is not installed, or a file cannot be used.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "--plot needs matplotlib; install it with: pip install 'select-n[plot]'"
        ) from error
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    panels = _panels(plan, inputs)
    axes = figure.subplots(2, 2, sharex=True)
    for axis, panel in zip(axes.flat, panels, strict=True):
        _draw(axis, panel, plan)
    _alone(axes[0, 0], plan, inputs)
    if measured is not None:
        _measured(axes[0, 0], plan, inputs, *_points(measured, inputs))
    axes[0, 0].legend(loc="upper left", frameon=False, fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel(f"{inputs.unit_name} streamed, k", color=_INK)
    for axis in axes[0]:
        _intervals(axis, inputs.memory.units)
    figure.suptitle(_headline(plan, inputs), x=0.01, ha="left", fontsize=11, color=_INK)
    figure.legend(handles=_legend(plan), loc="outside lower center", ncols=5, frameon=False)
    try:
        figure.savefig(output, dpi=160)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the plot to {output}: {error}") from error


def _panels(plan: Plan, inputs: PlanInputs) -> list[_Panel]:
    most = max(c.host_bytes for c in plan.candidates)
    unit, name = (_GIB, "GiB") if most >= 2 * _GIB else (_MIB, "MiB")
    given = inputs.host_bytes / unit
    return [
        _Panel(
            "TPOT at the most goodput (ms)",
            lambda c: 1e3 * c.serving.tpot_s,
            "{:.1f} ms",
            (1e3 * inputs.slo.tpot_s, "TPOT target"),
        ),
        _Panel("goodput (requests/s)", lambda c: c.requests_per_s, "{:.2f}/s"),
        _Panel(
            f"host memory ({name})",
            lambda c: c.host_bytes / unit,
            f"{{:.0f}} {name}",
            (given, "host memory given") if given <= 1.5 * most / unit else None,
        ),
        _Panel("KV cache (tokens)", lambda c: float(c.kv_tokens), "{:.0f} tokens"),
    ]


def _draw(axis: Any, panel: _Panel, plan: Plan) -> None:
    """The quantity at every k, strong where the plan is feasible, on what holds there."""
    for holds, color in _RANGES:
        _shade(axis, (c.k for c in plan.candidates if (c.meets_tpot, c.meets_ttft) == holds), color)
    ks = [c.k for c in plan.candidates]
    axis.plot(ks, [panel.value(c) for c in plan.candidates], color=_PALE, linewidth=1.2)
    for low, high in _runs(c.k for c in plan.candidates if c.feasible):
        run = plan.candidates[low : high + 1]
        axis.plot(
            range(low, high + 1),
            [panel.value(c) for c in run],
            color=_LINE,
            linewidth=2,
            marker="o",
            markersize=3,
        )
    if panel.limit is not None:
        value, name = panel.limit
        axis.axhline(value, color=_LIMIT, linestyle="--", linewidth=1.2)
        axis.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=_LIMIT,
            fontsize=8,
        )
    if plan.feasible:
        _mark(axis, plan, panel)
    axis.set_title(panel.title, loc="left", fontsize=10, color=_INK)
    axis.set_xlim(-0.5, ks[-1] + 0.5)
    values = [panel.value(c) for c in plan.candidates]
    limits = [] if panel.limit is None else [panel.limit[0]]
    axis.set_ylim(0, 1.18 * max(*values, *limits, 1e-9))
    axis.tick_params(colors=_INK, labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _mark(axis: Any, plan: Plan, panel: _Panel) -> None:
    value = panel.value(plan.candidates[plan.k])
    axis.axvline(plan.k, color=_CHOSEN, linewidth=1, alpha=0.6)
    axis.plot([plan.k], [value], "o", color=_CHOSEN, markersize=8, zorder=5)
    left = plan.k > len(plan.candidates) / 4
    axis.annotate(
        panel.shown.format(value),
        (plan.k, value),
        xytext=(-8 if left else 8, 8),
        textcoords="offset points",
        ha="right" if left else "left",
        color=_CHOSEN,
        fontsize=9,
        fontweight="bold",
        zorder=6,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
    )


def _alone(axis: Any, plan: Plan, inputs: PlanInputs) -> None:
    """A request that runs by itself: what decides whether a target can be met at all."""
    ks = [c.k for c in plan.candidates]
    alone_ms = [1e3 * serve(inputs, k, 1).tpot_s for k in ks]
    axis.plot(ks, alone_ms, color=_INK, linewidth=1, linestyle=":", label="one request alone")


def _measured(
    axis: Any, plan: Plan, inputs: PlanInputs, batch: int, points: Sequence[tuple[int, float]]
) -> None:
    shape = decode_shape(batch, inputs.prompt_tokens, inputs.output_tokens)
    ks = [c.k for c in plan.candidates]
    predicted_ms = [1e3 * inputs.latency.iteration_s(shape, k, inputs.slots) for k in ks]
    label = f"iteration of {batch} requests, predicted"
    axis.plot(ks, predicted_ms, color=_MEASURED, linewidth=1, label=label)
    axis.plot(
        [k for k, _ in points],
        [1e3 * seconds for _, seconds in points],
        "o",
        color=_MEASURED,
        markersize=3.5,
        label="measured",
    )


def _shade(axis: Any, ks: Iterable[int], color: str) -> None:
    for low, high in _runs(ks):
        axis.axvspan(low - 0.5, high + 0.5, color=color, linewidth=0, zorder=0)


def _runs(ks: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of every run of consecutive numbers."""
    ordered = sorted(ks)
    if not ordered:
        return []
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b > a + 1), len(ordered)]
    return [(ordered[begin], ordered[end - 1]) for begin, end in pairwise(cuts)]


def _intervals(axis: Any, units: int) -> None:
    """N on top, where it stands for k = L / N."""
    top = axis.secondary_xaxis("top")
    shown = [n for n in (1, 1.2, 1.5, 2, 3, 5, 10) if units / n >= 1]
    top.set_xticks([0, *(units / n for n in shown)], ["off", *(f"{n:g}" for n in shown)])
    top.set_xlabel("interval N (one in every N is streamed)", fontsize=8, color=_INK)
    top.tick_params(colors=_INK, labelsize=8, length=3)
    top.spines["top"].set_visible(False)


def _legend(plan: Plan) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = {(c.meets_tpot, c.meets_ttft) for c in plan.candidates}
    handles: list[Any] = [
        *(Patch(color=color, label=_HELD[holds]) for holds, color in _RANGES if holds in found),
        Line2D(
            [],
            [],
            color=_LINE,
            linewidth=2,
            marker="o",
            markersize=3,
            label="feasible in memory too",
        ),
    ]
    if plan.feasible:
        handles.append(Line2D([], [], color=_CHOSEN, marker="o", linewidth=1, label="chosen"))
    return handles


def _headline(plan: Plan, inputs: PlanInputs) -> str:
    shown = "off" if plan.interval is None else f"{plan.interval:g}"
    found = (
        f"N = {shown} (k = {plan.k} of {inputs.memory.units}): {plan.max_batch} requests at a time"
        if plan.feasible
        else f"infeasible: {plan.reason}"
    )
    return (
        f"{found}\n{inputs.prompt_tokens} prompt and {inputs.output_tokens} output tokens, "
        f"{inputs.device_bytes / _MIB:.0f} MiB of device memory"
    )


def _points(path: Path, inputs: PlanInputs) -> tuple[int, list[tuple[int, float]]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        link_bytes_per_s = max(inputs.memory.unit_bytes) / inputs.latency.transfer_s
        points = [
            (int(point["k"]), float(point["measured_iteration_s"]))
            for point in document["points"]
            if point["d"] == inputs.slots
            and abs(point["link_bytes_per_s"] / link_bytes_per_s - 1) < 0.05
        ]
        return int(document["batch"]), points
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not hold the points of benchmarks.law: {error!r}") from error
