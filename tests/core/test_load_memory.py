"""What loading takes: a checkpoint goes straight to where it will live, beside nothing.

The figures are taken in a process of their own, which is this file run as a program.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from select_n_core.config import DType, UnitKind
from select_n_core.errors import ModelNotFoundError
from select_n_core.models.source import resolve

MIB = 1 << 20
ALLOWED = 64 * MIB  # for everything that is no weight: code, modules, the record of a forward
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Taken:
    """Growth over just before loading.

    Attributes:
        private: bytes that only this process has (its USS), less code libraries: whether those
            count as private depends on who else runs.
        resident: bytes in memory, libraries included.
        peak: the most that was resident at any moment. held: arena and mirrors. unit: the largest.
        weights: all of the model's, each placed once; what else is held is empty as yet.
    """

    private: int
    resident: int
    peak: int
    held: int
    unit: int
    weights: int


def taken(directory: Path, dtype: DType, units: UnitKind, k: int) -> Taken:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, str(directory), dtype, units, str(k)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return Taken(**json.loads(done.stdout.splitlines()[-1]))


def check(figures: Taken) -> None:
    """The goal is what is held; the weights alone are less than that."""
    assert figures.held >= figures.weights, figures
    assert figures.private <= figures.weights + ALLOWED, figures
    assert figures.resident <= figures.weights + ALLOWED, figures
    assert figures.peak <= figures.weights + ALLOWED + 2 * figures.unit, figures
    assert figures.private > 0.8 * figures.weights, figures  # it was loaded, and measured


@pytest.fixture(scope="module")
def demo() -> Path:
    try:
        return resolve("demo:smollm2-135m-instruct")
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def room(tmp_path) -> Iterator[Path]:
    """A folder that does not outlive its test: gigabytes are not kept for a look afterwards."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def write_model(directory: Path, config: dict[str, object]) -> Path:
    """A random checkpoint of `config`, a file per layer, without ever holding it whole."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    noise = torch.randn(1 << 20, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in shapes.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        file = files.setdefault(f"model-{layer}.safetensors", {})
        for part, shape in _saved_as(name, tensor.shape):
            file[part] = shape
    weight_map: dict[str, str] = {}
    for file_name, tensors in files.items():
        save_file(
            {
                name: noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape)
                for name, shape in tensors.items()
            },
            directory / file_name,
        )
        weight_map |= dict.fromkeys(tensors, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _saved_as(name: str, shape: torch.Size) -> list[tuple[str, torch.Size]]:
    """Experts are saved one by one and fused by transformers when they are loaded."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [(name, shape)]
    experts, rows, columns = shape
    stem, kind = name.rsplit(".", 1)
    if kind == "down_proj":
        return [
            (f"{stem}.{e}.down_proj.weight", torch.Size((rows, columns))) for e in range(experts)
        ]
    half = torch.Size((rows // 2, columns))
    return [
        (f"{stem}.{e}.{part}.weight", half)
        for e in range(experts)
        for part in ("gate_proj", "up_proj")
    ]


def test_the_demo_takes_its_arena_and_its_mirrors(demo):
    check(taken(demo, "bfloat16", "layer", 8))


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 30])
def test_the_demo_resident_and_wholly_streamed(demo, k):
    check(taken(demo, "bfloat16", "layer", k))


@pytest.mark.slow
def test_the_demo_in_half_layers_of_another_type(demo):
    check(taken(demo, "float32", "half", 21))


@pytest.mark.slow
def test_two_gigabytes_in_many_files(room):
    figures = taken(write_model(room, LLAMA), "bfloat16", "layer", 7)
    assert figures.weights > 2e9
    check(figures)


@pytest.mark.slow
def test_experts_that_are_fused_while_they_are_read(room):
    check(taken(write_model(room, QWEN3_MOE), "bfloat16", "layer", 3))


def measure(directory: Path, dtype: DType, units: UnitKind, k: int) -> Taken:
    import psutil

    from select_n_core.decisions.layout import arena_bytes_for
    from select_n_core.links.emulated import EmulatedLink
    from select_n_core.models.load import load_model
    from select_n_core.offload.executor import Executor
    from select_n_core.offload.placement import Placement, model_memory

    torch.set_num_threads(1)

    def private() -> int:
        maps = psutil.Process().memory_maps(grouped=False)
        return sum(m.private_clean + m.private_dirty for m in maps if ".so" not in m.path)

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    link = EmulatedLink(bytes_per_s=200e9)
    private_before = private()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    resident_before = status("VmRSS")
    model = load_model(directory, dtype, units)
    memory = model_memory(model, 32)
    placement = Placement(arena_bytes_for(memory, k, 2, blocks=1), k=k, threads=1)
    executor = Executor(model, placement, link, torch.device("cpu"))
    model.release_source()
    peak, resident_after = status("VmHWM"), status("VmRSS")
    figures = Taken(
        private=private() - private_before,
        resident=resident_after - resident_before,
        peak=peak - resident_before,
        held=executor.arena.nbytes + executor.host_bytes,
        unit=max(memory.unit_bytes),
        weights=memory.static_bytes + sum(memory.unit_bytes),
    )
    executor.close()
    link.close()
    return figures


if __name__ == "__main__":
    path, as_dtype, as_units, streamed = sys.argv[1:]
    print(json.dumps(vars(measure(Path(path), as_dtype, as_units, int(streamed)))))
