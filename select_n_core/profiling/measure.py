"""Measuring: real steps of the executor on synthetic requests, in both thread modes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from select_n_core.config import LinkConfig
from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.kv.cache import block_bytes
from select_n_core.links.base import Direction, Link
from select_n_core.links.open import open_link
from select_n_core.memory.host import HostMap
from select_n_core.models.load import LoadedModel
from select_n_core.offload.executor import Executor
from select_n_core.offload.placement import compute_threads, model_memory
from select_n_core.profiling.fit import fit_mode
from select_n_core.profiling.passes import (
    BLOCK_TOKENS,
    Pass,
    Shape,
    Sweep,
    placed,
    quiet,
    run_passes,
    sweep_s,
    undisturbed,
)
from select_n_core.record import (
    ColdSample,
    ComputeSample,
    Fingerprint,
    ModeRecord,
    PerformanceRecord,
    TransferSample,
)

_SLOTS = 2
_WARM_UP = 2
_MOST_SWEEPS = 2  # times those asked for, until enough are undisturbed

Progress = Callable[[str, float], None]  # what is measured now, share done


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure.

    Attributes:
        sweeps: undisturbed ones over all shapes. repeats: passes per shape in each.
        batches, contexts: the decode grid. chunks: prompt tokens.
    """

    sweeps: int = 4
    repeats: int = 4
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, ...] = (64, 320)
    chunks: tuple[int, ...] = (16, 64, 256)

    @classmethod
    def brief(cls, max_batch: int, max_step_tokens: int) -> Effort:
        """Half a minute for a small model: enough to serve, around what the replica will run."""
        batches = sorted({1, 4, min(8, max_batch), max_batch})
        chunks = sorted({32, max_step_tokens // 2, max_step_tokens})
        return cls(
            sweeps=3, repeats=3, batches=tuple(batches), contexts=(64, 256), chunks=tuple(chunks)
        )


def measure_record(
    model: LoadedModel,
    here: Fingerprint,
    link_config: LinkConfig,
    effort: Effort,
    progress: Progress | None = None,
) -> PerformanceRecord:
    """Measure `model` and fit the latency model to the samples.

    The machine should be idle. The model's source must not have been released.
    """
    report = progress if progress is not None else _silent
    begun_s = time.perf_counter()
    memory = model_memory(model, BLOCK_TOKENS)
    link, device = open_link(link_config)
    try:
        report("transfers", 0.0)
        transfers = _transfers(link, device, max(memory.unit_bytes), effort.repeats)
        transfer_s = statistics.median(transfers[0].seconds)
        shapes = _shapes(effort, model.max_context)
        streaming = _mode(
            model, link, device, shapes, effort, transfer_s, _Stage(report, 0.05, 0.6)
        )
        resident = None
        if _fits(model, device, shapes):
            resident = _mode(model, link, device, shapes, effort, None, _Stage(report, 0.65, 0.35))
    finally:
        link.close()
    report("done", 1.0)
    return PerformanceRecord(
        fingerprint=here,
        static_bytes=memory.static_bytes,
        unit_bytes=memory.unit_bytes,
        kv_bytes_per_token=block_bytes(model.kv, 1 << 8, model.dtype) >> 8,
        max_context=model.max_context,
        transfers=transfers,
        transfer_s=transfer_s,
        streaming=streaming,
        resident=resident,
        seconds=time.perf_counter() - begun_s,
    )


@dataclass(frozen=True, slots=True)
class _Stage:
    """A part of the progress bar."""

    report: Progress
    start: float
    share: float

    def __call__(self, what: str, done: float) -> None:
        self.report(what, self.start + self.share * done)


def _silent(_what: str, _done: float) -> None:
    return None


def _shapes(effort: Effort, max_context: int) -> list[Shape]:
    decode = [
        Shape(((context, 1),) * batch)
        for batch in effort.batches
        for context in effort.contexts
        if context < max_context
    ]
    prefill = [
        Shape(((context, tokens),))
        for tokens in effort.chunks
        for context in (0, effort.contexts[-1])
        if context + tokens <= max_context
    ]
    return decode + prefill


def _transfers(
    link: Link, device: torch.device, nbytes: int, repeats: int
) -> tuple[TransferSample, ...]:
    host = HostMap(nbytes)
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    link.register(host.bytes)
    samples = []
    for direction in Direction:
        seconds = []
        for _ in range(repeats + _WARM_UP):
            ends = (target, host.bytes)
            to, source = ends if direction is Direction.TO_DEVICE else ends[::-1]
            copy = link.copy(to, source, kind="profile", direction=direction)
            link.drain()
            seconds.append(copy.duration_s())
        samples.append(
            TransferSample(
                direction=direction.value, nbytes=nbytes, seconds=tuple(seconds[_WARM_UP:])
            )
        )
    link.unregister(host.bytes)
    host.close()
    return tuple(samples)


def _fits(model: LoadedModel, device: torch.device, shapes: Sequence[Shape]) -> bool:
    if device.type == "cpu":
        return True
    need = arena_bytes_for(
        model_memory(model, BLOCK_TOKENS), 0, _SLOTS, max(shape.blocks() for shape in shapes)
    )
    return bool(need < 0.8 * torch.cuda.mem_get_info(device)[0])


def _mode(
    model: LoadedModel,
    link: Link,
    device: torch.device,
    shapes: Sequence[Shape],
    effort: Effort,
    transfer_s: float | None,
    stage: _Stage,
) -> ModeRecord:
    """Measure one thread mode; `transfer_s` given means streaming, None means resident."""
    blocks = max(shape.blocks() for shape in shapes)
    probe = Shape(((effort.contexts[0], 1),) * effort.batches[len(effort.batches) // 2])

    def pass_s(k: int, slots: int, threads: int | None = None) -> float:
        with placed(
            model, link, device, k=k, slots=slots, blocks=probe.blocks(), threads=threads
        ) as executor:
            return quiet(run_passes(executor, probe, effort.repeats), "wall_s")

    if transfer_s is None:
        # All cores are not always faster: layers of a small model are over before they share work.
        threads = min({1, compute_threads(0)}, key=lambda count: pass_s(0, _SLOTS, count))
        with placed(
            model, link, device, k=0, slots=_SLOTS, blocks=blocks, threads=threads
        ) as executor:
            samples, noise = _sweep(executor, shapes, effort, stage)
        return fit_mode(samples, None, threads, noise)
    with placed(model, link, device, k=1, slots=1, blocks=blocks) as executor:
        samples, noise = _sweep(executor, shapes, effort, stage)
    cold = _cold(model, link, device, probe, effort, transfer_s)
    return fit_mode(samples, cold, compute_threads(1), noise)


def _cold(
    model: LoadedModel,
    link: Link,
    device: torch.device,
    probe: Shape,
    effort: Effort,
    transfer_s: float,
) -> ColdSample:
    """What streaming costs compute: an idle link, a busy one that stalls nobody, and stalls."""
    units, blocks = len(model.units), probe.blocks()
    idle: list[Pass] = []
    busy: list[Pass] = []
    stalled: list[Pass] = []
    calm = 1
    for _ in range(effort.sweeps):
        with placed(model, link, device, k=1, slots=1, blocks=blocks) as executor:
            idle += run_passes(executor, probe, effort.repeats)
        pass_s = quiet(idle, "wall_s")
        calm = max(1, min(units - 1, int(0.6 * pass_s / transfer_s)))
        with placed(model, link, device, k=calm, slots=_SLOTS, blocks=blocks) as executor:
            busy += run_passes(executor, probe, effort.repeats)
        with placed(model, link, device, k=units, slots=1, blocks=blocks) as executor:
            stalled += run_passes(executor, probe, effort.repeats)
    idle_s, busy_s = quiet(idle, "home_s"), quiet(busy, "home_s")
    # At k = 1 the link is busy a little too: the slope is over what `calm` adds.
    more_busy = (calm - 1) * transfer_s / quiet(idle, "wall_s")
    return ColdSample(
        streamed_extra_s=max(0.0, quiet(busy, "streamed_s") - busy_s),
        stalled_extra_s=max(0.0, quiet(stalled, "streamed_s") - idle_s),
        stall_s=max(1e-6, quiet(stalled, "wait_s")),
        copy_slowdown=max(0.0, (busy_s / idle_s - 1) / more_busy) if more_busy > 0.1 else 0.0,
    )


def _sweep(
    executor: Executor, shapes: Sequence[Shape], effort: Effort, stage: _Stage
) -> tuple[list[ComputeSample], float]:
    """Every shape once per sweep, so that a neighbour's burst does not hit all of one shape.

    Sweeps go on until enough of them were undisturbed; only these count. Returns the samples and
    the noise of all sweeps.
    """
    mode = "streaming" if executor.k else "resident"
    sweeps: list[Sweep] = []
    furthest = 0.0
    run_passes(executor, shapes[0], effort.repeats)  # the first shape would pay for cold caches
    while (missing := effort.sweeps - len(undisturbed(sweeps))) > 0:
        if len(sweeps) == _MOST_SWEEPS * effort.sweeps:
            break
        sweep: Sweep = {}
        for number, shape in enumerate(shapes):
            facts = shape.facts()
            run = len(sweeps) + number / len(shapes)
            what = f"{mode}: {facts.decode_rows} rows, {facts.tokens} tokens"
            furthest = max(furthest, run / (len(sweeps) + missing))
            stage(what, furthest)
            sweep[shape] = run_passes(executor, shape, effort.repeats)
        sweeps.append(sweep)
    kept = undisturbed(sweeps)
    samples = [
        _sample(shape, [each for sweep in kept for each in sweep[shape]]) for shape in shapes
    ]
    walls_s = [sweep_s(sweep) for sweep in sweeps]
    return samples, statistics.median(walls_s) / min(walls_s) - 1


def _sample(shape: Shape, passes: Sequence[Pass]) -> ComputeSample:
    facts = shape.facts()
    walls_s = [each.wall_s for each in passes]
    return ComputeSample(
        decode_rows=facts.decode_rows,
        context_tokens=facts.context_tokens,
        prefill_tokens=facts.prefill_tokens,
        prefill_pairs=facts.prefill_pairs,
        rows=len(shape.rows),
        unit_s=quiet(passes, "home_s"),
        outside_s=quiet(passes, "outside_s"),
        variation=statistics.pstdev(walls_s) / statistics.mean(walls_s),
        repeats=len(passes),
    )
