"""The law's section of `benchmarks.gpu`: every distinct k of a model, with and without graphs.

One placement per model and ring. c and g come from k = 0 in the same run, measured again beside
every k; t is a unit's copy in the same placement. Predicted is the recurrence.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from benchmarks.environment import note
from benchmarks.gpu_bench import WARM_UP, Batch, Rig, UnitClock, batch, copy_seconds, spread
from benchmarks.gpu_models import Shape
from select_n_core.decisions.law import iteration_s
from select_n_core.decisions.order import k_of_interval
from select_n_core.links.base import Direction
from select_n_core.models.load import LoadedModel
from select_n_core.offload.graphs import Graphs

_LEAST_LEFT_S = 10.0


def ks_of(units: int) -> list[int]:
    """Every distinct k = floor(L / N), by whole N from L down to 1."""
    return sorted({k_of_interval(interval, units) for interval in range(1, units + 1)})


def law(rig: Rig, shape: Shape, model: LoadedModel, slots: int) -> dict[str, Any]:
    """Iteration times at every k against the floor max(L*c + g, k*t) and the recurrence."""
    with batch(rig, model, slots=slots, graphs=rig.modes[-1]) as decoding:
        share = _units_share(rig, model, decoding)
        resident_s: dict[Graphs, list[float]] = {mode: [] for mode in rig.modes}
        streamed_s: dict[Graphs, dict[int, list[float]]] = {mode: {} for mode in rig.modes}
        for k in ks_of(decoding.units):
            if rig.budget.left_s < _LEAST_LEFT_S:
                note(f"law: {shape.name}, d = {slots}: the budget ends before k = {k}")
                break
            for mode in rig.modes:
                resident_s[mode] += _iterations(decoding, 0, mode, slots)
                streamed_s[mode][k] = _iterations(decoding, k, mode, slots)
        transfer_s = statistics.median(
            copy_seconds(rig, decoding.executor.memory.slot_bytes, Direction.TO_DEVICE, 5)
        )
        captured = decoding.executor.graphs
        found: dict[str, Any] = {
            "model": shape.name,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "d": slots,
            "attention": decoding.executor.attention.value,
            "unit_bytes": decoding.executor.memory.slot_bytes,
            "t_s": transfer_s,
            "units_share": share,
            "captured": 0 if captured is None else captured.captured,
            "replays": 0 if captured is None else captured.replays,
            "capture_refused": None if captured is None else captured.refused,
            "skipped_k": [k for k in ks_of(decoding.units) if k not in streamed_s[Graphs.OFF]],
        }
    found["modes"] = [
        _mode(mode, len(model.units), slots, share, transfer_s, resident_s[mode], streamed_s[mode])
        for mode in rig.modes
        if streamed_s[mode]
    ]
    for mode in found["modes"]:
        note(
            f"law: {shape.name}, d = {slots}, graphs {mode['graphs']}: k = 0 takes "
            f"{mode['resident_s'] * 1e3:.2f} ms, t = {transfer_s * 1e3:.2f} ms; "
            f"T / max(L*c+g, k*t) p90 {mode['ratio_p90']:.3f}, worst {mode['ratio_worst']:.3f}"
        )
    return found


def _iterations(decoding: Batch, k: int, mode: Graphs, slots: int) -> list[float]:
    """Seconds of steady iterations; a captured one needs two more for each place in the ring."""
    captured = decoding.executor.graphs
    if captured is not None:
        captured.enabled = mode is not Graphs.OFF
    return decoding.iterations(k, warm_up=WARM_UP + (2 * slots if mode is not Graphs.OFF else 0))


def _units_share(rig: Rig, model: LoadedModel, decoding: Batch) -> float:
    """The share of an uncaptured iteration that passes inside the units: L*c / (L*c + g).

    Inside a captured graph no unit can be timed; its iteration is split by the same share.
    """
    clock = UnitClock(rig, model)
    walls_s = _iterations(decoding, 0, Graphs.OFF, 1)
    inside_s = clock.seconds()[-len(walls_s) :]
    clock.close()
    return min(1.0, statistics.median(inside_s) / statistics.median(walls_s))


def _mode(
    mode: Graphs,
    units: int,
    slots: int,
    share: float,
    transfer_s: float,
    resident_s: list[float],
    streamed_s: dict[int, list[float]],
) -> dict[str, Any]:
    whole_s = statistics.median(resident_s)
    unit_s, outside_s = whole_s * share / units, whole_s * (1 - share)
    points = []
    for k, seconds in streamed_s.items():
        measured_s = statistics.median(seconds)
        predicted_s = iteration_s(units, k, slots, unit_s, outside_s, transfer_s)
        floor_s = max(whole_s, k * transfer_s)
        points.append(
            {
                "k": k,
                "measured_s": measured_s,
                "predicted_s": predicted_s,
                "floor_s": floor_s,
                "ratio": measured_s / floor_s,
                "to_prediction": measured_s / predicted_s,
                **spread(seconds),
            }
        )
    ratios = [point["ratio"] for point in points]
    close = [point["to_prediction"] for point in points]
    return {
        "graphs": mode.value,
        "c_s": unit_s,
        "g_s": outside_s,
        "resident_s": whole_s,
        "resident_spread": spread(resident_s),
        "ratio_p90": float(np.percentile(ratios, 90)),
        "ratio_worst": max(ratios),
        "to_prediction_p10": float(np.percentile(close, 10)),
        "to_prediction_p90": float(np.percentile(close, 90)),
        "points": points,
    }
