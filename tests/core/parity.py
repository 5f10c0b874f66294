"""Greedy decoding with a placed model beside transformers' own: the body of every parity test."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.links.base import Link
from select_n_core.models.load import LoadedModel
from select_n_core.offload.executor import Executor
from select_n_core.offload.placement import Placement, StepRow, model_memory

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Answer:
    """Tokens of one request, and the logits each was the largest of, on the CPU."""

    tokens: list[int]
    logits: Tensor  # [tokens, vocab]

    def margin(self) -> float:
        """How clear the closest decision was: largest logit minus the second largest."""
        best, second = self.logits.topk(2).values.unbind(-1)
        return float((best - second).min())


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def answers_of_transformers(
    module: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Answer]:
    """transformers' `generate` with eager attention, one prompt at a time; never stops early."""
    module.set_attn_implementation("eager")
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 0
    answers = []
    for prompt in prompts:
        ids = torch.tensor(prompt, device=module.device)[None]
        with torch.inference_mode():
            out = module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = out.sequences[0, len(prompt) :].tolist()
        assert len(tokens) == new_tokens
        answers.append(Answer(tokens, torch.cat(out.logits).float().cpu()))
    return answers


def answers_of(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    chunk: int | None = None,
    between: Callable[[int], None] = lambda _step: None,
) -> list[Answer]:
    """Greedy answers of a placed model, served as a continuous batch.

    Request i joins at step i and prefills `chunk` tokens a step (None: all at once), so that
    steps mix first chunks, later chunks and decoding rows. `between` is called before each step.
    """
    tokens = [list(prompt) for prompt in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    cached = [0] * len(prompts)
    for index, prompt in enumerate(prompts):
        executor.blocks.reserve(f"r{index}", len(prompt) + new_tokens)
    step = 0
    while running := [i for i in range(len(prompts)) if len(logits[i]) < new_tokens]:
        between(step)
        rows, wanted = [], []
        for i in running:
            if i > step:
                continue
            new = tokens[i][cached[i] :][:chunk]
            last = cached[i] + len(new) == len(tokens[i])
            rows.append(StepRow(executor.blocks.table(f"r{i}"), cached[i], new, logits=last))
            cached[i] += len(new)
            if last:
                wanted.append(i)
        out = executor.step(rows).float().cpu()
        assert out.shape[0] == len(wanted)
        for i, row in zip(wanted, out, strict=True):
            logits[i].append(row.clone())
            tokens[i].append(int(row.argmax()))
        step += 1
    for index in range(len(prompts)):
        executor.blocks.release(f"r{index}")
    return [
        Answer(tokens[i][len(prompt) :], torch.stack(logits[i])) for i, prompt in enumerate(prompts)
    ]


def assert_same(answers: Sequence[Answer], expected: Sequence[Answer], atol: float) -> None:
    """Equal tokens, and logits within `atol`: tokens alone would forgive a small wrong."""
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    for answer, truth in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer.logits, truth.logits, atol=atol, rtol=0)


@contextmanager
def placed(
    model: LoadedModel,
    link: Link,
    device: torch.device = CPU,
    *,
    k: int,
    slots: int = 2,
    kv_blocks: int = 24,
    block_tokens: int = 8,
    mirrors: int | None = None,
    k_min: int | None = None,
    k_max: int | None = None,
    poison: bool = False,
) -> Iterator[Executor]:
    """`model` in the smallest arena that holds `kv_blocks` with k units streamed.

    With `k_min`, k may turn between it and `k_max`, by default what is mirrored; the blocks fit
    at `k_min` then.
    """
    memory = model_memory(model, block_tokens)
    least = k if k_min is None else k_min
    arena_bytes = arena_bytes_for(memory, least, slots, kv_blocks)
    if k_min is not None and k_max is None:
        k_max = mirrors
    if least == 0 < (k_max or 0):
        arena_bytes += slots * memory.slot_bytes  # the ring has a place of its own
    placement = Placement(
        arena_bytes=arena_bytes,
        k=k,
        k_min=k_min,
        k_max=k_max,
        slots=slots,
        mirrors=mirrors,
        block_tokens=block_tokens,
        threads=1,
        poison=poison,
    )
    executor = Executor(model, placement, link, device)
    try:
        yield executor
    finally:
        executor.close()
