"""Greedy tokens against transformers' own `generate`: every interval, every ring size, one batch.

    python -m benchmarks.parity --json [--prompts FILE]

Float32, end-of-sequence ignored. Equal means equal: every token of every prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.decoding import DEMO, complete, load, place, record_here
from benchmarks.environment import ROOT, Provenance, note, publish
from select_n_core.decisions.order import k_of_interval
from select_n_core.links.emulated import EmulatedLink
from select_n_core.profiling.measure import Effort

INTERVALS = (1, 2, 3, 4, 5, 7, 10, 30)
SLOTS = (1, 2, 3)
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 31, 32, 33, 47, 64, 65, 89, 128, 144, 200, 233, 377, 512, 610)
LENGTHS += (1000,)
LINK_BYTES_PER_S = 8e9  # parity does not depend on it; a fast link saves time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=DEMO)
    parser.add_argument("--prompts", type=Path, help="one prompt a line; default: own text")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens per prompt")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    provenance = Provenance()
    directory, model = load(arguments.source, "float32")
    prompts = _prompts(directory, arguments.prompts)
    note(f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")
    expected = _reference(directory, prompts, arguments.tokens)
    effort = Effort(sweeps=1, repeats=2, batches=(1, 8), contexts=(64,), chunks=(64, 256))
    record = record_here(arguments.source, directory, model, "float32", LINK_BYTES_PER_S, effort)
    runs: list[dict[str, Any]] = []
    for interval, slots in [(None, 1), *((n, d) for n in INTERVALS for d in SLOTS)]:
        k = 0 if interval is None else k_of_interval(interval, len(model.units))
        link = EmulatedLink(LINK_BYTES_PER_S)
        executor = place(
            model,
            link,
            k=k,
            slots=slots,
            requests=len(prompts),
            tokens=max(map(len, prompts)) + arguments.tokens,
        )
        found = complete(executor, record, prompts, arguments.tokens)
        moved = executor.streamer.streamed_units
        executor.close()
        link.close()
        equal = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
        runs.append(
            {
                "interval": interval,
                "d": slots,
                "k": k,
                "streamed_units": moved,
                "prompts": len(prompts),
                "equal": equal,
                "first_difference": _first_difference(found, expected),
            }
        )
        note(f"N = {interval}, d = {slots}, k = {k}: {equal} of {len(prompts)} equal")
    document = {
        "model": arguments.source,
        "dtype": "float32",
        "tokens_each": arguments.tokens,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "runs": runs,
        "all_equal": all(run["equal"] == run["prompts"] for run in runs),
        "provenance": provenance.document(),
    }
    lines = [f"all equal: {document['all_equal']} over {len(runs)} placements"]
    publish("parity", document, as_json=arguments.json, lines=lines)
    if not document["all_equal"]:
        raise SystemExit(1)


def _prompts(directory: Path, file: Path | None) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if file is not None:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [tokenizer(line)["input_ids"] for line in lines]
    tokens = tokenizer((ROOT / "LICENSE").read_text(encoding="utf-8"))["input_ids"]
    starts = [(37 * index) % 900 for index in range(len(LENGTHS))]
    return [tokens[start : start + n] for start, n in zip(starts, LENGTHS, strict=True)]


def _reference(directory: Path, prompts: list[list[int]], output: int) -> list[list[int]]:
    """transformers' `generate`, prompt by prompt: no padding, its own attention and cache."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, do_sample=False
        )
        found.append(out[0, len(prompt) :].tolist())
        note(f"reference: prompt of {len(prompt)} tokens")
    return found


def _first_difference(found: list[list[int]], expected: list[list[int]]) -> dict[str, int] | None:
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                return {"prompt": index, "token": position, "ours": a, "theirs": b}
    return None


if __name__ == "__main__":
    main()
