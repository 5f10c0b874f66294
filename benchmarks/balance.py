"""The executor against the law's own floor max(L*c + g, k*t): `benchmarks.law --executor`.

L*c + g is the iteration at k = 0 in the same thread mode, taken beside every k, in turn, in the
same run and the same placement: k is turned. t is unit bytes / bandwidth.

On an emulated link copies go through the memory that computes, as they do not on a device. Two
more turns tell what that costs from what the executor costs: k = 0 again, while the link carries
as many bytes per iteration to a place that nobody computes from; and k with a link that takes its
time and moves nothing (it computes with what the slots held before).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.decoding import MovingBatch
from benchmarks.environment import Provenance, note
from select_n_core.links.emulated import EmulatedLink
from select_n_core.memory.host import HostMap
from select_n_core.models.load import LoadedModel

SLOTS = 2
WARM_UP = 3


def executor_document(
    source: str, model: LoadedModel, rates: list[float], rounds: int, repeats: int, batch: int
) -> dict[str, Any]:
    """Measure every k <= L/2 on every link."""
    provenance = Provenance()
    ks = range(1, len(model.units) // 2 + 1)
    points = [point for rate in rates for point in _link(model, rate, ks, rounds, repeats, batch)]
    return {
        "model": source,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": batch,
        "d": SLOTS,
        "rounds": rounds,
        "repeats": repeats,
        "points": points,
        "summary": [_summary(rate, points) for rate in rates],
        "provenance": provenance.document(),
    }


def executor_lines(summary: list[dict[str, Any]]) -> list[str]:
    """The summary for people."""
    return [
        f"{row['link_bytes_per_s'] / 1e9:g} GB/s, {row['points']} k: T / max(L*c+g, k*t) p90 "
        f"{row['p90']:.3f}, worst {row['worst']:.3f}; against k = 0 beside the same copies p90 "
        f"{row['beside_copies_p90']:.3f}, worst {row['beside_copies_worst']:.3f}; with copies that "
        f"take their time and move nothing p90 {row['unmoved_p90']:.3f}, worst "
        f"{row['unmoved_worst']:.3f}"
        for row in summary
    ]


def _link(
    model: LoadedModel, rate: float, ks: range, rounds: int, repeats: int, batch: int
) -> list[dict[str, Any]]:
    link = EmulatedLink(rate)
    moving = MovingBatch(model, link, slots=SLOTS, k_max=ks[-1], requests=batch)
    transfer_s = max(unit.nbytes for unit in model.units) / rate
    times_s: dict[int, list[_Times]] = {k: [] for k in ks}
    elsewhere = _Elsewhere(link, max(unit.nbytes for unit in model.units))
    for number in range(rounds):
        for k in ks if number % 2 == 0 else reversed(ks):
            alone_s = _quiet(moving.iterations(0, WARM_UP + repeats)[WARM_UP:])
            beside_s = _quiet(
                moving.iterations(0, WARM_UP + repeats, before=lambda k=k: elsewhere.send(k))[
                    WARM_UP:
                ]
            )
            streaming_s = _quiet(moving.iterations(k, WARM_UP + repeats)[WARM_UP:])
            link.sample_bytes = 0
            unmoved_s = _quiet(moving.iterations(k, WARM_UP + repeats)[WARM_UP:])
            link.sample_bytes = None
            moving.iterations(k, 2)  # no stale slot may go home
            times_s[k].append(_Times(alone_s, beside_s, streaming_s, unmoved_s))
        note(f"{rate / 1e9:g} GB/s: round {number + 1} of {rounds}")
    elsewhere.close()
    moving.close()
    link.close()
    return [_point(rate, k, transfer_s, times) for k, times in times_s.items()]


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of one iteration: without copies, beside copies to elsewhere, with k units streamed,
    and so again over a link that moves nothing."""

    alone_s: float
    beside_s: float
    streaming_s: float
    unmoved_s: float


class _Elsewhere:
    """Copies of units' bytes that nobody computes from."""

    def __init__(self, link: EmulatedLink, nbytes: int) -> None:
        self._link = link
        self._sources = [HostMap(nbytes) for _ in range(8)]
        for host in self._sources:
            link.register(host.bytes)
        self._targets = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(SLOTS)]
        self._sent = 0

    def send(self, count: int) -> None:
        """Queue `count` copies."""
        self._link.drain()
        for _ in range(count):
            source = self._sources[self._sent % len(self._sources)].bytes
            self._link.copy(self._targets[self._sent % SLOTS], source, kind="elsewhere")
            self._sent += 1

    def close(self) -> None:
        """Give the memory back."""
        self._link.drain()
        for host in self._sources:
            self._link.unregister(host.bytes)
            host.close()


def _quiet(times_s: list[float]) -> float:
    return float(np.percentile(times_s, 25))


def _point(rate: float, k: int, transfer_s: float, times: list[_Times]) -> dict[str, Any]:
    copies_s = k * transfer_s
    ratios = [each.streaming_s / max(each.alone_s, copies_s) for each in times]
    beside = [each.streaming_s / max(each.beside_s, copies_s) for each in times]
    unmoved = [each.unmoved_s / max(each.alone_s, copies_s) for each in times]
    return {
        "link_bytes_per_s": rate,
        "k": k,
        "alone_s": statistics.median(each.alone_s for each in times),
        "beside_copies_s": statistics.median(each.beside_s for each in times),
        "copies_s": copies_s,
        "iteration_s": statistics.median(each.streaming_s for each in times),
        "unmoved_s": statistics.median(each.unmoved_s for each in times),
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "ratio_beside_copies": statistics.median(beside),
        "ratio_unmoved": statistics.median(unmoved),
    }


def _summary(rate: float, points: list[dict[str, Any]]) -> dict[str, Any]:
    own = [point for point in points if point["link_bytes_per_s"] == rate]
    ratios = [point["ratio"] for point in own]
    beside = [point["ratio_beside_copies"] for point in own]
    unmoved = [point["ratio_unmoved"] for point in own]
    return {
        "link_bytes_per_s": rate,
        "points": len(own),
        "p90": float(np.percentile(ratios, 90)),
        "worst": max(ratios),
        "beside_copies_p90": float(np.percentile(beside, 90)),
        "beside_copies_worst": max(beside),
        "unmoved_p90": float(np.percentile(unmoved, 90)),
        "unmoved_worst": max(unmoved),
    }
