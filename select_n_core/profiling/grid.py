"""Which steps are measured: the grid that the model is fitted to, and others to judge it by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from select_n_core.profiling.passes import BLOCK_TOKENS, Shape


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure.

    Attributes:
        sweeps: undisturbed ones over all shapes. repeats: passes per shape in each.
        batches, contexts: the decode grid. chunks: prompt tokens.
        held_out: whether to measure shapes between those of the grid too, to judge the fit.
    """

    sweeps: int = 4
    repeats: int = 4
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, ...] = (64, 320)
    chunks: tuple[int, ...] = (16, 64, 256)
    held_out: bool = False

    @classmethod
    def brief(cls, max_batch: int, max_step_tokens: int) -> Effort:
        """Half a minute for a small model: enough to serve, around what the replica will run."""
        batches = sorted({1, 4, min(8, max_batch), max_batch})
        chunks = sorted({32, max_step_tokens // 2, max_step_tokens})
        return cls(
            sweeps=3, repeats=3, batches=tuple(batches), contexts=(64, 256), chunks=tuple(chunks)
        )

    @classmethod
    def full(cls) -> Effort:
        """Minutes for a small model: 20 repeats of every shape, and a verdict on the fit."""
        return cls(
            sweeps=10,  # a shared machine drifts from visit to visit, far more than within one
            repeats=2,
            batches=(1, 2, 4, 8, 16, 32),
            contexts=(64, 512),
            chunks=(16, 40, 100, 256),
            held_out=True,
        )


def probe_shape(effort: Effort) -> Shape:
    """The step of the grid on which everything but its shape is tried: it decodes."""
    return _decode(effort.batches[len(effort.batches) // 2], effort.contexts[0])


def fitted_shapes(effort: Effort, max_context: int) -> list[Shape]:
    """Decode, prompt and mixed steps of the grid, as far as the model's context reaches."""
    low, high = effort.contexts[0], effort.contexts[-1]
    some, most = effort.batches[len(effort.batches) // 2], effort.batches[-1]
    shapes = [_decode(batch, context) for batch in effort.batches for context in effort.contexts]
    shapes += [_chunk(context, tokens) for tokens in effort.chunks for context in (0, high)]
    shapes += [
        _joined(_decode(rows, context), chunk)
        for tokens in effort.chunks[::-2]
        for rows, context, chunk in (
            (some, high, _chunk(0, tokens)),
            (most, low, _chunk(high, tokens)),
        )
    ]
    half = _chunk(0, max(2, effort.chunks[(len(effort.chunks) - 1) // 2] // 2))
    shapes.append(_joined(_decode(some, low), half, half))
    return _within(shapes, max_context)


def streamed_shapes(effort: Effort, max_context: int) -> list[Shape]:
    """Those of the grid that are also measured with units streamed: of every kind one or two."""
    low, high = effort.contexts[0], effort.contexts[-1]
    some, most = effort.batches[len(effort.batches) // 2], effort.batches[-1]
    shapes = [
        _decode(some, low),
        _chunk(0, effort.chunks[-2:][0]),
        _decode(most, low),
        _joined(_decode(some, high), _chunk(0, effort.chunks[::-2][-1])),
    ]
    measured = set(fitted_shapes(effort, max_context))
    return [shape for shape in _within(shapes, max_context) if shape in measured]


def held_out_shapes(effort: Effort, max_context: int) -> list[Shape]:
    """Steps between those of the grid, none of their sizes in it.

    Decode, prompt and mixed steps by turns.
    """
    batches, contexts, chunks = map(_between, (effort.batches, effort.contexts, effort.chunks))
    if not (batches and contexts and chunks):
        return []
    context = contexts[-1]
    decodes = [_decode(batch, context) for batch in batches[-3:]]
    prompts = [
        _chunk(before, tokens) for tokens, before in zip(chunks, (0, context, 0), strict=False)
    ]
    mixed = [
        _joined(_decode(batch, context), _chunk(before, tokens))
        for batch, tokens, before in zip(
            batches[-3:], reversed(chunks), (context, 0, context // 2), strict=False
        )
    ]
    shapes = [
        shapes[index]
        for index in range(3)
        for shapes in (decodes, prompts, mixed)
        if index < len(shapes)
    ]
    measured = set(fitted_shapes(effort, max_context))
    return [shape for shape in _within(shapes, max_context) if shape not in measured]


def streamed_ks(step_s: float, transfer_s: float, most: int, turn: int) -> tuple[int, ...]:
    """Two of three k by turns: copies that hide, that balance, that bind.

    Args:
        step_s: of the shape at k = 0. most: units that may be streamed.
    """
    top = min(float(most), 1.6 * step_s / transfer_s)
    shares = (1 / 3, 2 / 3, 1.0)
    chosen = (shares[turn % 3], shares[(turn + 1) % 3])
    return tuple(sorted({max(1, round(share * top)) for share in chosen}))


def _decode(rows: int, context: int) -> Shape:
    """Contexts evenly from a half to one and a half of `context`, as those of a batch differ."""
    contexts = [round((0.5 + (index + 0.5) / rows) * context) for index in range(rows)]
    # A row that begins a block also clears it: a step in every BLOCK_TOKENS, not the usual one.
    return Shape(tuple((context + (context % BLOCK_TOKENS == 0), 1) for context in contexts))


def _chunk(context: int, tokens: int) -> Shape:
    return Shape(((context, tokens),))


def _joined(*shapes: Shape) -> Shape:
    return Shape(tuple(row for shape in shapes for row in shape.rows))


def _between(sizes: Sequence[int]) -> list[int]:
    """Geometric means of neighbours that leave room for one."""
    means = [round(math.sqrt(low * high)) for low, high in pairwise(sizes)]
    return [mean for mean in means if mean not in sizes]


def _within(shapes: Iterable[Shape], max_context: int) -> list[Shape]:
    kept = [
        shape
        for shape in shapes
        if all(context + tokens <= max_context for context, tokens in shape.rows)
    ]
    return list(dict.fromkeys(kept))
