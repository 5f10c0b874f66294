"""Flat units: one buffer, every tensor a view of it, nothing left behind when unbound."""

import pytest
import torch
from torch import nn

from select_n_core.errors import StreamingError
from select_n_core.units import ALIGNMENT, FlatUnit, align, named_tensors

torch.set_num_threads(1)


class Part(nn.Module):
    """Parameters of odd sizes and two types, a buffer, and an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(7, dtype=torch.bfloat16)
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("table", torch.arange(9))


def buffer_of(unit: FlatUnit) -> torch.Tensor:
    return torch.full((unit.nbytes,), 0xEE, dtype=torch.uint8)


def test_a_unit_holds_every_tensor_aligned_and_nothing_more():
    part = Part()
    unit = FlatUnit("part", named_tensors(part))
    sizes = [5 * 3 * 4, 3 * 4, 7 * 2, 7 * 2, 0, 9 * 8]
    assert unit.nbytes == sum(align(size) for size in sizes)
    assert unit.nbytes % ALIGNMENT == 0


def test_bound_tensors_are_equal_views_of_the_buffer():
    part = Part()
    before = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    unit = FlatUnit("part", named_tensors(part))
    buffer = buffer_of(unit)
    unit.fill(buffer)
    unit.bind(buffer)
    after = part.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    low, high = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
    for tensor in unit.tensors():
        if tensor.numel():
            assert low <= tensor.data_ptr() < high
            assert (tensor.data_ptr() - low) % ALIGNMENT == 0
    buffer.zero_()
    assert not any(tensor.any() for tensor in part.state_dict().values())


def test_parameters_keep_their_identity_when_bound_unbound_and_restored():
    part = Part()
    parameters = list(part.parameters())
    unit = FlatUnit("part", named_tensors(part))
    buffer = buffer_of(unit)
    unit.fill(buffer)
    for step in (lambda: unit.bind(buffer), unit.unbind, unit.restore):
        step()
        assert [id(p) for p in part.parameters()] == [id(p) for p in parameters]


def test_an_unbound_unit_cannot_be_computed_with():
    part = Part()
    unit = FlatUnit("part", named_tensors(part))
    unit.unbind()
    assert all(tensor.numel() == 0 for tensor in unit.tensors())
    with pytest.raises(RuntimeError):
        part.linear(torch.zeros(1, 5))


def test_restoring_brings_the_checkpoint_back_until_it_is_released():
    part = Part()
    before = part.linear.weight.data_ptr()
    unit = FlatUnit("part", named_tensors(part))
    unit.unbind()
    unit.restore()
    assert part.linear.weight.data_ptr() == before
    unit.release_source()
    with pytest.raises(StreamingError, match="source was released"):
        unit.restore()
    with pytest.raises(StreamingError, match="source was released"):
        unit.fill(buffer_of(unit))


def test_a_tensor_held_twice_is_stored_once_and_bound_everywhere():
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    other.weight = one.weight
    shared = torch.arange(4.0)
    one.register_buffer("shared", shared)
    other.register_buffer("shared", shared)
    unit = FlatUnit("pair", named_tensors(one) + named_tensors(other))
    assert unit.nbytes == align(4 * 4 * 4) + align(4 * 4)
    buffer = buffer_of(unit)
    unit.fill(buffer)
    unit.bind(buffer)
    assert one.weight is other.weight
    assert one.shared.data_ptr() == other.shared.data_ptr() != shared.data_ptr()
    assert torch.equal(other.shared, shared)


def test_a_buffer_that_is_too_small_or_of_another_type_is_refused():
    unit = FlatUnit("part", named_tensors(Part()))
    for buffer in (
        torch.empty(unit.nbytes - 1, dtype=torch.uint8),
        torch.empty(unit.nbytes, dtype=torch.float32),
    ):
        with pytest.raises(StreamingError, match=r"unit part: needs \d+ bytes of uint8"):
            unit.bind(buffer)


def test_two_buffers_can_be_bound_in_turn_without_copying():
    part = Part()
    unit = FlatUnit("part", named_tensors(part))
    one, other = buffer_of(unit), buffer_of(unit)
    unit.fill(one)
    unit.fill(other)
    unit.bind(other)
    part.linear.bias.data.fill_(5.0)
    unit.bind(one)
    assert not (part.linear.bias == 5.0).any()
    unit.bind(other)
    assert (part.linear.bias == 5.0).all()
