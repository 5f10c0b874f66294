"""The engine without offloading beside its peers: one batch of requests, the same threads for all.

    python -m benchmarks.engine --json [--vllm PYTHON]

Peers are transformers' static `generate` and its continuous `generate_batch`, and vLLM's CPU
build, which runs as `PYTHON` of an environment of its own; each has a process to itself. All get
the same random prompts, new ones each round, and take turns, there and back, so that drift and
bursts of the machine spread over all of them. A ratio is taken within its round, and only rounds
count in which others left the machine alone: a busy neighbour stalls whoever uses all cores. Rates
are output tokens over wall time, prompts included; greedy, bfloat16, end-of-sequence ignored.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.decoding import DEMO, complete, load, place, record_here
from benchmarks.engine_peers import Prompts, Runner, timed, transformers, vllm
from benchmarks.environment import Provenance, note, publish
from select_n_core.links.emulated import EmulatedLink
from select_n_core.profiling.measure import Effort

OURS = "select-n"
GOALS = {"generate": 1.0, "generate_batch": 1.5, "vllm": 0.8}
LINK_BYTES_PER_S = 4e9  # of a link that nothing is streamed over
QUIET_CORES = 0.1  # foreign load of a round that counts, on average
MOST_ROUNDS = 3  # times those asked for, until enough were quiet


@dataclass(frozen=True, slots=True)
class Round:
    """Everybody's turn once, by name."""

    foreign_cores: float
    tokens_per_s: dict[str, float]
    cores: dict[str, float]

    @property
    def quiet(self) -> bool:
        """Whether others left the machine alone."""
        return self.foreign_cores <= QUIET_CORES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=DEMO)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=6, help="quiet ones, after one to warm up")
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
    shape = (arguments.requests, arguments.prompt + arguments.output)
    with (
        _ours(arguments, threads) as (directory, vocab_size, ours),
        transformers(directory, "generate", threads, arguments.chunk) as static,
        transformers(directory, "generate_batch", threads, arguments.chunk) as continuous,
        vllm(arguments.vllm, directory, shape, threads) as (version, runner),
    ):
        runners = {OURS: ours, "generate": static, "generate_batch": continuous}
        if runner is not None:
            runners["vllm"] = runner
        found = _rounds(runners, arguments, vocab_size, threads)
    return {"threads": threads, "vllm": version, **_summary(found)}


def _rounds(
    runners: dict[str, Runner], arguments: argparse.Namespace, vocab_size: int, threads: int
) -> list[Round]:
    """Until enough were quiet; the first one, which warms up, is left out."""
    generator = torch.Generator().manual_seed(threads)
    shape = (arguments.requests, arguments.prompt)
    found: list[Round] = []
    for number in range(MOST_ROUNDS * arguments.rounds + 1):
        prompts = torch.randint(2, vocab_size, shape, generator=generator).tolist()
        names = list(runners) if number % 2 else list(runners)[::-1]
        begun_s, busy_s = time.perf_counter(), _busy_s()
        done = {name: runners[name](prompts, arguments.output) for name in names}
        foreign_s = _busy_s() - busy_s - sum(each["cpu_s"] for each in done.values())
        for name, each in done.items():
            counts = {len(tokens) for tokens in each["tokens"]}
            if len(each["tokens"]) != len(prompts) or counts != {arguments.output}:
                raise RuntimeError(f"{name} did not give {arguments.output} tokens per prompt")
        tokens = arguments.requests * arguments.output
        measured = Round(
            foreign_cores=max(0.0, foreign_s) / (time.perf_counter() - begun_s),
            tokens_per_s={name: tokens / each["seconds"] for name, each in done.items()},
            cores={name: each["cpu_s"] / each["seconds"] for name, each in done.items()},
        )
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in measured.tokens_per_s.items())
        note(
            f"{threads} threads, round {number}: {rates} tokens/s, "
            f"foreign load {measured.foreign_cores:.2f} cores"
        )
        if number:
            found.append(measured)
        if sum(each.quiet for each in found) == arguments.rounds:
            break
    return found


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


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
        yield directory, model.vocab_size, timed(run)
    finally:
        executor.close()
        link.close()


def _summary(found: list[Round]) -> dict[str, Any]:
    """Of the quiet rounds, or of all if no round was quiet."""
    kept = [each for each in found if each.quiet] or found
    names = sorted(kept[0].cores, key=lambda name: name != OURS)
    ratios = {
        name: [each.tokens_per_s[OURS] / each.tokens_per_s[name] for each in kept]
        for name in names
        if name != OURS
    }
    return {
        "quiet_rounds": sum(each.quiet for each in found),
        "runners": {
            name: {
                "tokens_per_s": _spread([each.tokens_per_s[name] for each in kept]),
                "cores": _spread([each.cores[name] for each in kept]),
            }
            for name in names
        },
        "ratios": {name: _spread(each) | {"goal": GOALS[name]} for name, each in ratios.items()},
        "rounds": [asdict(each) for each in found],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _lines(section: dict[str, Any]) -> list[str]:
    threads = section["threads"]
    lines = [
        f"{threads} threads: {section['quiet_rounds']} of {len(section['rounds'])} rounds quiet"
    ]
    lines += [
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
