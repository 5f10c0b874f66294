"""Who the engine is measured against: transformers in this process, vLLM in one of its own."""

from __future__ import annotations

import json
import os
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

from benchmarks.environment import ROOT

Prompts = list[list[int]]
# Prompts and output tokens of each -> seconds, cpu_s (of the process) and tokens of each.
Runner = Callable[[Prompts, int], dict[str, Any]]


def load_peer(directory: Path) -> PreTrainedModel:
    """The model as transformers runs it."""
    peer: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, local_files_only=True
    )
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer.eval()


def generate(peer: PreTrainedModel, prompts: Prompts, output: int) -> list[list[int]]:
    """transformers' static batch; prompts of equal length."""
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        found = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, do_sample=False
        )
    tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return tokens


def generate_batch(
    peer: PreTrainedModel, prompts: Prompts, output: int, chunk: int
) -> list[list[int]]:
    """transformers' continuous batching; its manager lives on, so only the first call builds it."""
    requests, tokens = len(prompts), max(map(len, prompts)) + output
    found = peer.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=2 * requests * -(-tokens // 256),
            max_batch_tokens=chunk + requests,
            allow_block_sharing=False,
        ),
        persistent_manager=True,
    )
    return [each.generated_tokens for each in found.values()]


def timed(run: Callable[[Prompts, int], list[list[int]]]) -> Runner:
    """A runner in this process."""

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
def vllm(
    python: Path | None, directory: Path, shape: tuple[int, int], threads: int
) -> Iterator[tuple[str, Runner | None]]:
    """vLLM's version and runner, or why there is none.

    Args:
        python: of an environment of its own; None leaves vLLM out.
        shape: requests, and tokens of each at most.
    """
    if python is None:
        yield "not measured: no --vllm PYTHON was given", None
        return
    cores = sorted(os.sched_getaffinity(0))[:threads]
    worker = subprocess.Popen(
        [
            str(python),
            str(ROOT / "benchmarks" / "vllm_worker.py"),
            str(directory),
            str(shape[1]),
            str(shape[0]),
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
