"""Packed weights: the same products from the same number of bytes, wherever they are copied to."""

import pytest
import torch
from parity import CPU, answers_of, placed, random_prompts
from tiny import VOCAB_SIZE, tiny_llama
from torch import nn

from select_n_core.links.emulated import EmulatedLink
from select_n_core.models.load import LoadedModel, take_apart
from select_n_core.packed import PackedWeight, layout_of, signature
from select_n_core.units import FlatUnit, named_tensors

torch.set_num_threads(1)

BFLOAT16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no bfloat16 kernels",
)


class Tied(nn.Module):
    """Two linear layers with one weight, and an embedding with another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64, dtype=BFLOAT16)
        self.other = nn.Linear(64, 64, dtype=BFLOAT16)
        self.other.weight = self.one.weight
        self.words = nn.Embedding(128, 64, dtype=BFLOAT16)
        self.head = nn.Linear(64, 128, bias=False, dtype=BFLOAT16)
        self.head.weight = self.words.weight


def unit_of(module: nn.Module) -> FlatUnit:
    module.requires_grad_(False)
    unit = FlatUnit("part", named_tensors(module))
    unit.pack(CPU)
    return unit


def buffer_of(unit: FlatUnit) -> torch.Tensor:
    return torch.full((unit.nbytes,), 0xEE, dtype=torch.uint8)


@pytest.mark.parametrize("tokens", [1, 3, 16, 130])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_the_plain_layers_product_bit_for_bit(tokens, bias):
    layer = nn.Linear(192, 128, bias=bias, dtype=BFLOAT16)
    x = torch.randn(1, tokens, 192, dtype=BFLOAT16)
    with torch.inference_mode():
        expected = layer(x)
    unit = unit_of(layer)
    buffer = buffer_of(unit)
    unit.fill(buffer)
    unit.bind(buffer)
    assert isinstance(layer.weight, PackedWeight)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_a_copy_of_the_bytes_is_a_copy_of_the_weight():
    layer = nn.Linear(192, 128, dtype=BFLOAT16)
    x = torch.randn(3, 192, dtype=BFLOAT16)
    with torch.inference_mode():
        expected = layer(x)
    unit = unit_of(layer)
    mirror, slot = buffer_of(unit), buffer_of(unit)
    unit.fill(mirror)
    unit.bind(slot)
    slot.copy_(mirror)
    mirror.fill_(0)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_a_packed_layer_reads_the_buffer_it_is_bound_to_and_nothing_once_unbound():
    layer = nn.Linear(64, 64, dtype=BFLOAT16)
    unit = unit_of(layer)
    buffer = buffer_of(unit)
    unit.fill(buffer)
    unit.bind(buffer)
    assert torch.ops.mkldnn.data_ptr(layer.weight.packed) == buffer.data_ptr()
    unit.unbind()
    assert not isinstance(layer.weight, PackedWeight)
    with torch.inference_mode(), pytest.raises(RuntimeError):
        layer(torch.zeros(1, 64, dtype=BFLOAT16))


def test_what_others_hold_too_stays_plain():
    tied = Tied()
    unit = unit_of(tied)
    buffer = buffer_of(unit)
    unit.fill(buffer)
    unit.bind(buffer)
    assert not any(isinstance(weight, PackedWeight) for weight in tied.parameters())
    assert torch.equal(tied.words(torch.tensor([5])), tied.head.weight[5:6])


def test_float32_and_odd_shapes_stay_plain():
    assert layout_of(torch.Size((64, 64)), torch.float32) is None
    assert layout_of(torch.Size((3, 5)), BFLOAT16) is None


def test_a_unit_is_packed_for_a_cpu_alone():
    layer = nn.Linear(64, 64, dtype=BFLOAT16)
    plain = layer.weight.detach().clone()
    unit = unit_of(layer)
    unit.pack(torch.device("cuda"))
    buffer = buffer_of(unit)
    unit.fill(buffer)
    unit.bind(buffer)
    assert torch.equal(layer.weight, plain)


def test_bytes_that_differ_have_names_that_differ():
    plain = {
        signature(torch.float32, CPU),
        signature(BFLOAT16, torch.device("cuda")),
    }
    assert plain == {"plain"}
    assert signature(BFLOAT16, CPU) not in plain


def test_a_packed_weight_is_refused_by_anything_but_a_linear_layer():
    layer = nn.Linear(64, 64, dtype=BFLOAT16)
    unit = unit_of(layer)
    buffer = buffer_of(unit)
    unit.fill(buffer)
    unit.bind(buffer)
    assert layer.weight.shape == (64, 64)
    assert layer.weight.dtype == BFLOAT16
    with torch.inference_mode(), pytest.raises((RuntimeError, NotImplementedError)):
        torch.nn.functional.embedding(torch.tensor([1]), layer.weight)


@pytest.mark.parametrize("k", [0, 3, 6])
def test_a_packed_model_answers_as_the_plain_one_does(k, monkeypatch):
    prompts = random_prompts([5, 40, 17], VOCAB_SIZE)

    def answers(model: LoadedModel) -> tuple[list[list[int]], set[bool]]:
        """Tokens, and whether a layer found its weight packed."""
        packed: set[bool] = set()
        model.layers[2].mlp.up_proj.register_forward_pre_hook(
            lambda layer, _args: packed.add(isinstance(layer.weight, PackedWeight))
        )
        link = EmulatedLink(4e9)
        try:
            with placed(model, link, k=k) as executor:
                found = answers_of(executor, prompts, 8, chunk=16)
                return [answer.tokens for answer in found], packed
        finally:
            link.close()

    tokens, packed = answers(take_apart(tiny_llama().to(BFLOAT16)))
    assert packed == {True}
    monkeypatch.setattr("select_n_core.units.layout_of", lambda shape, dtype: None)
    assert answers(take_apart(tiny_llama().to(BFLOAT16))) == (tokens, {False})
