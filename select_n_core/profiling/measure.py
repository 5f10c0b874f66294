"""Measuring: real steps of the executor on synthetic requests, in both thread modes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from select_n_core.config import LinkConfig
from select_n_core.decisions.latency import StepShape, chunk_pairs
from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.kv.cache import block_bytes
from select_n_core.links.base import Direction, Link
from select_n_core.links.open import open_link
from select_n_core.memory.host import HostMap
from select_n_core.models.load import LoadedModel
from select_n_core.offload.executor import (
    Executor,
    Placement,
    StepRow,
    compute_threads,
    model_memory,
)
from select_n_core.profiling.fit import fit_mode
from select_n_core.record import (
    ColdSample,
    ComputeSample,
    Fingerprint,
    ModeRecord,
    PerformanceRecord,
    TransferSample,
)

_BLOCK_TOKENS = 32
_SLOTS = 2
_WARM_UP = 2

Progress = Callable[[str, float], None]  # what is measured now, share done


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure.

    Attributes:
        repeats: passes per shape. batches, contexts: the decode grid. chunks: prompt tokens.
    """

    repeats: int = 9
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, ...] = (64, 320)
    chunks: tuple[int, ...] = (16, 64, 256)

    @classmethod
    def brief(cls, max_batch: int, max_step_tokens: int) -> Effort:
        """A quarter of a minute: enough to serve, around what the replica will run."""
        batches = sorted({1, 4, min(8, max_batch), max_batch})
        chunks = sorted({32, max_step_tokens // 2, max_step_tokens})
        return cls(repeats=7, batches=tuple(batches), contexts=(64, 256), chunks=tuple(chunks))


@dataclass(frozen=True, slots=True)
class _Shape:
    """Synthetic requests of one pass: (context, new tokens) each."""

    rows: tuple[tuple[int, int], ...]

    def facts(self) -> StepShape:
        decode = [context for context, tokens in self.rows if tokens == 1]
        chunks = [(context, tokens) for context, tokens in self.rows if tokens > 1]
        return StepShape(
            decode_rows=len(decode),
            context_tokens=sum(decode),
            prefill_tokens=sum(tokens for _, tokens in chunks),
            prefill_pairs=sum(chunk_pairs(context, tokens) for context, tokens in chunks),
        )

    def blocks(self) -> int:
        return sum(-(-(context + tokens) // _BLOCK_TOKENS) for context, tokens in self.rows)


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
    memory = model_memory(model, _BLOCK_TOKENS)
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


def _shapes(effort: Effort, max_context: int) -> list[_Shape]:
    decode = [
        _Shape(((context, 1),) * batch)
        for batch in effort.batches
        for context in effort.contexts
        if context < max_context
    ]
    prefill = [
        _Shape(((context, tokens),))
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


def _fits(model: LoadedModel, device: torch.device, shapes: Sequence[_Shape]) -> bool:
    if device.type == "cpu":
        return True
    need = arena_bytes_for(
        model_memory(model, _BLOCK_TOKENS), 0, _SLOTS, max(shape.blocks() for shape in shapes)
    )
    return bool(need < 0.8 * torch.cuda.mem_get_info(device)[0])


def _mode(
    model: LoadedModel,
    link: Link,
    device: torch.device,
    shapes: Sequence[_Shape],
    effort: Effort,
    transfer_s: float | None,
    stage: _Stage,
) -> ModeRecord:
    """Measure one thread mode; `transfer_s` given means streaming, None means resident."""
    units = len(model.units)
    blocks = max(shape.blocks() for shape in shapes)
    probe = _Shape(((effort.contexts[0], 1),) * effort.batches[len(effort.batches) // 2])
    if transfer_s is None:
        threads = min(
            {1, compute_threads(0)},
            key=lambda count: _resident_pass_s(model, link, device, probe, effort, count),
        )
        with _placed(model, link, device, 0, _SLOTS, blocks, threads) as runner:
            samples = _sweep(runner, shapes, effort, stage)
        return fit_mode(samples, None, threads)
    # Few enough streamed units that copies never stall the shapes: their compute is measured clean.
    with _placed(model, link, device, 1, 1, blocks) as runner:
        pass_s = statistics.median(runner.passes(probe, effort.repeats).walls_s)
    calm = max(1, min(units - 1, int(0.6 * pass_s / transfer_s)))
    with _placed(model, link, device, calm, _SLOTS, blocks) as runner:
        samples = _sweep(runner, shapes, effort, stage)
        calm_pass = runner.passes(probe, effort.repeats)
    with _placed(model, link, device, units, 1, blocks) as runner:
        stalled = runner.passes(probe, effort.repeats)
    home_s = calm_pass.home_s
    cold = ColdSample(
        streamed_extra_s=max(0.0, calm_pass.streamed_s - home_s),
        stalled_extra_s=max(0.0, stalled.streamed_s - home_s),
        stall_s=max(1e-6, stalled.wait_s),
    )
    return fit_mode(samples, cold, compute_threads(1))


def _resident_pass_s(
    model: LoadedModel,
    link: Link,
    device: torch.device,
    shape: _Shape,
    effort: Effort,
    threads: int,
) -> float:
    """All cores are not always faster: layers of a small model are over before they share work."""
    with _placed(model, link, device, 0, _SLOTS, shape.blocks(), threads) as runner:
        return statistics.median(runner.passes(shape, effort.repeats).walls_s)


def _sweep(
    runner: _Runner, shapes: Sequence[_Shape], effort: Effort, stage: _Stage
) -> list[ComputeSample]:
    samples = []
    runner.passes(shapes[0], effort.repeats)  # the first shape would pay for cold caches
    for done, shape in enumerate(shapes):
        facts = shape.facts()
        mode = "streaming" if runner.executor.k else "resident"
        stage(f"{mode}: {facts.decode_rows} rows, {facts.tokens} tokens", done / len(shapes))
        passes = runner.passes(shape, effort.repeats)
        samples.append(
            ComputeSample(
                decode_rows=facts.decode_rows,
                context_tokens=facts.context_tokens,
                prefill_tokens=facts.prefill_tokens,
                prefill_pairs=facts.prefill_pairs,
                rows=len(shape.rows),
                unit_s=passes.home_s,
                outside_s=passes.outside_s,
                variation=statistics.pstdev(passes.walls_s) / statistics.mean(passes.walls_s),
                repeats=effort.repeats,
            )
        )
    return samples


@dataclass(frozen=True, slots=True)
class _Passes:
    """Medians over the passes of one shape; `home_s`, `streamed_s`, `wait_s` are per unit."""

    walls_s: tuple[float, ...]
    home_s: float
    streamed_s: float
    wait_s: float
    outside_s: float


class _Runner:
    """Runs synthetic steps on a placed model."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.close()

    def passes(self, shape: _Shape, repeats: int) -> _Passes:
        executor = self.executor
        names = [f"shape-{index}" for index in range(len(shape.rows))]
        for name, (context, tokens) in zip(names, shape.rows, strict=True):
            executor.blocks.reserve(name, context + tokens)
        rows = [
            StepRow(executor.blocks.table(name), context, [1] * tokens)
            for name, (context, tokens) in zip(names, shape.rows, strict=True)
        ]
        walls, home, streamed, waits, outside = [], [], [], [], []
        streaming = set(executor.streamed)
        try:
            for number in range(repeats + _WARM_UP):
                begun_s = time.perf_counter()
                executor.step(rows).argmax(-1).tolist()
                wall_s = time.perf_counter() - begun_s
                if number < _WARM_UP:
                    continue
                span = executor.streamer.span
                computes_s, waits_s = span.computes_s(), span.waits_s()
                at_home = [c for unit, c in enumerate(computes_s) if unit not in streaming]
                in_slot = [c for unit, c in enumerate(computes_s) if unit in streaming]
                walls.append(wall_s)
                home.append(statistics.mean(at_home or in_slot))
                streamed.append(statistics.mean(in_slot or at_home))
                waits.append(statistics.mean([waits_s[unit] for unit in streaming] or [0.0]))
                outside.append(wall_s - sum(computes_s) - sum(waits_s))
        finally:
            for name in names:
                executor.blocks.release(name)
        return _Passes(
            walls_s=tuple(walls),
            home_s=statistics.median(home),
            streamed_s=statistics.median(streamed),
            wait_s=statistics.median(waits),
            outside_s=max(0.0, statistics.median(outside)),
        )


def _placed(
    model: LoadedModel,
    link: Link,
    device: torch.device,
    k: int,
    slots: int,
    blocks: int,
    threads: int | None = None,
) -> _Runner:
    memory = model_memory(model, _BLOCK_TOKENS)
    placement = Placement(
        arena_bytes=arena_bytes_for(memory, k, slots, blocks) + 256,
        k=k,
        slots=slots,
        block_tokens=_BLOCK_TOKENS,
        threads=threads,
    )
    return _Runner(Executor(model, placement, link, device))
