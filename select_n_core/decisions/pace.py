"""Step times as fast as a step needs them: the latency model, tabulated as it is asked.

At k = 0 the model is a formula. Above, it is a recurrence over many units; its time is tabulated
over the compute of one unit, on a grid of close ratios, and read off by linear interpolation.
Time over compute is convex, so that this errs on the late side.
"""

from __future__ import annotations

import math
from functools import lru_cache

from select_n_core.decisions.latency import LatencyModel, StepShape, chunk_pairs

_RATIO = 1.04  # between neighbours on the grid
_LOG = math.log(_RATIO)
_LEAST_S = 1e-9
_FREE = 1.001  # a step that takes a thousandth longer takes as long


class Pace:
    """Seconds of steps with `k` units streamed through `slots` slots."""

    def __init__(self, model: LatencyModel, k: int, slots: int) -> None:
        self._model = model
        self._k = k
        self._slots = slots
        self._knots: dict[tuple[int, int], float] = {}
        self._pieces: dict[tuple[int, int], tuple[float, float, float]] = {}
        self._prompts: dict[tuple[int, int], float] = {}

    @property
    def copies_s(self) -> float:
        """Seconds per step in which weights use the link."""
        return self._model.copies_s(self._k)

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step."""
        if not self._k:
            return self._model.iteration_s(shape, 0, self._slots)
        unit_s = max(_LEAST_S, self._model.streaming.unit_s(shape))
        rows = _rounded(max(1, shape.decode_rows))
        below = math.floor(math.log(unit_s) / _LOG)
        piece = self._pieces.get((below, rows)) or self._look(below, rows)
        low_s, took_s, slope = piece
        return took_s + (unit_s - low_s) * slope

    def compute_s(self, shape: StepShape) -> float:
        """Of one step, the seconds in which nothing waits for copies."""
        return self._model.compute_s(shape, self._k, self.step_s(shape))

    def tokens_within(self, shape: StepShape, budget_s: float, limit: int, context: int = 0) -> int:
        """The most prompt tokens after `context` cached ones that keep a step within `budget_s`."""
        if limit <= 0 or self.step_s(with_prompt(shape, limit, context)) <= budget_s:
            return max(0, limit)
        low, high = 0, limit - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.step_s(with_prompt(shape, middle, context)) <= budget_s:
                low = middle
            else:
                high = middle - 1
        return low

    def free_tokens(self, shape: StepShape, limit: int) -> int:
        """Prompt tokens that the copies hide (B*), up to `limit`; none at k = 0."""
        if not self._k:
            return 0
        return self.tokens_within(shape, self.step_s(shape) * _FREE, limit)

    def prompt_s(self, tokens: int, most: int) -> float:
        """Seconds of a fresh prompt alone on the device, `most` tokens per step at most."""
        key = (tokens, most)
        seconds = self._prompts.get(key)
        if seconds is None:
            chunk = max(1, min(tokens, most))
            seconds = -(-tokens // chunk) * self.step_s(with_prompt(StepShape(), chunk, tokens))
            self._prompts[key] = seconds
        return seconds

    def _look(self, below: int, rows: int) -> tuple[float, float, float]:
        """Of the line between two knots: where it begins, its value there, and its slope."""
        low_s = _RATIO**below
        took_s = self._knot(below, rows)
        slope = (self._knot(below + 1, rows) - took_s) / (low_s * (_RATIO - 1))
        self._pieces[below, rows] = low_s, took_s, slope
        return low_s, took_s, slope

    def _knot(self, power: int, rows: int) -> float:
        """Seconds of a step whose units take `_RATIO ** power` each."""
        key = (power, rows)
        seconds = self._knots.get(key)
        if seconds is None:
            compute = self._model.streaming
            seconds = self._model.took_s(
                compute, _RATIO**power, compute.outside(rows), self._k, self._slots
            )
            self._knots[key] = seconds
        return seconds


@lru_cache(maxsize=1024)
def pace_of(model: LatencyModel, k: int, slots: int) -> Pace:
    """The pace of this model; its table is kept and grows as it is used."""
    return Pace(model, k, slots)


def with_prompt(shape: StepShape, tokens: int, context: int = 0, chunks: int = 1) -> StepShape:
    """`StepShape.with_chunk`, made faster; the tokens may be of several prompts."""
    return StepShape(
        shape.decode_rows,
        shape.context_tokens,
        shape.prefill_tokens + tokens,
        shape.prefill_pairs + chunk_pairs(context, tokens),
        shape.chunks + chunks,
    )


def _rounded(rows: int) -> int:
    """Up to five binary digits, so that few tables serve all batches."""
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step
