"""Whether homes are worth lending where typical requests need none of it.

The planner that finds k = 0 best has looked at typical requests. Longer ones may still wait for
KV while there is time to stream. Mirrors cost host memory from the start, so they are pinned only
if some request length is served more often per second with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from select_n_core.decisions.candidate import Candidate, PlanInputs, evaluate
from select_n_core.decisions.interval import WORTH, frees_memory


def most_lent(inputs: PlanInputs, candidates: tuple[Candidate, ...]) -> int:
    """The largest k that pays while serving, where k = 0 is what typical requests want.

    Args:
        candidates: what every k gives typical requests.

    Returns:
        The largest k within the targets and host memory that has more KV than k = 0, if some k
        up to it serves requests of some length more often per second than k = 0 does; else 0.
    """
    resident = candidates[0]
    lending = [
        c.k
        for c in candidates
        if frees_memory(c.k, 0, inputs.slots) and c.feasible and c.kv_tokens > resident.kv_tokens
    ]
    pays = any(_serves_more(sized, lending) for sized in _lengths(inputs, resident))
    return max(lending) if lending and pays else 0


def _lengths(inputs: PlanInputs, resident: Candidate) -> Iterator[PlanInputs]:
    """Lengths of which k = 0 just fails to hold n at a time, the shortest for each n.

    Where many fit, one more is worth too little to look at every n.
    """
    size, output = inputs.memory.block_tokens, inputs.output_tokens
    blocks, n = resident.kv_tokens // size, 1
    while n <= inputs.max_batch:
        prompt = (blocks // n + 1) * size - output
        if 0 < prompt <= inputs.max_context - output:
            yield replace(inputs, prompt_tokens=prompt)
        n = n + 1 if n < 1 / WORTH else n * 5 // 4


def _serves_more(inputs: PlanInputs, lending: list[int]) -> bool:
    resident = evaluate(inputs, 0)
    request_blocks = inputs.memory.blocks_of(inputs.prompt_tokens + inputs.output_tokens)
    held = resident.kv_tokens // inputs.memory.block_tokens // request_blocks
    if resident.max_running <= held:
        return False  # time binds, not KV, and streaming gains no time
    least = resident.requests_per_s * (1 + WORTH)
    return any(evaluate(inputs, k).requests_per_s > least for k in lending)
