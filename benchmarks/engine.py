"""The engine without offloading beside its peers: one batch of requests, the same threads for all.

    python -m benchmarks.engine --json [--vllm PYTHON]

Peers are transformers' static `generate` and its continuous `generate_batch`, and vLLM's CPU
build, which runs as `PYTHON` of an environment of its own. All get the same random prompts, new
ones each round, and take turns, there and back, so that drift and bursts of the machine spread
over all of them. A ratio is taken within its round. Rates are output tokens over wall time,
prompts included; greedy, bfloat16, end-of-sequence ignored.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from benchmarks.decoding import DEMO, complete, load, place, record_here
from benchmarks.environment import ROOT, Provenance, note, publish
from select_n_core.links.emulated import EmulatedLink
from select_n_core.profiling.measure import Effort

OURS = "select-n"
GOALS = {"generate": 1.0, "generate_batch": 1.5, "vllm": 0.8}
LINK_BYTES_PER_S = 4e9  # of a link that nothing is streamed over

Prompts = list[list[int]]
Runner = Callable[[Prompts, int], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=DEMO)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=6, help="measured, after one to warm up")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens in")
    parser.add_argument("--output", type=int, default=64, help="tokens out")
    parser.add_argument("--chunk", type=int, default=512, help="prompt tokens per step at most")
    parser.add_argument("--vllm", type=Path, help="the Python of an environment with vLLM")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    provenance = Provenance()
    sections = [_section(arguments, threads) for threads in arguments.threads]
    document = {
        "model": arguments.source,
        "dtype": "bfloat16",
        "requests": arguments.requests,
        "prompt_tokens": arguments.prompt,
        "output_tokens": arguments.output,
        "rounds": arguments.rounds,
        "goals": GOALS,
        "sections": sections,
        "provenance": provenance.document(),
    }
    lines = [line for section in sections for line in _lines(section)]
    publish("engine", document, as_json=arguments.json, lines=lines)


def _section(arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Every runner at so many threads."""
    torch.set_num_threads(threads)
    with _ours(arguments, threads) as (directory, vocab_size, ours):
        peer = _load_peer(directory)
        runners: dict[str, Runner] = {
            OURS: ours,
            "generate": _timed(lambda prompts, output: _generate(peer, prompts, output)),
            "generate_batch": _timed(
                lambda prompts, output: _generate_batch(peer, prompts, output, arguments)
            ),
        }
        with _vllm(arguments, directory, threads) as (version, vllm):
            if vllm is not None:
                runners["vllm"] = vllm
            found = _rounds(runners, arguments, vocab_size, threads)
        peer.destroy_cached_continuous_batching_manager()
    return {"threads": threads, "vllm": version, **_summary(found)}


def _rounds(
    runners: dict[str, Runner], arguments: argparse.Namespace, vocab_size: int, threads: int
) -> list[dict[str, dict[str, float]]]:
    """Per round: what each runner took."""
    generator = torch.Generator().manual_seed(threads)
    shape = (arguments.requests, arguments.prompt)
    found = []
    for number in range(arguments.rounds + 1):
        prompts = torch.randint(2, vocab_size, shape, generator=generator).tolist()
        took = {}
        for name in list(runners) if number % 2 else list(runners)[::-1]:
            done = runners[name](prompts, arguments.output)
            counts = {len(tokens) for tokens in done["tokens"]}
            if len(done["tokens"]) != len(prompts) or counts != {arguments.output}:
                raise RuntimeError(f"{name} did not give {arguments.output} tokens per prompt")
            took[name] = {
                "tokens_per_s": arguments.requests * arguments.output / done["seconds"],
                "cores": done["cpu_s"] / done["seconds"],
            }
        rates = ", ".join(f"{name} {each['tokens_per_s']:.0f}" for name, each in took.items())
        note(f"{threads} threads, round {number} of {arguments.rounds}: {rates} tokens/s")
        if number:
            found.append(took)
    return found


@contextmanager
def _ours(arguments: argparse.Namespace, threads: int) -> Iterator[tuple[Path, int, Runner]]:
    """The engine over a model that lies in the arena whole; with its directory and vocabulary."""
    directory, model = load(arguments.source, "bfloat16")
    effort = Effort(
        sweeps=1, repeats=2, batches=(1, arguments.requests), contexts=(64, 256), chunks=(64,)
    )
    record = record_here(arguments.source, directory, model, "bfloat16", LINK_BYTES_PER_S, effort)
    link = EmulatedLink(LINK_BYTES_PER_S)
    executor = place(
        model,
        link,
        k=0,
        slots=2,
        requests=arguments.requests,
        tokens=arguments.prompt + arguments.output,
        threads=threads,
    )

    def run(prompts: Prompts, output: int) -> list[list[int]]:
        return complete(executor, record, prompts, output, arguments.chunk)

    try:
        yield directory, model.vocab_size, _timed(run)
    finally:
        executor.close()
        link.close()


def _load_peer(directory: Path) -> PreTrainedModel:
    peer: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, local_files_only=True
    )
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer.eval()


def _generate(peer: PreTrainedModel, prompts: Prompts, output: int) -> list[list[int]]:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        found = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, do_sample=False
        )
    tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return tokens


def _generate_batch(
    peer: PreTrainedModel, prompts: Prompts, output: int, arguments: argparse.Namespace
) -> list[list[int]]:
    """Its manager lives on, so that only the first call builds it."""
    found = peer.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=2 * arguments.requests * -(-(arguments.prompt + output) // 256),
            max_batch_tokens=arguments.chunk + arguments.requests,
            allow_block_sharing=False,
        ),
        persistent_manager=True,
    )
    return [each.generated_tokens for each in found.values()]


def _timed(run: Callable[[Prompts, int], list[list[int]]]) -> Runner:
    def timed(prompts: Prompts, output: int) -> dict[str, Any]:
        begun_s, used_s = time.perf_counter(), time.process_time()
        tokens = run(prompts, output)
        return {
            "seconds": time.perf_counter() - begun_s,
            "cpu_s": time.process_time() - used_s,
            "tokens": tokens,
        }

    return timed


@contextmanager
def _vllm(
    arguments: argparse.Namespace, directory: Path, threads: int
) -> Iterator[tuple[str, Runner | None]]:
    """vLLM's version and runner, or why there is none."""
    if arguments.vllm is None:
        yield "not measured: no --vllm PYTHON was given", None
        return
    cores = sorted(os.sched_getaffinity(0))[:threads]
    worker = subprocess.Popen(
        [
            str(arguments.vllm),
            str(ROOT / "benchmarks" / "vllm_worker.py"),
            str(directory),
            str(arguments.prompt + arguments.output),
            str(arguments.requests),
        ],
        env=os.environ
        | {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    stdin, stdout = worker.stdin, worker.stdout

    def answer() -> dict[str, Any]:
        if not (line := stdout.readline()):
            raise RuntimeError(f"vLLM ended with exit code {worker.wait()}; see its stderr")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(prompts: Prompts, output: int) -> dict[str, Any]:
        print(json.dumps({"prompts": prompts, "output": output}), file=stdin, flush=True)
        return answer()

    try:
        yield answer()["version"], run
    finally:
        stdin.close()
        try:
            worker.wait(timeout=60)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            raise


def _summary(found: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    names = sorted(found[0], key=lambda name: name != OURS)
    ratios = {
        name: [took[OURS]["tokens_per_s"] / took[name]["tokens_per_s"] for took in found]
        for name in names
        if name != OURS
    }
    return {
        "runners": {
            name: {
                "tokens_per_s": _spread([took[name]["tokens_per_s"] for took in found]),
                "cores": _spread([took[name]["cores"] for took in found]),
            }
            for name in names
        },
        "ratios": {
            name: _spread(each) | {"goal": GOALS[name], "rounds": each}
            for name, each in ratios.items()
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _lines(section: dict[str, Any]) -> list[str]:
    threads = section["threads"]
    lines = [
        f"{threads} threads, {name}: {each['tokens_per_s']['median']:.0f} tokens/s "
        f"({each['tokens_per_s']['least']:.0f} to {each['tokens_per_s']['most']:.0f}), "
        f"{each['cores']['median']:.2f} cores"
        for name, each in section["runners"].items()
    ]
    lines += [
        f"{threads} threads, {OURS} over {name}: {each['median']:.2f} "
        f"({each['least']:.2f} to {each['most']:.2f}), goal {each['goal']}"
        for name, each in section["ratios"].items()
    ]
    return lines if "vllm" in section["ratios"] else [*lines, f"vllm: {section['vllm']}"]


if __name__ == "__main__":
    main()
