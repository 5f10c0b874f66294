"""The one latency model: seconds of an iteration, from what is in it and how much is streamed."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

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
    """

    decode_rows: int = 0
    context_tokens: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0

    @property
    def tokens(self) -> int:
        """Tokens computed in all."""
        return self.decode_rows + self.prefill_tokens

    def with_chunk(self, context: int, tokens: int) -> StepShape:
        """This step plus a prompt chunk of `tokens` after `context` cached tokens."""
        return replace(
            self,
            prefill_tokens=self.prefill_tokens + tokens,
            prefill_pairs=self.prefill_pairs + chunk_pairs(context, tokens),
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

    def __post_init__(self) -> None:
        tokens = [point[0] for point in self.token_grid]
        seconds = [point[1] for point in self.token_grid]
        if not tokens or tokens != sorted(set(tokens)) or seconds != sorted(seconds):
            raise InputError("token_grid must ascend in tokens and not descend in seconds")

    def unit_s(self, shape: StepShape) -> float:
        """c of this step: seconds of one unit at home."""
        return (
            self._by_tokens(shape.tokens)
            + self.per_context_token_s * shape.context_tokens
            + self.per_pair_s * shape.prefill_pairs
        )

    def outside(self, rows: int) -> float:
        """g of a step with `rows` rows of logits."""
        return self.outside_s + self.outside_per_row_s * rows

    def cost(self, shape: StepShape, link_busy: float = 0.0) -> UnitCost:
        """The unit cost that the law takes, for this step.

        Args:
            link_busy: share of the compute beside which copies run, 0 to 1.
        """
        slowed_s = self.unit_s(shape) * (1 + self.copy_slowdown * link_busy)
        home_s = round(slowed_s / _RESOLUTION_S) * _RESOLUTION_S
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
        streaming: compute while a link worker runs (k > 0).
        resident: compute at k = 0; None where the model was never measured so.
    """

    units: int
    transfer_s: float
    streaming: ComputeModel
    resident: ComputeModel | None = None
    unit_shares: tuple[float, ...] = ()

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
        return min(self._iteration_s(compute, shape, k, slots, count) for compute in modes)

    def _iteration_s(
        self, compute: ComputeModel, shape: StepShape, k: int, slots: int, rows: int
    ) -> float:
        outside_s = round(compute.outside(rows) / _RESOLUTION_S) * _RESOLUTION_S
        alone_s = self.units * compute.unit_s(shape) + outside_s
        transfers_s = tuple(self.transfer_s * share for share in self.unit_shares)

        def took_s(link_busy: float) -> float:
            cost = compute.cost(shape, link_busy)
            transfer_s = transfers_s or self.transfer_s
            return iteration_s(self.units, k, slots, cost, outside_s, transfer_s)

        if not k or not compute.copy_slowdown:
            return took_s(0.0)
        # Copies slow compute while both run, not while compute waits for them.
        stalled_s = max(0.0, took_s(0.0) - alone_s)
        return took_s(min(1.0, max(0.0, self.copies_s(k) - stalled_s) / alone_s))

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
