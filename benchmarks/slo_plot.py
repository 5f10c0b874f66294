"""The picture of the SLO benchmark: goodput and attainment by phase and policy, and k over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from select_n_core.quantities import format_bytes

BEST = "best static:N of the phase"
COLOURS = {
    "select_n": "#1f5fa8",
    BEST: "#8a8f98",
    "flexgen": "#e08a2e",
    "fetch_all": "#b65d6a",
    "resident": "#6a9f58",
}
_WIDTH = 0.16
_INK = "#333333"
_SHADES = ("#f4f5f7", "#ffffff")


def draw(document: dict[str, Any], output: Path) -> None:
    """Write the picture of a result (see `benchmarks.slo`) to `output`.

    One column per memory size. Bars are means over the seeds, whiskers their extremes.
    """
    loads = document["loads"]
    figure = Figure(figsize=(7.6 * len(loads), 9.6), layout="constrained")
    grid = figure.subplots(3, len(loads), squeeze=False, height_ratios=(3, 2.2, 2.2))
    for column, load in enumerate(loads):
        runs = [run for run in document["runs"] if run["memory_bytes"] == load["memory_bytes"]]
        runs = [run for run in runs if not run["void"]]
        top, middle, bottom = (row[column] for row in grid)
        _goodput(top, load, runs)
        _attainment(middle, load, runs)
        _k_over_time(bottom, load, runs)
        top.set_title(
            f"{format_bytes(load['memory_bytes'])} of device memory, "
            f"{load['rate_per_s']:.2f} requests/s",
            loc="left",
            color=_INK,
            fontsize=12,
            fontweight="bold",
        )
    ran = {_group(run["policy"]) for run in document["runs"]}
    figure.legend(
        handles=[Patch(color=COLOURS[name], label=name) for name in COLOURS if name in ran],
        loc="outside upper center",
        ncols=len(COLOURS),
        frameon=False,
    )
    figure.savefig(output, dpi=130)


def _goodput(axes: Axes, load: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
    for place, name in enumerate(COLOURS):
        for index, _ in enumerate(load["phases"]):
            shares, label = _shares(runs, name, index)
            x = index + (place - (len(COLOURS) - 1) / 2) * _WIDTH
            if not shares:
                continue
            mean = 100 * fmean(shares)
            axes.bar(x, mean, _WIDTH * 0.92, color=COLOURS[name])
            if len(shares) > 1:
                axes.vlines(x, 100 * min(shares), 100 * max(shares), color=_INK, linewidth=1)
            if mean == 0:
                axes.text(x, 1, "0", ha="center", fontsize=7, color=COLOURS[name])
            elif label:
                axes.text(x, 100 * max(shares) + 1, label, ha="center", fontsize=7, color=_INK)
    axes.set_ylabel("goodput (% of offered requests)")
    axes.set_ylim(0, 108)
    _phases(axes, load)


def _shares(
    runs: Sequence[dict[str, Any]], name: str, index: int
) -> tuple[list[float], str | None]:
    """A bar's goodput shares, one per seed, and what stands above it."""
    by_policy: dict[str, list[float]] = {}
    for run in runs:
        by_policy.setdefault(run["policy"], []).append(run["phases"][index]["good"]["share"])
    if name != BEST:
        return by_policy.get(name, []), None
    statics = {policy: s for policy, s in by_policy.items() if policy.startswith("static:")}
    if not statics:
        return [], None
    best = max(statics, key=lambda policy: fmean(statics[policy]))
    return statics[best], best.removeprefix("static:")


def _attainment(axes: Axes, load: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
    """Of admitted requests; every static interval has a mark."""
    for place, name in enumerate(COLOURS):
        own = [run for run in runs if _group(run["policy"]) == name]
        for run in own:
            for index, phase in enumerate(run["phases"]):
                x = index + (place - (len(COLOURS) - 1) / 2) * _WIDTH
                for kind, shift, face in (
                    ("admitted_tpot", -0.03, COLOURS[name]),
                    ("admitted_ttft", 0.03, "white"),
                ):
                    if (share := phase[kind]["share"]) is not None:
                        axes.plot(
                            x + shift,
                            100 * share,
                            marker="o",
                            markersize=4.5,
                            markerfacecolor=face,
                            markeredgecolor=COLOURS[name],
                            clip_on=False,
                            zorder=3,
                        )
    axes.axhline(99, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_ylabel("admitted requests within\nTPOT (●) and TTFT (○), %")
    axes.set_ylim(0, 102)
    _phases(axes, load)
    axes.tick_params(labelbottom=False)


def _group(policy: str) -> str:
    return BEST if policy.startswith("static:") else policy


def _phases(axes: Axes, load: dict[str, Any]) -> None:
    names = load["phases"]
    for index, _ in enumerate(names):
        axes.axvspan(index - 0.5, index + 0.5, color=_SHADES[index % 2], zorder=0)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    _plain(axes)


def _k_over_time(axes: Axes, load: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
    minutes = load["phase_s"] / 60
    for index, _ in enumerate(load["phases"]):
        axes.axvspan(index * minutes, (index + 1) * minutes, color=_SHADES[index % 2], zorder=0)
    for run in runs:
        if run["policy"] == "select_n":
            at = [second / 60 for second in range(len(run["k_by_second"]))]
            axes.step(at, run["k_by_second"], where="post", color=COLOURS["select_n"], linewidth=1)
    flexgen = [r["phases"][0]["k"][0] for r in runs if r["policy"] == "flexgen" and r["plan"]]
    if flexgen:
        axes.axhline(flexgen[0], color=COLOURS["flexgen"], linestyle="--", linewidth=1.2)
    best = load["best_static_k"]
    axes.axhline(best, color=COLOURS[BEST], linestyle=":", linewidth=1.2)
    axes.set_xlim(0, minutes * len(load["phases"]))
    axes.set_ylim(0, max(4, axes.get_ylim()[1]))
    axes.set_xlabel("minutes")
    axes.set_ylabel(
        "k, units streamed by select_n\n(dashed: flexgen; dotted: best static,\nby the planner)"
    )
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=_INK)
    axes.set_axisbelow(True)
