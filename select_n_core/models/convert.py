"""GGUF to a Hugging Face directory: `python -m select_n_core.models.convert FILE DIRECTORY`.

A program of its own, so that whoever wants the directory needs neither torch nor the memory.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf: Path, directory: Path) -> None:
    """Write bfloat16 safetensors, config, tokenizer and chat template of a SmolLM2 GGUF."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it the model counts as quantized and save_pretrained refuses.
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its pre-tokenizer `smollm`: digits one by one, then bytes. transformers
    # reads every tokenizer of this family as bytes only.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
