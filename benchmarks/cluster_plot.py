"""The picture of the cluster benchmark: memory that follows the load, requests that leave a slow
replica, and what routers make of the same load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = ("#1f5fa8", "#e08a2e", "#8a8f98")
_INK = "#333333"
_SHADES = ("#f4f5f7", "#ffffff")
_MIB = 1 << 20


def draw(document: dict[str, Any], output: Path) -> None:
    """Write the picture of a result (see `benchmarks.cluster`), of the sections that it has."""
    panels = {name: panel for name, panel in _PANELS.items() if document.get(name)}
    if not panels:
        return
    figure = Figure(figsize=(9, 3.4 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False)
    for [axes], (name, panel) in zip(rows, panels.items(), strict=True):
        panel(axes, document[name])
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, colors=_INK)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(output, dpi=130)


def _budget(axes: Axes, found: dict[str, Any]) -> None:
    lent = found["lent"]
    for number in range(lent["phases"]):
        begin_s, end_s = number * lent["phase_s"], (number + 1) * lent["phase_s"]
        axes.axvspan(begin_s, end_s, color=_SHADES[number % 2], zorder=0)
        loaded = list(lent["mapped_by_second"])[number % 2]
        axes.text(
            (begin_s + end_s) / 2, 1, f"{loaded} loaded", ha="center", va="bottom",
            fontsize=8, color=_INK, transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    for (name, values), colour in zip(lent["mapped_by_second"].items(), _COLOURS, strict=False):
        mib = [nbytes / _MIB for nbytes in values]
        axes.step(range(len(mib)), mib, where="post", color=colour, linewidth=1.2, label=name)
    budget_mib = found["budget_bytes"] / _MIB
    axes.axhline(budget_mib, color=_INK, linewidth=1, linestyle=":", label="budget of both")
    axes.set_ylim(0, 1.1 * budget_mib)
    axes.set_xlabel("seconds", color=_INK)
    axes.set_ylabel("mapped, MiB", color=_INK)


def _feedback(axes: Axes, found: dict[str, Any]) -> None:
    points = [(end_s, 100 * share) for end_s, share in found["curve"] if share is not None]
    axes.axvline(0, color=_INK, linewidth=1, linestyle=":", label="its link is halved")
    axes.plot(*zip(*points, strict=True), color=_COLOURS[0], marker="o", markersize=4,
              label=f"share of one of two replicas, mean of {found['halvings']}")  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set_xlabel("seconds", color=_INK)
    axes.set_ylabel("of the requests let in, %", color=_INK)


def _tenants(axes: Axes, found: dict[str, Any]) -> None:
    rows = found["rows"]
    width = 0.8 / len(rows)
    for place, ((name, row), colour) in enumerate(zip(rows.items(), _COLOURS, strict=False)):
        for index, phase in enumerate(row["phases"].values()):
            x = index + (place - (len(rows) - 1) / 2) * width
            share = 100 * (phase["good"]["share"] or 0.0)
            axes.bar(x, share, 0.92 * width, color=colour, label=None if index else name)
    phases = list(next(iter(rows.values()))["phases"])
    axes.set_xticks(range(len(phases)), phases)
    axes.set_ylim(0, 108)
    axes.set_ylabel("goodput, % of offered", color=_INK)


_PANELS = {"budget": _budget, "feedback": _feedback, "tenants": _tenants}
