"""What a step's decision costs: the scheduler alone, with 256 requests running.

    python -m benchmarks.scheduler --json

Everything but the model is real: `plan_step`, the block table, the tenants' counters. A virtual
clock advances by the predicted time of each step, so that slack, misses, turns of k, admissions
and preemptions come about as they would while serving. Prompts and answers are drawn at random;
every other prompt begins as many of its tenant do, and what is cached of it is shared. Answers are
longer than expected, so that blocks run out. A cache that is swapped out moves no
bytes here: what is timed is deciding and keeping the books, per iteration, arrivals and ends
included. Moving the edge of the block table when k turns is the executor's work, and stands apart.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from typing import Any

import numpy as np

from benchmarks.environment import Provenance, note, publish
from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape, chunk_pairs
from select_n_core.decisions.pace import pace_of
from select_n_core.engine.messages import Request, SamplingParams
from select_n_core.engine.residence import Swapping
from select_n_core.engine.scheduler import Limits, Scheduler, Turning
from select_n_core.engine.sequence import Turn
from select_n_core.kv.blocks import BlockTable
from select_n_core.kv.names import Salts
from select_n_core.slo import SLO

GOAL_S = 1e-3  # p99 per iteration
BLOCK_TOKENS = 32
PROMPT, OUTPUT, EXPECTED = (32, 512), (16, 384), 64
TENANTS, CLASSES = 8, 3
COMMON = 128  # tokens at most with which a tenant's prompts begin that begin alike
VOCABULARY = 1000
# The shape of an 8B model on a 24 GB/s link: 32 layers, 436 MB each.
MODEL = LatencyModel(
    units=32,
    transfer_s=18e-3,
    streaming=ComputeModel(
        token_grid=((1, 0.5e-3), (256, 0.8e-3), (512, 1.4e-3), (2048, 5e-3)),
        per_context_token_s=4e-9,
        per_pair_s=2e-10,
        outside_s=1.5e-3,
        outside_per_row_s=2e-6,
    ),
)


class HostBook:
    """Host KV blocks without bytes."""

    def __init__(self, blocks: int) -> None:
        self.free_blocks = blocks
        self._kept: dict[str, int] = {}

    def keep(self, owner: str, blocks: list[Any]) -> None:
        """Take the blocks."""
        self.free_blocks -= len(blocks)
        self._kept[owner] = len(blocks)

    def bring_back(self, owner: str, blocks: list[Any], skip: int) -> None:
        """Nothing moves."""
        assert skip + len(blocks) == self._kept[owner]

    def settle(self, owner: str) -> None:
        """Give the blocks back."""
        self.drop(owner)

    def drop(self, owner: str) -> None:
        """Give the blocks back, if any."""
        self.free_blocks += self._kept.pop(owner, 0)


class Load:
    """A replica without a model under more load than it can take."""

    def __init__(self, running: int, waiting: int, k: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._beginnings = [self._text(COMMON) for _ in range(TENANTS)]
        self._waiting = waiting
        self._count = 0
        self.now_s = 0.0
        self.resizes_s: list[float] = []
        self._apart = 0.0, 0.0  # seconds and CPU seconds of this iteration that are not ours
        self._ended: list[str] = []
        # Room for the running requests at their expected size, and not for what they become.
        mean = sum(PROMPT) // 2 + EXPECTED
        self._blocks = running * -(-mean // BLOCK_TOKENS)
        self.scheduler = Scheduler(
            limits=Limits(
                max_batch=running,
                max_step_tokens=running + 512,
                max_queue=4 * waiting,
                max_tokens=PROMPT[1] + OUTPUT[1],
                vocab_size=VOCABULARY,
                expected_output=EXPECTED,
            ),
            slo=SLO(tpot_s=0.4, ttft_s=5.0),
            latency=MODEL,
            blocks=BlockTable(self._ids(k), BLOCK_TOKENS),
            k=k,
            slots=2,
            clock=lambda: self.now_s,
            swapping=Swapping(HostBook(1000), lambda block: block, 0.2e-3),
            turning=Turning(0, lambda: 20, tuple(len(self._ids(k)) for k in range(21))),
            salts=Salts(),
        )

    def iterate(self) -> tuple[float, float, int]:
        """(seconds, CPU seconds, requests running) of one iteration of the scheduler."""
        scheduler = self.scheduler
        requests = [self._request() for _ in range(self._waiting - len(scheduler.waiting))]
        self._apart = 0.0, 0.0
        began = time.perf_counter(), time.thread_time()
        for request_id in self._ended:
            scheduler.remove(request_id)
        for request in requests:
            scheduler.add(request)
        turns = scheduler.next_step()
        if scheduler.change is not None:
            self._turn(scheduler.change.k)
            turns = [turn for turn in turns if scheduler.runs(turn.sequence)]
        took = (
            time.perf_counter() - began[0] - self._apart[0],
            time.thread_time() - began[1] - self._apart[1],
        )
        self._ended = self._compute(turns)
        return *took, len(scheduler.running)

    def _compute(self, turns: list[Turn]) -> list[str]:
        """What the engine and the model do; the requests that had their last token."""
        rows = [turn for turn in turns if turn.amount == 1]
        prompts = [turn for turn in turns if turn.amount > 1]
        shape = StepShape(
            decode_rows=len(rows),
            context_tokens=sum(turn.sequence.computed for turn in rows),
            prefill_tokens=sum(turn.amount for turn in prompts),
            prefill_pairs=sum(chunk_pairs(turn.sequence.computed, turn.amount) for turn in prompts),
        )
        step_s = pace_of(MODEL, self.scheduler.k, self.scheduler.slots).step_s(shape)
        self.now_s += step_s * self._random.uniform(0.97, 1.1)
        ended = []
        for turn in turns:
            sequence, samples = turn.sequence, turn.samples
            sequence.computed += turn.amount
            if samples:
                sequence.tokens.append(7)
                sequence.first_token_s = sequence.first_token_s or self.now_s
                if sequence.output_tokens >= sequence.request.sampling.max_tokens:
                    ended.append(sequence.request.id)
        return ended

    def _turn(self, k: int) -> None:
        scheduler = self.scheduler
        ids = self._ids(k)
        scheduler.release(scheduler.blocks.shortfall(ids))
        begun_s, begun_cpu_s = time.perf_counter(), time.thread_time()
        scheduler.blocks.resize(ids)
        self.resizes_s.append(time.perf_counter() - begun_s)
        self._apart = self.resizes_s[-1], time.thread_time() - begun_cpu_s
        scheduler.turned(k)

    def _ids(self, k: int) -> range:
        """A home holds some 100 blocks."""
        return range(2000 - 100 * k, 2000 + self._blocks)

    def _request(self) -> Request:
        self._count += 1
        draw = self._random
        tenant = draw.randrange(TENANTS)
        begins = self._beginnings[tenant] if self._count % 2 else ()
        prompt = begins + self._text(PROMPT[1])
        return Request(
            str(self._count),
            prompt[: draw.randint(*PROMPT)],
            SamplingParams(max_tokens=draw.randint(*OUTPUT)),
            tenant=f"tenant{tenant}",
            priority=draw.randrange(CLASSES),
        )

    def _text(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._random.choices(range(VOCABULARY), k=tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[0, 4, 16], help="at the start")
    parser.add_argument("--iterations", type=int, default=4000, help="for each k")
    parser.add_argument("--warm-up", type=int, default=300, help="iterations that do not count")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    provenance = Provenance()
    runs = []
    for k in arguments.k:
        runs.append(_run(arguments, k))
        note(_line(runs[-1]))
    document = {
        "goal_p99_s": GOAL_S,
        "waiting": arguments.waiting,
        "runs": runs,
        "holds": all(run["p99_s"] <= GOAL_S for run in runs),
        "provenance": provenance.document(),
    }
    publish("scheduler", document, as_json=arguments.json, lines=[_line(run) for run in runs])


def _run(arguments: argparse.Namespace, k: int) -> dict[str, Any]:
    load = Load(arguments.running, arguments.waiting, k, seed=k)
    for _ in range(arguments.warm_up):
        load.iterate()
    gc.collect()
    gc.freeze()  # as the engine does once it is built
    before = (load.scheduler.swaps, load.scheduler.recomputes, len(load.resizes_s))
    seen = [load.iterate() for _ in range(arguments.iterations)]
    times_s, cpu_s, running = (list(column) for column in zip(*seen, strict=True))
    after = (load.scheduler.swaps, load.scheduler.recomputes, len(load.resizes_s))
    prefixes = load.scheduler.prefixes
    swaps, recomputes, turns = (now - then for now, then in zip(after, before, strict=True))
    return {
        "k": k,
        "k_at_the_end": load.scheduler.k,
        "iterations": len(seen),
        "running_median": float(np.median(running)),
        "swaps": swaps,
        "recomputes": recomputes,
        "turns_of_k": turns,
        "cached_share_of_prompts": prefixes.hit_tokens / prefixes.queried_tokens,
        "resize_median_s": float(np.median(load.resizes_s)) if load.resizes_s else None,
        "p50_s": float(np.percentile(times_s, 50)),
        "p99_s": float(np.percentile(times_s, 99)),
        "worst_s": max(times_s),
        "p99_cpu_s": float(np.percentile(cpu_s, 99)),
    }


def _line(run: dict[str, Any]) -> str:
    return (
        f"k = {run['k']} to {run['k_at_the_end']}, {run['running_median']:.0f} running: "
        f"p50 {run['p50_s'] * 1e6:.0f} us, p99 {run['p99_s'] * 1e6:.0f} us "
        f"({run['p99_cpu_s'] * 1e6:.0f} us of CPU time), worst {run['worst_s'] * 1e3:.2f} ms; "
        f"{run['cached_share_of_prompts']:.0%} of prompts cached, "
        f"{run['swaps']} swaps, {run['recomputes']} recomputes, "
        f"{run['turns_of_k']} turns of k in {run['iterations']} iterations"
    )


if __name__ == "__main__":
    main()
