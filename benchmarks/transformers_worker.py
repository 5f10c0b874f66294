"""transformers in a process of its own: a line of JSON in, a line of JSON out.

python -m benchmarks.transformers_worker DIRECTORY generate|generate_batch --threads T --chunk C
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    __version__,
)

from benchmarks.engine_peers import Prompts, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("how", choices=["generate", "generate_batch"])
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--chunk", type=int, required=True, help="prompt tokens per step at most")
    arguments = parser.parse_args()

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed goes to stderr
    torch.set_num_threads(arguments.threads)
    peer = load_peer(arguments.directory)

    def run(prompts: Prompts, output: int) -> list[list[int]]:
        if arguments.how == "generate":
            return generate(peer, prompts, output)
        return generate_batch(peer, prompts, output, arguments.chunk)

    runner = timed(run)
    print(json.dumps({"version": __version__}), file=answers)
    for line in sys.stdin:
        print(json.dumps(runner(**json.loads(line))), file=answers)
    peer.destroy_cached_continuous_batching_manager()


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


if __name__ == "__main__":
    main()
