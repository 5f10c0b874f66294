"""Turning k while a batch decodes: 4 -> 20 -> 2, by one per iteration and by jumps.

    python -m benchmarks.interval --json

`extra_bytes` are those that the link carried beyond what the iterations computed from: each needs
the units that are streamed after or before its turn of k. `stall_s` is all compute time lost
waiting. What a turn adds is its iteration's time beyond that of the two ks it lies between, each
standing still in the same run: a stall alone would count compute that was faster as lost time.
Each turn is made once in every round and counts with the lower quartile of them: what a turn adds
it adds in every round, what a neighbour adds it does not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.decoding import DEMO, MovingBatch, load
from benchmarks.environment import Provenance, note, publish
from select_n_core.links.base import Direction
from select_n_core.links.emulated import EmulatedLink
from select_n_core.offload.streamer import WEIGHTS

SLOTS = 2
BATCH = 8
BY_ONE = [4, *range(5, 21), *range(19, 1, -1)]
BY_JUMPS = [4, 20, 20, 2, 2, 20, 4, 12, 12, 2]
STILL = 8  # iterations at each k that stands still
SENT = (Direction.TO_DEVICE, WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=DEMO)
    parser.add_argument("--link", type=float, default=1e9, help="bytes/s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    provenance = Provenance()
    _, model = load(arguments.source, "bfloat16")
    link = EmulatedLink(arguments.link)
    batch = MovingBatch(model, link, slots=SLOTS, k_max=max(BY_ONE), requests=BATCH)
    unit_bytes = max(unit.nbytes for unit in model.units)
    still = _standing_still(batch)
    note("measured every k standing still")
    rounds = []
    for number in range(arguments.rounds):
        rounds += [_turning(batch, "by one", BY_ONE), _turning(batch, "by jumps", BY_JUMPS)]
        note(f"round {number + 1} of {arguments.rounds}")
    batch.close()
    link.close()
    steps = [step for part in rounds for step in part["steps"]]
    every_s = [
        [
            max(0.0, step["iteration_s"] - _slower_still_s(still, before["k"], step["k"]))
            for before, step in pairwise(part["steps"])
        ]
        for part in rounds
        if part["path"] == "by one"
    ]
    added_s = [float(np.percentile(turn_s, 25)) for turn_s in zip(*every_s, strict=True)]
    document = {
        "model": arguments.source,
        "batch": BATCH,
        "d": SLOTS,
        "link_bytes_per_s": arguments.link,
        "unit_transfer_s": unit_bytes / arguments.link,
        "extra_bytes": sum(part["extra_bytes"] for part in rounds),
        "iterations": len(steps),
        "stall_s": sum(step["stall_s"] for step in steps),
        "turns_by_one": len(added_s),
        "added_s": {
            "p50": statistics.median(added_s),
            "max": max(added_s),
            "max_of_every_round": max(map(max, every_s)),
        },
        "rounds": [{k: v for k, v in part.items() if k != "steps"} for part in rounds],
        "still": [{"k": k, **facts} for k, facts in still.items()],
        "steps": steps,
        "provenance": provenance.document(),
    }
    publish("interval", document, as_json=arguments.json, lines=_lines(document))


def _standing_still(batch: MovingBatch) -> dict[int, dict[str, float]]:
    found = {}
    for k in sorted(set(BY_ONE + BY_JUMPS)):
        batch.iterations(k, STILL)
        seen = [batch.iteration(k) for _ in range(STILL)]
        found[k] = {
            "iteration_s": statistics.median(each.seconds for each in seen),
            "stall_s": statistics.median(each.stall_s for each in seen),
        }
    return found


def _turning(batch: MovingBatch, path: str, ks: list[int]) -> dict[str, Any]:
    """One iteration at each of `ks`, from a steady start at the first."""
    batch.iterations(ks[0], STILL)
    counters, unit_bytes = batch.executor.link.counters, batch.executor.memory.slot_bytes
    before, begun_s = counters.bytes[SENT], time.perf_counter()
    steps = []
    for k in ks:
        seen = batch.iteration(k)
        steps.append(
            {
                "path": path,
                "k": k,
                "kv_tokens": batch.executor.blocks.blocks * batch.executor.blocks.block_tokens,
                "iteration_s": seen.seconds,
                "stall_s": seen.stall_s,
            }
        )
    computed_from = ks[0] + sum(max(pair) for pair in pairwise(ks))
    # The ring holds as many units at the end as at the start, or fewer.
    ahead = min(SLOTS, ks[-1]) - min(SLOTS, ks[0])
    return {
        "path": path,
        "seconds": time.perf_counter() - begun_s,
        "sent_bytes": counters.bytes[SENT] - before,
        "extra_bytes": max(0, counters.bytes[SENT] - before - (computed_from + ahead) * unit_bytes),
        "steps": steps,
    }


def _slower_still_s(still: dict[int, dict[str, float]], *ks: int) -> float:
    """Seconds of an iteration at the slowest of these ks, standing still."""
    return max(still[k]["iteration_s"] for k in ks)


def _lines(document: dict[str, Any]) -> list[str]:
    added = document["added_s"]
    return [
        f"{document['iterations']} iterations, k from 4 to 20 to 2: {document['extra_bytes']} "
        "bytes more than they computed from",
        f"turning k by one ({document['turns_by_one']} turns in each of "
        f"{len(document['rounds']) // 2} rounds): added median {added['p50'] * 1e3:.2f} ms, "
        f"at most {added['max'] * 1e3:.2f} ms; one unit's transfer is "
        f"{document['unit_transfer_s'] * 1e3:.2f} ms",
    ]


if __name__ == "__main__":
    main()
