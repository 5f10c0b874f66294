"""A placed model on a real GPU and its real link: transformers' tokens, and real streaming."""

import pytest
import streaming
import torch
from streaming import LAYERS, Bench

from select_n_core.links.cuda import CudaLink
from select_n_core.links.emulated import EmulatedLink

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def bench():
    device = torch.device("cuda", 0)
    link = CudaLink(device)
    yield Bench(link, device, atol=1e-3)
    link.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("k", range(LAYERS + 1))
def test_a_continuous_batch_gets_transformers_tokens(bench, k, slots):
    streaming.check_tokens_at(bench, k, slots)


@pytest.mark.parametrize("k", [0, 2, LAYERS])
def test_all_the_model_computes_with_lies_in_an_arena_of_the_configured_size(bench, k):
    streaming.check_that_every_tensor_lies_in_the_arena(bench, k, slots=2)


@pytest.mark.parametrize(("k", "slots"), [(1, 1), (2, 3), (LAYERS, 2)])
def test_nobody_reads_a_slot_after_its_release(bench, k, slots):
    streaming.check_that_poisoned_slots_change_nothing(bench, k, slots)


def test_a_changed_byte_in_a_mirror_changes_the_logits(bench):
    streaming.check_that_mirrors_are_what_is_computed_with(bench)


@pytest.mark.parametrize(("k", "slots"), [(0, 2), (1, 1), (3, 2)])
def test_the_link_carries_k_units_an_iteration_and_d_ahead(bench, k, slots):
    streaming.check_link_bytes(bench, k, slots, iterations=4)


@pytest.mark.parametrize(("k", "mirrors"), [(0, 0), (2, 4)])
def test_host_bytes_are_the_mirrors_exactly(bench, k, mirrors):
    streaming.check_host_bytes(bench, k, mirrors)


def test_released_units_are_empty_and_units_at_home_are_not(bench):
    streaming.check_that_released_units_are_empty(bench)


def test_a_closed_placement_gives_back_and_the_model_can_be_placed_again(bench):
    streaming.check_that_close_gives_everything_back(bench)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_kv_goes_between_the_ring_and_homes_and_no_token_notices(bench, slots):
    streaming.check_turning_a_full_k(bench, [0, 4, 0, LAYERS, 3, 0], slots, crowd=20)


def test_device_bytes_are_the_arena_while_placed_and_none_afterwards(bench):
    with bench.placed(k=2) as executor:  # the first step also fills the libraries' workspaces
        bench.one_step(executor)
    del executor
    before = torch.cuda.memory_allocated()
    with bench.placed(k=2) as executor:
        taken = torch.cuda.memory_allocated() - before
        assert 0 <= taken - executor.placement.arena_bytes <= 1 << 20  # the allocator rounds up
        bench.one_step(executor)
    assert torch.cuda.memory_allocated() == before


def test_the_gpu_and_the_emulated_link_answer_alike(bench):
    emulated = EmulatedLink(bytes_per_s=200e9)
    with bench.placed(k=2) as executor:
        logits = bench.one_step(executor)
    on_cpu = Bench(emulated, torch.device("cpu"))
    with on_cpu.placed(k=2) as executor:
        torch.testing.assert_close(on_cpu.one_step(executor), logits, atol=1e-3, rtol=0)
    emulated.close()
