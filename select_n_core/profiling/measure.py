"""Measuring: real steps of the executor on synthetic requests, and the record made of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from select_n_core.config import LinkConfig
from select_n_core.kv.cache import block_bytes
from select_n_core.links.base import Link
from select_n_core.links.open import open_link
from select_n_core.models.load import LoadedModel
from select_n_core.offload.placement import compute_threads, model_memory
from select_n_core.profiling.fit import fit_mode
from select_n_core.profiling.grid import (
    Effort,
    fitted_shapes,
    held_out_shapes,
    probe_shape,
    streamed_ks,
    streamed_shapes,
)
from select_n_core.profiling.heldout import judged, p95
from select_n_core.profiling.passes import BLOCK_TOKENS, Pass, Shape, middle, typical
from select_n_core.profiling.rig import Case, Rig, placed
from select_n_core.profiling.streamed import fit_streamed
from select_n_core.profiling.sweeps import Progress, run_sweeps
from select_n_core.profiling.transfers import copies_alone, copies_beside
from select_n_core.record import (
    ColdSample,
    ComputeSample,
    Fingerprint,
    ModeRecord,
    PerformanceRecord,
    StreamedSample,
    TransferSample,
)

__all__ = ["Effort", "Progress", "measure_record"]

_SLOTS = 2
# Of what is measured once, outside the sweeps; of the visits the least disturbed one counts.
_VISITS = 3
_REPEATS = 4


def measure_record(
    model: LoadedModel,
    here: Fingerprint,
    link_config: LinkConfig,
    effort: Effort,
    progress: Progress | None = None,
) -> PerformanceRecord:
    """Measure `model` and fit the latency model to the samples.

    The machine should be idle. The model's source must not have been released.

    Raises:
        DeviceMemoryError, HostMemoryError: too little memory is free to measure it.
    """
    report = progress if progress is not None else _silent
    begun_s = time.perf_counter()
    memory = model_memory(model, BLOCK_TOKENS)
    link, device = open_link(link_config)
    try:
        report("transfers", 0.0)
        copies = copies_alone(link, device, memory.unit_bytes, effort.sweeps * effort.repeats)
        report("units that come late", 0.01)
        late = _late(model, link, device, probe_shape(effort))
        found = _measured(model, link, device, effort, copies, report)
    finally:
        link.close()
    report("done", 1.0)
    units, noise = memory.units, found.noise
    cold = ColdSample(streamed_extra_s=0.0, stalled_extra_s=late.extra_s, stall_s=late.wait_s)
    resident: ModeRecord | None = None
    if found.resident:
        samples = _samples(found.resident)
        resident = fit_mode(samples, None, found.resident_threads, units, noise)
    record = PerformanceRecord(
        fingerprint=here,
        static_bytes=memory.static_bytes,
        unit_bytes=memory.unit_bytes,
        kv_bytes_per_token=block_bytes(model.kv, 1 << 8, model.dtype) >> 8,
        max_context=model.max_context,
        transfers=tuple(found.transfers),
        transfer_s=copies[0].alone_s,
        streaming=fit_mode(_samples(found.streaming), cold, compute_threads(1), units, noise),
        resident=resident,
        streamed=_streamed_samples(found.streamed),
        seconds=time.perf_counter() - begun_s,
    )
    record = fit_streamed(record)
    held_out = judged(record.latency_model(), found.held_out, _SLOTS)
    judgement = {
        "held_out": held_out,
        "held_out_p95": p95([sample.error for sample in held_out]),
        "held_out_noise": p95([sample.noise for sample in held_out]),
    }
    return record.model_copy(update=judgement)


@dataclass(frozen=True, slots=True)
class _Late:
    """A unit that compute waited `wait_s` for, and by how much longer it then took."""

    wait_s: float
    extra_s: float


@dataclass(frozen=True, slots=True)
class _Measured:
    """Passes of every case that counted, by what they are for."""

    transfers: list[TransferSample]
    streaming: Mapping[Case, list[Pass]]
    resident: Mapping[Case, list[Pass]]
    resident_threads: int
    streamed: Mapping[Case, list[Pass]]
    held_out: Mapping[Case, list[Pass]]
    noise: float


def _silent(_what: str, _done: float) -> None:
    return None


def _late(model: LoadedModel, link: Link, device: torch.device, probe: Shape) -> _Late:
    """With a single slot and all units streamed, compute waits for every copy."""
    with placed(model, link, device, [probe], slots=1) as rig:
        idle, stalled = (
            min((rig.run(case, _REPEATS) for _ in range(_VISITS)), key=_wall_s)
            for case in (Case(probe, rig.streaming_k), Case(probe, rig.room.most))
        )
    extra_s = typical(stalled, "streamed_s") - typical(idle, "home_s")
    return _Late(max(1e-6, typical(stalled, "wait_s")), max(0.0, extra_s))


def _wall_s(passes: Sequence[Pass]) -> float:
    return typical(passes, "wall_s")


def _measured(
    model: LoadedModel,
    link: Link,
    device: torch.device,
    effort: Effort,
    copies: Sequence[TransferSample],
    report: Progress,
) -> _Measured:
    shapes = fitted_shapes(effort, model.max_context)
    others = held_out_shapes(effort, model.max_context) if effort.held_out else []
    wanted = [probe_shape(effort), *shapes, *others]
    with placed(model, link, device, wanted, _SLOTS) as rig:
        shapes = [shape for shape in shapes if shape.blocks() <= rig.room.blocks]
        others = [shape for shape in others if shape.blocks() <= rig.room.blocks]
        beside = [s for s in streamed_shapes(effort, model.max_context) if s in shapes]
        probe = Case(probe_shape(effort), rig.streaming_k)
        report("threads", 0.02)
        rig.resident_threads = _resident_threads(rig, probe.shape)
        report("copies beside compute", 0.03)
        transfers = copies_beside(rig, probe, copies, effort.sweeps * effort.repeats)
        streaming = [Case(shape, rig.streaming_k) for shape in shapes]
        resident = [Case(shape, 0, resident=True) for shape in shapes if not rig.room.least]
        streamed = _streamed(rig, beside, copies[0].alone_s)
        held_out = _streamed(rig, others, copies[0].alone_s)
        if not rig.room.least:
            held_out += [Case(shape, 0, resident=True) for shape in others]
        passes, noise = run_sweeps(
            lambda case: rig.run(case, effort.repeats),
            list(dict.fromkeys([*streaming, *resident, *streamed, *held_out])),
            effort.sweeps,
            lambda what, done: report(what, 0.1 + 0.9 * done),
        )
        return _Measured(
            transfers=transfers,
            streaming={case: passes[case] for case in streaming},
            resident={case: passes[case] for case in resident},
            resident_threads=rig.resident_threads,
            streamed={case: passes[case] for case in streamed},
            held_out={case: passes[case] for case in held_out},
            noise=noise,
        )


def _resident_threads(rig: Rig, shape: Shape) -> int:
    """All cores are not always faster: layers of a small model are over before they share work."""
    if rig.room.least:
        return compute_threads(1)
    walls_s: dict[int, float] = {}
    for _ in range(_VISITS):
        for threads in {1, compute_threads(0)}:
            rig.resident_threads = threads
            wall_s = _wall_s(rig.run(Case(shape, 0, resident=True), _REPEATS))
            walls_s[threads] = min(wall_s, walls_s.get(threads, wall_s))
    return min(walls_s, key=walls_s.__getitem__)


def _streamed(rig: Rig, shapes: Sequence[Shape], transfer_s: float) -> list[Case]:
    """Every shape with a few units streamed, with more, or with most of them."""
    cases: list[Case] = []
    for turn, shape in enumerate(shapes):
        step_s = typical(rig.run(Case(shape, rig.room.least), 1), "wall_s")
        ks = streamed_ks(step_s, transfer_s, rig.room.most, turn)
        cases += [Case(shape, k) for k in ks if k >= rig.room.least]
    return cases


def _samples(passes: Mapping[Case, Sequence[Pass]]) -> list[ComputeSample]:
    return [_sample(case.shape, each) for case, each in passes.items()]


def _sample(shape: Shape, passes: Sequence[Pass]) -> ComputeSample:
    facts = shape.facts()
    walls_s = [each.wall_s for each in passes]
    return ComputeSample(
        decode_rows=facts.decode_rows,
        context_tokens=facts.context_tokens,
        prefill_tokens=facts.prefill_tokens,
        prefill_pairs=facts.prefill_pairs,
        chunks=facts.chunks,
        rows=len(shape.rows),
        unit_s=statistics.mean(each.home_s for each in middle(passes)),
        outside_s=statistics.mean(each.outside_s for each in middle(passes)),
        variation=statistics.pstdev(walls_s) / statistics.mean(walls_s),
        repeats=len(passes),
    )


def _streamed_samples(passes: Mapping[Case, Sequence[Pass]]) -> tuple[StreamedSample, ...]:
    samples = []
    for case, each in passes.items():
        facts = case.shape.facts()
        samples.append(
            StreamedSample(
                decode_rows=facts.decode_rows,
                context_tokens=facts.context_tokens,
                prefill_tokens=facts.prefill_tokens,
                prefill_pairs=facts.prefill_pairs,
                chunks=facts.chunks,
                rows=len(case.shape.rows),
                k=case.k,
                slots=_SLOTS,
                seconds=tuple(one.wall_s for one in each),
            )
        )
    return tuple(samples)
