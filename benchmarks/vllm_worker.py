"""vLLM in a process and an environment of its own: a line of JSON in, a line of JSON out.

    PYTHON benchmarks/vllm_worker.py DIRECTORY MAX_TOKENS REQUESTS

It imports nothing of this project. Everything that vLLM prints goes to stderr.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    directory, max_tokens, requests = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import vllm

    engine = vllm.LLM(
        model=directory,
        dtype="bfloat16",
        max_model_len=max_tokens,
        max_num_seqs=requests,
        enable_prefix_caching=False,
    )
    print(json.dumps({"version": vllm.__version__}), file=answers)
    for line in sys.stdin:
        print(json.dumps(_run(vllm, engine, **json.loads(line))), file=answers)


def _run(vllm: Any, engine: Any, prompts: list[list[int]], output: int) -> dict[str, Any]:
    sampling = vllm.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    begun_s, used_s = time.perf_counter(), time.process_time()
    found = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
    )
    return {
        "seconds": time.perf_counter() - begun_s,
        "cpu_s": time.process_time() - used_s,
        "tokens": [list(each.outputs[0].token_ids) for each in found],
    }


if __name__ == "__main__":
    main()
