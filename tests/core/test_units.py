"""Flat units: one buffer, every tensor a view of it, nothing left behind when unbound."""

import random

import pytest
import torch
from parity import CPU, answers_of, answers_of_transformers, assert_same, placed, random_prompts
from pydantic import ValidationError
from tiny import VOCAB_SIZE, save_tiny, tiny_llama
from torch import nn

from select_n_core.config import ModelConfig
from select_n_core.engine.planning import prepare, record_path
from select_n_core.errors import StreamingError
from select_n_core.links.emulated import EmulatedLink
from select_n_core.models.cache import CACHE_VARIABLE
from select_n_core.models.load import take_apart
from select_n_core.profiling.passes import unit_means_s
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


def test_a_stand_in_is_read_where_it_is_wanted_and_never_before():
    part, asked = Part(), []

    def read(view: torch.Tensor) -> None:
        asked.append(view.shape)
        view.fill_(2.5)

    before = part.norm.weight.clone()
    unit = FlatUnit("part", named_tensors(part), {id(part.linear.weight): read})
    assert asked == []
    one, other = buffer_of(unit), buffer_of(unit)
    unit.fill(one)
    unit.fill(other)
    assert asked == [(3, 5), (3, 5)]
    unit.bind(other)
    assert (part.linear.weight == 2.5).all()
    assert torch.equal(part.norm.weight, before)
    with pytest.raises(StreamingError, match="not in memory"):
        unit.restore()
    unit.release_source()
    with pytest.raises(StreamingError, match="source was released"):
        unit.fill(one)


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


class TestHalfLayers:
    """`units: half` moves the attention of a layer and the rest of it one by one."""

    @pytest.fixture
    def config(self, tmp_path, monkeypatch):
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))

        def make(**changes: object) -> ModelConfig:
            facts = {
                "name": "tiny",
                "source": str(save_tiny(tmp_path / "model", layers=3)),
                "dtype": "float32",
                "device_memory": "2MiB",
                "host_memory": "2MiB",
                "link": {"kind": "emulated", "bandwidth": "2GB/s"},
                "slo": {"tpot": "10s", "ttft": "60s"},
                "interval": 2,
                "max_batch": 2,
                "max_step_tokens": 16,
                "workload": {"prompt_tokens": 8, "output_tokens": 8},
            }
            return ModelConfig(**(facts | changes))

        return make

    def test_the_plan_counts_them_and_the_record_names_them(self, config):
        whole, half = prepare(config()), prepare(config(units="half"))
        assert (whole.record.fingerprint.units, half.record.fingerprint.units) == ("layer", "half")
        assert record_path(whole.record.fingerprint) != record_path(half.record.fingerprint)
        assert half.record.static_bytes == whole.record.static_bytes
        attention, rest = half.record.unit_bytes[:2]
        assert half.record.unit_bytes == (attention, rest) * 3
        assert whole.record.unit_bytes == (attention + rest,) * 3
        assert (whole.plan.k, half.plan.k) == (1, 3)
        assert half.plan.host_bytes < 3 * max(attention, rest) + 1
        assert "k = 3 of 6 half layers" in half.line()
        assert "k = 1 of 3 layers" in whole.line()
        assert prepare(config(units="half")).loaded is None  # the record was kept

    def test_only_these_two_kinds_are_known(self, config):
        with pytest.raises(ValidationError, match="'layer' or 'half'"):
            config(units="third")

    def test_a_record_from_before_the_option_is_one_of_whole_layers(self, config):
        here = prepare(config()).record.fingerprint
        old = here.model_dump(exclude={"units"})
        assert type(here).model_validate(old) == here

    def test_tokens_stay_right_while_k_turns_at_random(self):
        module = tiny_llama(layers=4)
        prompts = random_prompts([17, 1, 9], VOCAB_SIZE)
        expected = answers_of_transformers(module, prompts, 8)
        model = take_apart(module, "half")
        link, chance = EmulatedLink(bytes_per_s=200e9), random.Random(0)
        with placed(model, link, CPU, k=3, k_min=2, mirrors=8, slots=2, poison=True) as executor:
            step, seen = executor.step, set()

            def turning(rows):
                k = chance.randint(2, 8)
                if executor.shortfall(k) <= 0:
                    executor.turn(k)
                seen.add(executor.k)
                return step(rows)

            executor.step = turning
            for _ in range(4):
                assert_same(answers_of(executor, prompts, 8, chunk=6), expected, atol=1e-4)
            assert len(seen) == 7
            assert executor.streamer.promoted_units > 0
        link.close()


class TestMeansOverUnits:
    def test_units_of_one_kind_are_averaged_at_home_and_in_slots(self):
        assert unit_means_s([1.0, 2.0, 4.0], {2}, kinds=1) == (1.5, 4.0)

    def test_halves_are_compared_with_their_own_kind(self):
        seconds = [1.0, 5.0, 1.0, 6.0]  # attention, rest, attention, rest and streamed
        assert unit_means_s(seconds, {3}, kinds=2) == (3.0, 4.0)

    def test_where_nothing_of_a_kind_is_at_home_what_is_streamed_must_do(self):
        assert unit_means_s([1.0, 5.0, 3.0, 7.0], {1, 3}, kinds=2) == (4.0, 4.0)
        assert unit_means_s([1.0, 3.0], {0, 1}, kinds=1) == (2.0, 2.0)
        assert unit_means_s([1.0, 3.0], set(), kinds=1) == (2.0, 2.0)
