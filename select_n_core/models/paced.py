"""A paced model: the units of a performance record without weights; computing is waiting.

Its units have the record's sizes and are streamed like any others, but all they hold is a tag, so
that a unit which is not where it should be is noticed. What a unit computes is a span of time on
the timeline, the record's for this step. For runs of several replicas on a machine too small for
them; shown as *paced* wherever it is named.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.decisions.law import UnitCost
from select_n_core.errors import InputError, StreamingError
from select_n_core.links.paced import Timeline
from select_n_core.models.load import LoadedModel
from select_n_core.models.parts import Run
from select_n_core.models.seam import LayerKV
from select_n_core.record import PerformanceRecord
from select_n_core.units import ALIGNMENT, FlatUnit, named_tensors

VOCAB_SIZE = 512  # width of the logits: what draws from them costs time of a core
TOKEN = 320  # that is always drawn; it ends nothing
ANY_TOKEN = 1 << 31  # token ids of prompts lie below: nobody looks them up
_PEAK = 100.0  # above all other logits: drawn at every temperature
_GRID = math.log(1.01)
_LEAST_S = 1e-6


class PacedUnit(nn.Module):  # type: ignore[misc]
    """One unit: a tag in memory and a span of time.

    Attributes:
        tag: int64 [1], the unit's number; empty while the unit is not on the device.
    """

    tag: Tensor

    def __init__(self, number: int, timeline: Timeline) -> None:
        super().__init__()
        self._number = number
        self._timeline = timeline
        self.register_buffer("tag", torch.tensor([number]), persistent=False)

    def forward(self, cost: UnitCost) -> None:
        """Compute for as long as `cost` says of a unit that comes from where this one does."""
        if self.tag.tolist() != [self._number]:
            raise StreamingError(
                f"unit {self._number} computes with the bytes of unit {self.tag.tolist()}"
            )
        waited_s = self._timeline.take_wait()
        self._timeline.compute(cost.home_s if waited_s is None else cost.after_wait(waited_s))


class PacedModel(nn.Module):  # type: ignore[misc]
    """The units in call order, and what lies outside them.

    Args:
        latency: the record's.
        slots: of the staging ring that the units are streamed through.
    """

    def __init__(self, latency: LatencyModel, slots: int, timeline: Timeline) -> None:
        super().__init__()
        self.units = nn.ModuleList(PacedUnit(unit, timeline) for unit in range(latency.units))
        self._latency = latency
        self._slots = slots
        self._timeline = timeline
        self._busy: dict[tuple[int, int, int], float] = {}
        self._logits = torch.zeros(1, VOCAB_SIZE)
        self._logits[0, TOKEN] = _PEAK

    def forward(self, shape: StepShape, rows: int, k: int) -> Tensor:
        """One step of this shape with `rows` rows of logits while `k` units are streamed.

        Returns:
            [rows, vocab]: the same for every row.
        """
        count = max(1, rows)
        compute = self._compute(shape, count, k)
        unit_s, outside_s = compute.unit_s(shape), compute.outside(count)
        cost = compute.cost(unit_s, self._link_busy(compute, unit_s, outside_s, k))
        for unit in self.units:
            unit(cost)
        self._timeline.compute(outside_s)
        return self._logits.expand(rows, -1)

    def _link_busy(self, compute: ComputeModel, unit_s: float, outside_s: float, k: int) -> float:
        """See `LatencyModel.link_busy`; found once for all steps that take about as long."""
        key = (k, _on_grid(unit_s), _on_grid(outside_s))
        if key not in self._busy:
            self._busy[key] = self._latency.link_busy(compute, unit_s, outside_s, k, self._slots)
        return self._busy[key]

    def _compute(self, shape: StepShape, rows: int, k: int) -> ComputeModel:
        """The mode that runs: at k = 0 the faster one, as the latency model has it."""
        latency = self._latency
        if k or latency.resident is None:
            return latency.streaming
        return min(
            (latency.streaming, latency.resident),
            key=lambda mode: latency.took_s(
                mode, mode.unit_s(shape), mode.outside(rows), 0, self._slots
            ),
        )


def _on_grid(seconds: float) -> int:
    return round(math.log(max(seconds, _LEAST_S)) / _GRID)


def paced_model(record: PerformanceRecord, slots: int, timeline: Timeline) -> LoadedModel:
    """A model of the record's sizes and times.

    Raises:
        InputError: the record's sizes are no layout of a model.
    """
    for field, sizes in (
        ("static_bytes", (record.static_bytes,)),
        ("unit_bytes", record.unit_bytes),
    ):
        if any(size % ALIGNMENT for size in sizes):
            raise InputError(
                f"{field} of the record must be multiples of {ALIGNMENT}; "
                "run `select-n profile` to make one",
                field=field,
            )
    model = PacedModel(record.latency_model(), slots, timeline)
    layers = list(model.units)
    units = [FlatUnit(f"unit{unit}", named_tensors(layer)) for unit, layer in enumerate(layers)]
    for unit, nbytes in zip(units, record.unit_bytes, strict=True):
        unit.nbytes = nbytes
    static = FlatUnit("static", ())
    static.nbytes = record.static_bytes
    keys = record.kv_bytes_per_token // 2
    return LoadedModel(
        module=model,
        layers=layers,
        runs=[Run(unit.name, (layer,)) for unit, layer in zip(units, layers, strict=True)],
        units=units,
        static=static,
        kv=(LayerKV(1, keys, record.kv_bytes_per_token - keys),),  # all layers as one, in bytes
        dtype=torch.uint8,
        max_context=record.max_context,
        vocab_size=VOCAB_SIZE,
    )
