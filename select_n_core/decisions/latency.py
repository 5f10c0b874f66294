"""The one latency model: seconds of an iteration, from what is in it and how much is streamed."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass, replace

from select_n_core.decisions.law import UnitCost, iteration_s
from select_n_core.decisions.order import offload_order
from select_n_core.errors import InputError

_RESOLUTION_S = (
    1e-6  # inputs to the recurrence are rounded to it, so that equal steps share a result
)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one iteration computes.

    Attributes:
        decode_rows: requests that decode one token.
        context_tokens: summed over them, tokens in the cache that they attend to.
        prefill_tokens: prompt tokens computed in this step.
        prefill_pairs: query-key pairs of those, summed over the chunks.
        chunks: requests whose prompt tokens these are; where it is not counted, one.
    """

    decode_rows: int = 0
    context_tokens: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    chunks: int = 0

    @property
    def tokens(self) -> int:
        """Tokens computed in all."""
        return self.decode_rows + self.prefill_tokens

    @property
    def parts(self) -> int:
        """Parts that attend by themselves, at least one: each chunk, and all decoding rows."""
        if not self.prefill_tokens:
            return 1
        return (self.chunks or 1) + (self.decode_rows > 0)

    def with_chunk(self, context: int, tokens: int) -> StepShape:
        """This step plus a prompt chunk of `tokens` after `context` cached tokens."""
        return replace(
            self,
            prefill_tokens=self.prefill_tokens + tokens,
            prefill_pairs=self.prefill_pairs + chunk_pairs(context, tokens),
            chunks=self.chunks + (tokens > 0),
        )


def chunk_pairs(context: int, tokens: int) -> int:
    """Query-key pairs of a causal chunk of `tokens` after `context` cached tokens."""
    return tokens * context + tokens * (tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class ComputeModel:
    """Compute of one unit and of what lies outside the units, in one thread mode.

    Attributes:
        token_grid: (tokens, seconds per unit at home) ascending in both; linear in between.
        per_context_token_s: per unit and cached token read by decoding rows.
        per_pair_s: per unit and query-key pair of prompt chunks.
        outside_s: g at no rows. outside_per_row_s: per row of logits.
        streamed_extra_s, stalled_extra_s, stall_s: see `UnitCost`; extras are added to a unit.
        copy_slowdown: share by which units grow while the link is always busy: copies and
            compute share the memory.
        per_part_s: per unit and part of a step beyond the first that attends by itself: every
            prompt chunk is one, and so are the decoding rows together.
    """

    token_grid: tuple[tuple[int, float], ...]
    per_context_token_s: float
    per_pair_s: float
    outside_s: float
    outside_per_row_s: float
    streamed_extra_s: float = 0.0
    stalled_extra_s: float = 0.0
    stall_s: float = 1.0
    copy_slowdown: float = 0.0
    per_part_s: float = 0.0

    def __post_init__(self) -> None:
        tokens = [point[0] for point in self.token_grid]
        seconds = [point[1] for point in self.token_grid]
        if not tokens or tokens != sorted(set(tokens)) or seconds != sorted(seconds):
            raise InputError("token_grid must ascend in tokens and not descend in seconds")
        for name, value in asdict(self).items():
            if name != "token_grid" and not 0 <= value < float("inf"):
                raise InputError(f"{name} must be a number of 0 or more, got {value}", field=name)

    def unit_s(self, shape: StepShape) -> float:
        """c of this step: seconds of one unit at home."""
        return (
            self._by_tokens(shape.tokens)
            + self.per_context_token_s * shape.context_tokens
            + self.per_pair_s * shape.prefill_pairs
            + self.per_part_s * (shape.parts - 1)
        )

    def outside(self, rows: int) -> float:
        """g of a step with `rows` rows of logits."""
        return self.outside_s + self.outside_per_row_s * rows

    def cost(self, unit_s: float, link_busy: float = 0.0) -> UnitCost:
        """The unit cost that the law takes, where a unit at home takes `unit_s`.

        Args:
            link_busy: share of the compute beside which copies run, 0 to 1.
        """
        home_s = _rounded(unit_s * (1 + self.copy_slowdown * link_busy))
        return UnitCost(
            home_s=home_s,
            streamed_s=home_s + self.streamed_extra_s,
            stalled_s=home_s + max(self.streamed_extra_s, self.stalled_extra_s),
            stall_s=self.stall_s,
        )

    def _by_tokens(self, tokens: int) -> float:
        grid = self.token_grid
        if tokens <= grid[0][0] or len(grid) == 1:
            return grid[0][1]
        upper = min(max(1, bisect_right(grid, (tokens, float("inf")))), len(grid) - 1)
        (x0, y0), (x1, y1) = grid[upper - 1], grid[upper]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Iteration time of one model on one device and link.

    Attributes:
        units: L.
        transfer_s: t, of the largest unit, host to device.
        unit_shares: bytes of every unit against the largest, where they differ; else empty.
        compute_scale: how many times longer all compute takes than recorded.
        share_s: seconds that the largest unit's bytes take of a granted share of a bus; no step is
            faster than all it streams takes so. 0 where the link is not shared.
        streaming: compute while a link worker runs (k > 0).
        resident: compute at k = 0; None where the model was never measured so.
    """

    units: int
    transfer_s: float
    streaming: ComputeModel
    resident: ComputeModel | None = None
    unit_shares: tuple[float, ...] = ()
    compute_scale: float = 1.0
    share_s: float = 0.0

    def copies_s(self, k: int) -> float:
        """Seconds per step in which the weights of `k` units use the link."""
        if not self.unit_shares:
            return k * self.transfer_s
        shares = (self.unit_shares[unit] for unit in offload_order(self.units)[:k])
        return self.transfer_s * sum(shares)

    def iteration_s(
        self, shape: StepShape, k: int, slots: int, *, rows: int | None = None
    ) -> float:
        """Seconds of one step; `rows` of logits default to one per decoding row, at least 1."""
        count = max(1, shape.decode_rows) if rows is None else rows
        modes = [self.streaming]
        if k == 0 and self.resident is not None:
            modes.append(self.resident)  # whichever is faster may run when nothing is streamed
        return min(
            self.took_s(compute, compute.unit_s(shape), compute.outside(count), k, slots)
            for compute in modes
        )

    def took_s(
        self, compute: ComputeModel, unit_s: float, outside_s: float, k: int, slots: int
    ) -> float:
        """Seconds of a step in which a unit at home is recorded with `unit_s`, g with `outside_s`.

        In one of the two modes; the formula that `iteration_s` and its tables share.
        """
        busy = self.link_busy(compute, unit_s, outside_s, k, slots)
        step_s = self._beside(compute, unit_s, outside_s, k, slots, busy)
        return max(step_s, self.share_s * self.copies_s(k) / self.transfer_s)

    def link_busy(
        self, compute: ComputeModel, unit_s: float, outside_s: float, k: int, slots: int
    ) -> float:
        """Share of the compute beside which copies run, 0 to 1, where they slow it; see `took_s`.

        Copies slow compute while both run, not while compute waits for them.
        """
        if not k or not compute.copy_slowdown:
            return 0.0
        alone_s = self.compute_scale * (self.units * unit_s + _rounded(outside_s))
        calm_s = self._beside(compute, unit_s, outside_s, k, slots, 0.0)
        busy_s = max(0.0, self.copies_s(k) - max(0.0, calm_s - alone_s))
        return min(1.0, busy_s / alone_s)

    def _beside(
        self,
        compute: ComputeModel,
        unit_s: float,
        outside_s: float,
        k: int,
        slots: int,
        link_busy: float,
    ) -> float:
        scale = self.compute_scale  # T(a*c, a*g, t) = a * T(c, g, t/a)
        transfer_s = _rounded(self.transfer_s / scale)
        transfers_s = tuple(transfer_s * share for share in self.unit_shares)
        cost = compute.cost(unit_s, link_busy)
        return scale * iteration_s(
            self.units, k, slots, cost, _rounded(outside_s), transfers_s or transfer_s
        )

    def compute_s(self, shape: StepShape, k: int, step_s: float) -> float:
        """Of a step that takes `step_s`, the seconds in which nothing waits for copies."""
        if k == 0:
            return step_s
        compute, scale = self.streaming, self.compute_scale
        units_s = scale * self.units * compute.unit_s(shape)
        alone_s = units_s + scale * compute.outside(max(1, shape.decode_rows))
        stalled_s = max(0.0, step_s - alone_s)
        busy = min(1.0, max(0.0, self.copies_s(k) - stalled_s) / alone_s)
        cooled = min(1.0, stalled_s / k / (scale * compute.stall_s))
        colder_s = max(0.0, compute.stalled_extra_s - compute.streamed_extra_s) * cooled
        extra_s = scale * k * (compute.streamed_extra_s + colder_s)
        return min(step_s, alone_s + units_s * compute.copy_slowdown * busy + extra_s)

    def free_tokens(self, shape: StepShape, k: int, slots: int, limit: int) -> int:
        """Prompt tokens that can join the step at no cost in time, up to `limit` (B*).

        At k = 0 there are none; above, tokens are free until compute outlasts the copies.
        """
        if k == 0:
            return 0
        before_s = self.iteration_s(shape, k, slots)
        return self.tokens_within(shape, k, slots, before_s * 1.001, limit)

    def tokens_within(
        self, shape: StepShape, k: int, slots: int, budget_s: float, limit: int
    ) -> int:
        """The most prompt tokens (of a fresh prompt) that keep the step within `budget_s`."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.iteration_s(shape.with_chunk(0, middle), k, slots) <= budget_s:
                low = middle
            else:
                high = middle - 1
        return low


def _rounded(seconds: float) -> float:
    return round(seconds / _RESOLUTION_S) * _RESOLUTION_S
