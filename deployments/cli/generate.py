"""`generate`: one completion from a model in this process, with what the streaming did."""

from __future__ import annotations

import statistics
from typing import Any

from deployments.cli.output import progress_bar
from select_n_core.config import ModelConfig
from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.decisions.order import k_of_interval
from select_n_core.engine.build import build_engine
from select_n_core.engine.messages import Output, Request, SamplingParams
from select_n_core.engine.planning import record_for
from select_n_core.engine.text import TextCodec, TextStream
from select_n_core.models.source import resolve


def generate(
    config: ModelConfig, prompt: str, sampling: SamplingParams, *, sized: bool
) -> dict[str, Any]:
    """Complete `prompt`.

    Args:
        sized: the user gave device memory; otherwise it is made just large enough for the
            interval asked for (everything at home under `auto`).
    """
    codec = TextCodec.load(resolve(config.source))
    tokens = codec.encode(prompt)
    with progress_bar(f"loading {config.source}") as progress:
        if not sized:
            device_bytes = _enough_bytes(config, len(tokens) + sampling.max_tokens, progress)
            config = config.model_copy(update={"device_memory": device_bytes})
        engine, info = build_engine(config, progress)
    stream, text, drawn = TextStream(codec, tokens), "", 0
    iterations_s: list[float] = []
    engine.submit(Request("generate", tokens, sampling))
    try:
        finished: Output | None = None
        while finished is None:
            report = engine.step()
            iterations_s.append(report.stats.iteration_s)
            for output in report.outputs:
                text += stream.push(output.tokens)
                drawn += len(output.tokens)
                if output.finish is not None:
                    finished = output
        if finished.error is not None:
            raise finished.error
        stats = engine.stats()
    finally:
        engine.close()
    # The first iteration computes the prompt.
    decode_s = iterations_s[1:] or iterations_s
    return {
        "text": text + stream.finish(),
        "tokens": drawn,
        "interval": info.interval,
        "k": info.k,
        "streamed_units": stats.streamed_units,
        "device_bytes": info.device_bytes,
        "host_bytes": info.host_bytes,
        "iteration_s": {
            "p50": statistics.median(decode_s),
            "p95": sorted(decode_s)[int(0.95 * (len(decode_s) - 1))],
        },
        "predicted_iteration_s": info.predicted_iteration_s,
        "link": {"kind": info.link_kind, "bandwidth_bytes_per_s": info.link_bytes_per_s},
        "plan": info.plan_line,
    }


def _enough_bytes(config: ModelConfig, tokens: int, progress: Any) -> int:
    record, _ = record_for(config, resolve(config.source), progress)
    memory = record.memory(config.block_tokens)
    k = 0
    if isinstance(config.interval, float):
        k = k_of_interval(config.interval, memory.units)
    workload = config.workload
    room = max(tokens, workload.prompt_tokens + workload.output_tokens)
    return arena_bytes_for(memory, k, config.slots, memory.blocks_of(room))
