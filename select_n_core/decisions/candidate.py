"""What one k gives: memory, times and goodput of a typical load, for the planner to choose from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from select_n_core.decisions.latency import LatencyModel, StepShape, chunk_pairs
from select_n_core.decisions.layout import ModelMemory, arena_bytes_for, device_layout
from select_n_core.decisions.order import interval_of_k
from select_n_core.slo import SLO

TPOT_MARGIN = 0.05  # share of the target kept back: a measured iteration varies by a few per cent


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """Everything the planner looks at.

    Attributes:
        prompt_tokens, output_tokens: of the typical request.
        rate_per_s: requests per second expected; None asks for the most the replica can do.
        max_batch: running requests at most. max_step_tokens: tokens per step at most (B_max).
        max_context: positions the model was made for.
        forced_k: a user's fixed interval, or what `policy` fixed; None lets the planner choose.
        policy: that fixed k; None where an interval did.
        unit_name: what several units are called, for people.
    """

    memory: ModelMemory
    latency: LatencyModel
    slo: SLO
    device_bytes: int
    host_bytes: int
    slots: int = 2
    max_batch: int = 16
    max_step_tokens: int = 256
    max_context: int = 1 << 30
    prompt_tokens: int = 128
    output_tokens: int = 64
    rate_per_s: float | None = None
    forced_k: int | None = None
    policy: str | None = None
    unit_name: str = "layers"


class Serving(NamedTuple):
    """Steady state with `batch` typical requests running.

    Attributes:
        iteration_s: of a decode step at mid-output.
        tpot_s: mean per token, prompt work of newcomers included.
        ttft_s: of a typical prompt joining the others, no queue.
        requests_per_s: finished.
    """

    batch: int
    iteration_s: float
    tpot_s: float
    ttft_s: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One k and what it gives.

    Attributes:
        device_bytes: the least arena that holds one typical request.
        host_bytes: of the mirrors. kv_tokens: KV capacity in all.
        serving: the running requests that maximise goodput within SLO and memory; where there
            are none, a single one.
        max_running: most running requests within the SLO, were there KV for all of them.
    """

    k: int
    interval: float | None
    device_bytes: int
    host_bytes: int
    kv_tokens: int
    serving: Serving
    max_running: int
    fits_device: bool
    fits_host: bool
    meets_tpot: bool
    meets_ttft: bool

    @property
    def feasible(self) -> bool:
        """Whether every limit holds with at least one running request."""
        return self.fits_device and self.fits_host and self.meets_tpot and self.meets_ttft

    @property
    def requests_per_s(self) -> float:
        """Requests per second within the SLO; 0 when infeasible."""
        return self.serving.requests_per_s if self.feasible else 0.0


def decode_shape(rows: int, prompt_tokens: int, output_tokens: int) -> StepShape:
    """A decode step of `rows` typical requests at mid-output."""
    return StepShape(decode_rows=rows, context_tokens=rows * (prompt_tokens + output_tokens // 2))


def evaluate(inputs: PlanInputs, k: int) -> Candidate:
    """Everything the planner compares about streaming pi's first `k` units."""
    memory = inputs.memory
    layout = device_layout(memory, inputs.device_bytes, k, inputs.slots, k_max(inputs, k))
    request_blocks = memory.blocks_of(inputs.prompt_tokens + inputs.output_tokens)
    blocks = len(layout.kv_ids(k)) if layout is not None else 0
    host_bytes = memory.mirrored_bytes(k)
    alone = serve(inputs, k, 1)
    max_running = _max_running(inputs, k)
    most = min(max_running, blocks // request_blocks)
    choices = [serve(inputs, k, batch) for batch in _batches(most)]
    return Candidate(
        k=k,
        interval=interval_of_k(k, memory.units),
        device_bytes=arena_bytes_for(memory, k, inputs.slots, request_blocks),
        host_bytes=host_bytes,
        kv_tokens=blocks * memory.block_tokens,
        serving=max(choices, key=lambda choice: choice.requests_per_s, default=alone),
        max_running=max_running,
        fits_device=blocks >= request_blocks,
        fits_host=host_bytes <= inputs.host_bytes,
        meets_tpot=_meets_tpot(inputs, alone),
        meets_ttft=_meets_ttft(inputs, alone),
    )


def k_max(inputs: PlanInputs, k_min: int) -> int:
    """What k may ever become in an arena whose layout begins at `k_min`.

    A ring needs a place beside the homes and one request's KV; where it has none, or k is the
    user's, k stands still.
    """
    memory = inputs.memory
    if inputs.forced_k is not None or not memory.host_cap(inputs.host_bytes):
        return k_min
    units = memory.units
    moving = device_layout(memory, inputs.device_bytes, k_min, inputs.slots, units)
    request_blocks = memory.blocks_of(inputs.prompt_tokens + inputs.output_tokens)
    return k_min if moving is None or len(moving.kv_ids(k_min)) < request_blocks else units


def serve(inputs: PlanInputs, k: int, batch: int) -> Serving:
    """`batch` typical requests at a time: each leaves after its last token and is replaced."""
    model, slots = inputs.latency, inputs.slots
    prompt, output = inputs.prompt_tokens, inputs.output_tokens
    decode_s = model.iteration_s(decode_shape(batch, prompt, output), k, slots)
    chunk_s, chunks = _prefill(inputs, decode_shape(batch - 1, prompt, output), k)
    # The others' prompts arrive once in each request's life and lengthen its iterations.
    extra_s = max(0.0, chunk_s - decode_s * chunks)
    tpot_s = decode_s + (batch - 1) * extra_s / output
    ttft_s = chunk_s if batch == 1 else decode_s + chunk_s
    rate = batch / (chunk_s + (output - 1) * tpot_s)
    return Serving(batch, decode_s, tpot_s, ttft_s, rate)


def _prefill(inputs: PlanInputs, beside: StepShape, k: int) -> tuple[float, int]:
    """Seconds and steps to compute a typical prompt beside the running rows."""
    room = max(1, inputs.max_step_tokens - beside.decode_rows)
    left, context, total_s, steps = inputs.prompt_tokens, 0, 0.0, 0
    while left:
        tokens = min(left, room)
        shape = replace(beside, prefill_tokens=tokens, prefill_pairs=chunk_pairs(context, tokens))
        total_s += inputs.latency.iteration_s(shape, k, inputs.slots)
        left, context, steps = left - tokens, context + tokens, steps + 1
    return total_s, steps


def _max_running(inputs: PlanInputs, k: int) -> int:
    """The largest batch within the SLO, by bisection: times grow with the batch."""
    low, high = 0, inputs.max_batch
    while low < high:
        middle = (low + high + 1) // 2
        serving = serve(inputs, k, middle)
        if _meets_tpot(inputs, serving) and _meets_ttft(inputs, serving):
            low = middle
        else:
            high = middle - 1
    return low


def _batches(most: int) -> list[int]:
    """Batch sizes to look at: every power of two, one between each two, and the most."""
    steps = {size for power in range(most.bit_length()) for size in (1 << power, 3 << power >> 1)}
    return sorted({size for size in steps if size <= most} | ({most} if most else set()))


def _meets_tpot(inputs: PlanInputs, serving: Serving) -> bool:
    return serving.tpot_s <= inputs.slo.tpot_s * (1 - TPOT_MARGIN)


def _meets_ttft(inputs: PlanInputs, serving: Serving) -> bool:
    return serving.ttft_s <= inputs.slo.ttft_s
