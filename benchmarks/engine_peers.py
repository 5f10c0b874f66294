"""Who the engine is measured against, each in a process of its own.

Two thread pools in one process are more threads than cores to libgomp, which then puts threads to
sleep at every barrier instead of letting them spin: all runners of that process would be slower.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

Prompts = list[list[int]]
# Prompts and output tokens of each -> seconds, cpu_s (of the process) and tokens of each.
Runner = Callable[[Prompts, int], dict[str, Any]]


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
def transformers(directory: Path, how: str, threads: int, chunk: int) -> Iterator[Runner]:
    """The runner of transformers' `generate` or `generate_batch`, as `how` says."""
    command = [
        *(sys.executable, "-m", "benchmarks.transformers_worker", str(directory), how),
        *("--threads", str(threads), "--chunk", str(chunk)),
    ]
    with _worker(command, {}) as (_, runner):
        yield runner


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
    requests, tokens = shape
    script = str(ROOT / "benchmarks" / "vllm_worker.py")
    cores = sorted(os.sched_getaffinity(0))[:threads]
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(python), script, str(directory), str(tokens), str(requests)]
    with _worker(command, settings) as (version, runner):
        yield version, runner


@contextmanager
def _worker(command: Sequence[str], settings: dict[str, str]) -> Iterator[tuple[str, Runner]]:
    """The version that a worker says it has, and its runner; it ends with the context."""
    worker = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    stdin, stdout = worker.stdin, worker.stdout

    def answer() -> dict[str, Any]:
        if not (line := stdout.readline()):
            raise RuntimeError(f"{command[1]} ended with exit code {worker.wait()}; see its stderr")
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
