"""Time to the first token with and without a prefix that is cached, side by side.

    python -m benchmarks.prefix --json

One engine serves the demo as the quickstart does, but for the interval, which is fixed: with one
request at a time most KV memory would go back to the weights, and what is cached there with it.
Requests come in pairs whose order alternates: one begins with the prefix that all of its kind
share, one with as many random tokens that nobody has sent. Both end in random tokens of their own.
A time is from the submission to the first token; what makes it vary comes and goes over seconds,
so that pairs are compared.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import Provenance, note, publish
from select_n_core.config import load_config
from select_n_core.engine.build import build_engine
from select_n_core.engine.engine import Engine
from select_n_core.engine.messages import FinishReason, Request, SamplingParams

CONFIG = Path(__file__).resolve().parent.parent / "examples" / "quickstart.yaml"
KINDS = ("cached", "computed")


class Prompts:
    """Prompts of `prefix` and `rest` random tokens; the cached ones all begin alike."""

    def __init__(self, vocab_size: int, prefix: int, rest: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._vocab_size = vocab_size
        self._prefix, self._rest = prefix, rest
        self._shared = self._text(prefix)

    def next(self, kind: str) -> tuple[int, ...]:
        """A prompt of that kind that nobody has sent."""
        begins = self._shared if kind == "cached" else self._text(self._prefix)
        return begins + self._text(self._rest)

    def _text(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._random.choices(range(self._vocab_size), k=tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--prefix", type=int, default=512, help="tokens that may be cached")
    parser.add_argument("--rest", type=int, default=32, help="tokens of every prompt after them")
    parser.add_argument("--interval", type=float, default=3.0, help="N: one in N layers streamed")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    provenance = Provenance()
    config = load_config(arguments.config).serve.models[0]
    config = config.model_copy(update={"interval": arguments.interval})
    if not config.prefix_caching:
        parser.error(f"{arguments.config}: prefix_caching is off, so that there is nothing to see")
    engine, info = build_engine(config)
    note(info.plan_line)
    vocab_size = engine.executor.model.vocab_size
    prompts = Prompts(vocab_size, arguments.prefix, arguments.rest, arguments.seed)
    for kind in KINDS * 2:  # the first of each kind warms up, and leaves the prefix behind
        serve(engine, f"warm-up {kind}", prompts.next(kind))
    pairs = []
    for number in range(arguments.pairs):
        pair = {}
        for kind in KINDS if number % 2 else KINDS[::-1]:
            pair[kind] = serve(engine, f"{kind} {number}", prompts.next(kind))
        pairs.append(pair)
        note(f"pair {number + 1} of {arguments.pairs}: {_ms(pair)}")
    stats = engine.stats()
    engine.close()
    document = {
        "model": config.source,
        "device_memory_bytes": config.device_memory,
        "k": stats.k,
        "block_tokens": config.block_tokens,
        "prefix_tokens": arguments.prefix,
        "rest_tokens": arguments.rest,
        "ttft_s": {kind: _spread([pair[kind]["ttft_s"] for pair in pairs]) for kind in KINDS},
        "speedup": _spread(
            [pair["computed"]["ttft_s"] / pair["cached"]["ttft_s"] for pair in pairs]
        ),
        "cached_tokens": {
            kind: min(pair[kind]["cached_tokens"] for pair in pairs) for kind in KINDS
        },
        "pairs": pairs,
        "provenance": provenance.document(),
    }
    publish("prefix", document, as_json=arguments.json, lines=_lines(document))


def serve(engine: Engine, name: str, prompt: tuple[int, ...]) -> dict[str, Any]:
    """Submit one request to an idle engine and run it to its end, two tokens later."""
    begun_s = time.perf_counter()
    engine.submit(Request(name, prompt, SamplingParams(max_tokens=2, ignore_eos=True)))
    ttft_s, cached = None, 0
    while not engine.idle:
        for output in engine.step().outputs:
            if output.finish is FinishReason.ERROR:
                raise RuntimeError(f"{name} was not served: {output.error}")
            cached += output.cached_tokens
            if output.tokens and ttft_s is None:
                ttft_s = time.perf_counter() - begun_s
    return {"ttft_s": ttft_s, "cached_tokens": cached}


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"p25": float(low), "p50": float(median), "p75": float(high), "min": min(values)}


def _ms(pair: dict[str, Any]) -> str:
    return ", ".join(f"{kind} {pair[kind]['ttft_s'] * 1e3:.0f} ms" for kind in sorted(pair))


def _lines(document: dict[str, Any]) -> list[str]:
    tokens = document["prefix_tokens"] + document["rest_tokens"]
    times = {kind: spread["p50"] * 1e3 for kind, spread in document["ttft_s"].items()}
    speedup = document["speedup"]
    return [
        f"{tokens} prompt tokens, TTFT p50: {times['computed']:.0f} ms; with "
        f"{document['cached_tokens']['cached']} of them cached {times['cached']:.0f} ms",
        f"pair by pair {speedup['p50']:.1f}x ({speedup['p25']:.1f} to {speedup['p75']:.1f})",
    ]


if __name__ == "__main__":
    main()
