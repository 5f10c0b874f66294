"""A placed model on the emulated link: transformers' tokens, and the streaming is real."""

import gc
import weakref

import pytest
import streaming
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import CPU, answers_of, answers_of_transformers, assert_same, placed, random_prompts
from streaming import LAYERS, Bench
from tiny import VOCAB_SIZE, save_tiny, tiny_llama

from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.errors import DeviceMemoryError, HostMemoryError, InputError, LinkError
from select_n_core.links.emulated import EmulatedLink
from select_n_core.models.load import load_model, take_apart
from select_n_core.offload.executor import Executor
from select_n_core.offload.placement import Placement, StepRow, model_memory

torch.set_num_threads(1)

EVERY_K = range(LAYERS + 1)


@pytest.fixture(scope="module")
def link():
    link = EmulatedLink(bytes_per_s=200e9)
    yield link
    link.close()


@pytest.fixture(scope="module")
def bench(link) -> Bench:
    return Bench(link, CPU)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("k", EVERY_K)
def test_a_continuous_batch_gets_transformers_tokens(bench, k, slots):
    streaming.check_tokens_at(bench, k, slots)


@pytest.mark.parametrize("k", EVERY_K)
def test_all_the_model_computes_with_lies_in_an_arena_of_the_configured_size(bench, k):
    streaming.check_that_every_tensor_lies_in_the_arena(bench, k, slots=2)


@pytest.mark.parametrize(("k", "slots"), [(1, 1), (2, 3), (3, 2), (LAYERS, 2)])
def test_nobody_reads_a_slot_after_its_release(bench, k, slots):
    streaming.check_that_poisoned_slots_change_nothing(bench, k, slots)


def test_a_changed_byte_in_a_mirror_changes_the_logits(bench):
    streaming.check_that_mirrors_are_what_is_computed_with(bench)


@pytest.mark.parametrize(("k", "slots"), [(0, 2), (1, 1), (2, 2), (3, 2), (LAYERS, 3)])
def test_the_link_carries_k_units_an_iteration_and_d_ahead(bench, k, slots):
    streaming.check_link_bytes(bench, k, slots, iterations=4)


@pytest.mark.parametrize(("k", "mirrors"), [(0, 0), (0, 2), (2, 2), (2, 4), (LAYERS, LAYERS)])
def test_host_bytes_are_the_mirrors_exactly(bench, k, mirrors):
    streaming.check_host_bytes(bench, k, mirrors)


def test_released_units_are_empty_and_units_at_home_are_not(bench):
    streaming.check_that_released_units_are_empty(bench)


def test_a_closed_placement_gives_back_and_the_model_can_be_placed_again(bench):
    streaming.check_that_close_gives_everything_back(bench)


def test_the_arena_and_the_mirrors_are_unmapped_when_a_placement_is_closed(bench):
    with bench.placed(k=2) as executor:
        bench.one_step(executor)
        hosts = executor._mirrors._hosts.values()
        maps = [executor.arena._map._map, *(host._map for host in hosts)]
        alive = [weakref.ref(each) for each in maps]
        del maps, hosts
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_a_unit_that_is_away_cannot_be_computed_with(bench):
    with bench.placed(k=2) as executor, torch.inference_mode(), pytest.raises(RuntimeError):
        bench.model.layers[executor.streamed[0]].mlp(torch.zeros(1, 64))


def test_a_placement_fits_its_smallest_arena_and_not_one_byte_less(bench, link):
    memory = model_memory(bench.model, 8)
    smallest = arena_bytes_for(memory, k=2, slots=2, blocks=0)
    Executor(bench.model, Placement(smallest, k=2, block_tokens=8), link, CPU).close()
    with pytest.raises(DeviceMemoryError, match="2 of 5 units streamed do not fit"):
        Executor(bench.model, Placement(smallest - 1, k=2, block_tokens=8), link, CPU)


def test_more_streamed_units_than_the_model_has_are_refused(bench, link):
    with pytest.raises(InputError, match="k must be between 0 and 5"):
        Executor(bench.model, Placement(1 << 24, k=LAYERS + 1), link, CPU)


def test_an_arena_of_any_size_is_used_to_the_last_block(bench, link):
    memory = model_memory(bench.model, 8)
    arena_bytes = arena_bytes_for(memory, k=1, slots=2, blocks=3) + 12345
    executor = Executor(bench.model, Placement(arena_bytes, k=1, block_tokens=8), link, CPU)
    assert executor.arena.nbytes == arena_bytes
    assert executor.blocks.blocks == 3 + (12345 // 256 * 256) // memory.kv_block_bytes
    assert executor.cache.blocks == executor.blocks.free_blocks == executor.blocks.blocks
    bench.one_step(executor)
    executor.close()


def test_only_rows_that_want_logits_get_them_in_their_order(bench):
    with bench.placed(k=1) as executor:
        rows = []
        for index, prompt in enumerate(bench.prompts):
            executor.blocks.reserve(f"r{index}", len(prompt))
            rows.append(StepRow(executor.blocks.table(f"r{index}"), 0, prompt, logits=index % 2))
        logits = executor.step(rows)
        assert logits.shape == (2, VOCAB_SIZE)
        for row, index in zip(logits, (1, 3), strict=True):
            truth = bench.expected[index].logits[0]
            torch.testing.assert_close(row, truth, atol=1e-4, rtol=0)
        none = [StepRow(row.blocks, 0, row.tokens, logits=False) for row in rows]
        assert executor.step(none).shape == (0, VOCAB_SIZE)


def test_a_step_that_fails_leaves_the_next_one_right(bench):
    with bench.placed(k=3, poison=True) as executor:
        bench.one_step(executor)

        def fail(*_: object) -> None:
            raise LinkError("the cable is out")

        handle = bench.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(LinkError, match="cable"):
            bench.one_step(executor)
        handle.remove()
        executor.blocks.release("step")
        bench.check_answers(executor)


def test_a_slow_link_changes_the_time_and_not_the_tokens(bench):
    slow = EmulatedLink(bytes_per_s=100e6, latency_s=1e-4)
    with placed(bench.model, slow, k=LAYERS, slots=2) as executor:
        assert_same(
            answers_of(executor, bench.prompts[:1], 4),
            [type(each)(each.tokens[:4], each.logits[:4]) for each in bench.expected[:1]],
            atol=1e-4,
        )
    assert slow.counters.stall_s > 0
    slow.close()


def test_a_saved_model_loads_into_the_same_tokens_and_forgets_its_checkpoint(tmp_path, bench, link):
    model = load_model(save_tiny(tmp_path, tiny_llama(layers=LAYERS)), "float32")
    assert (model.max_context, model.vocab_size, model.dtype) == (512, VOCAB_SIZE, torch.float32)
    with placed(model, link, k=2) as executor:
        model.release_source()
        bench.check_answers(executor)


def test_bfloat16_streamed_is_bit_equal_to_bfloat16_resident(link):
    module = tiny_llama(layers=3).to(torch.bfloat16)
    model = take_apart(module)
    prompts = random_prompts([11, 5], VOCAB_SIZE)
    with placed(model, link, k=0) as executor:
        resident = answers_of(executor, prompts, 6)
    for k in (1, 2, 3):
        with placed(model, link, k=k, poison=True) as executor:
            assert_same(answers_of(executor, prompts, 6), resident, atol=0)


def test_tied_embeddings_are_static_and_stored_once(link):
    module = tiny_llama(layers=2)
    module.config.tie_word_embeddings = True
    module.lm_head.weight = module.model.embed_tokens.weight
    prompts = random_prompts([11, 5], VOCAB_SIZE)
    expected = answers_of_transformers(module, prompts, 4)
    model = take_apart(module)
    held = sum(tensor.numel() * 4 for tensor in model.static.tensors())
    assert held < 2 * VOCAB_SIZE * 64 * 4
    with placed(model, link, k=2) as executor:
        assert_same(answers_of(executor, prompts, 4), expected, atol=1e-4)
        assert module.lm_head.weight is module.model.embed_tokens.weight


class TestTurningK:
    @given(st.lists(st.integers(0, LAYERS), min_size=1, max_size=12), st.integers(1, 4))
    @settings(max_examples=25, deadline=None)
    def test_tokens_do_not_notice_and_no_byte_moves_for_nothing(self, bench, ks, slots):
        streaming.check_turning_k(bench, ks, slots)

    def test_an_iteration_moves_k_units_once_k_stands_still(self, bench):
        streaming.check_steady_bytes_after_turning(bench)

    def test_kv_blocks_come_with_k_and_go_with_it(self, bench):
        with bench.placed(k=1, k_min=0, mirrors=4) as executor:
            few = executor.blocks.blocks
            executor.turn(4)
            assert executor.blocks.blocks == few  # the homes are in use until the next step
            bench.one_step(executor)
            many = executor.blocks.blocks
            gained = 3 * executor.memory.unit_bytes[0] // executor.memory.kv_block_bytes
            assert gained <= many - few <= gained + 1
            executor.turn(1)
            assert executor.blocks.blocks == few

    def test_blocks_in_a_home_that_is_needed_move_and_keep_what_they_hold(self, bench):
        with bench.placed(k=4, k_min=1, mirrors=4, kv_blocks=13, poison=True) as executor:

            def crowd(step: int) -> None:
                """The first blocks are taken, so that others lie in lent homes; then all go."""
                if step == 0:
                    return
                if step == 4:
                    executor.blocks.release("crowd")
                    assert executor.shortfall(1) == 0
                    executor.turn(1)

            executor.blocks.reserve("crowd", 8 * 8)
            moved = executor.blocks.table("crowd")[0]
            bench.check_answers(executor, between=crowd)
            assert moved in executor.blocks.ids

    @given(
        st.lists(st.sampled_from([0, 0, 1, 3, 4, LAYERS]), min_size=1, max_size=10),
        st.integers(1, 3),
        st.integers(10, 24),
    )
    @settings(max_examples=25, deadline=None)
    def test_tokens_do_not_notice_how_full_the_ring_was(self, bench, ks, slots, crowd):
        streaming.check_turning_a_full_k(bench, ks, slots, crowd)

    def test_with_the_ring_full_of_kv_homes_take_it_and_give_it_back(self, bench):
        with bench.placed(k=0, k_min=0, mirrors=4, poison=True) as executor:
            layout = executor.layout
            inner = layout.ring_id - layout.kv_ids(0).start  # blocks in neither home nor ring
            executor.blocks.reserve("crowd", inner * 8)
            executor.blocks.reserve("more", 8 * 8)
            in_ring, in_homes = [], []

            def turn(step: int) -> None:
                if step and not executor.k:
                    in_ring.append(max(executor.blocks.table("more")) >= layout.ring_id)
                elif step:
                    in_homes.append(min(executor.blocks.table("more")) < layout.kv_ids(0).start)
                k = (0, 4)[step % 2]
                assert executor.shortfall(k) == 0
                executor.turn(k)
                assert executor.blocks.ids == layout.kv_ids(k)

            bench.check_answers(executor, between=turn)
            assert all(in_ring)
            assert all(in_homes)
            assert in_ring
            assert in_homes

    def test_too_many_blocks_in_use_say_how_many_must_go_and_change_nothing(self, bench):
        with bench.placed(k=3, k_min=0, mirrors=3) as executor:
            executor.blocks.reserve("all", executor.blocks.free_tokens)
            short = executor.shortfall(1)
            assert short > 0
            with pytest.raises(DeviceMemoryError, match=f"{short} must be freed first"):
                executor.turn(1)
            assert executor.k == 3

    def test_k_stays_between_its_bounds(self, bench):
        with bench.placed(k=2, k_min=1, mirrors=3) as executor:
            with pytest.raises(InputError, match="k must be between 1 and 3"):
                executor.turn(0)
            with pytest.raises(InputError, match="k can be 3 at most"):
                executor.turn(4)


class TestTheLease:
    def run(self, bench, executor, steps):
        for _ in range(steps):
            bench.one_step(executor)
            executor.tend()
            bench.link.drain()  # a mirror is there as soon as it is written

    def mirrored(self, executor, count):
        return executor.memory.mirrored_bytes(count)

    def test_a_larger_lease_mirrors_one_unit_after_another_and_k_may_follow(self, bench, link):
        with bench.placed(k=1, k_min=0, k_max=LAYERS, mirrors=1) as executor:
            executor.lease(self.mirrored(executor, 3))
            assert (executor.m, executor.cap) == (1, 3)
            self.run(bench, executor, 6)
            assert (executor.m, executor.host_bytes) == (3, self.mirrored(executor, 3))
            executor.turn(3)
            bench.check_answers(executor)

    def test_a_smaller_lease_takes_mirrors_back_once_their_units_are_home(self, bench):
        with bench.placed(k=4, k_min=1, mirrors=4) as executor:
            bench.one_step(executor)
            executor.lease(self.mirrored(executor, 2))
            executor.tend()
            assert executor.m == 4  # still streamed
            executor.turn(2)
            self.run(bench, executor, 2)
            assert (executor.m, executor.host_bytes) == (2, self.mirrored(executor, 2))
            bench.check_answers(executor)

    def test_a_replica_with_nothing_to_do_gives_mirrors_back_too(self, bench):
        with bench.placed(k=4, k_min=1, mirrors=4) as executor:
            bench.one_step(executor)
            executor.lease(self.mirrored(executor, 1))
            executor.turn(1)
            executor.settle()
            executor.tend()
            assert executor.host_bytes == self.mirrored(executor, 1)
            assert executor.blocks.ids == executor.layout.kv_ids(1)
            bench.check_answers(executor)

    def test_k_that_rises_in_an_idle_replica_lends_its_homes_at_once(self, bench):
        with bench.placed(k=1, k_min=1, mirrors=4) as executor:
            executor.turn(4)
            executor.settle()
            assert executor.blocks.ids == executor.layout.kv_ids(4)
            bench.check_answers(executor)

    def test_the_floor_is_never_taken(self, bench):
        with bench.placed(k=2, k_min=2, k_max=LAYERS, mirrors=3) as executor:
            floor = self.mirrored(executor, 2)
            with pytest.raises(HostMemoryError, match=f"below the floor of {floor}"):
                executor.lease(floor - 1)
            executor.lease(floor)
            executor.tend()
            assert executor.host_bytes == floor

    def test_a_lease_that_shrinks_while_a_mirror_is_written_gives_that_back(self, bench):
        with bench.placed(k=1, k_min=0, k_max=LAYERS, mirrors=1) as executor:
            executor.lease(self.mirrored(executor, 2))
            executor.tend()
            assert executor.host_bytes == self.mirrored(executor, 2)
            executor.lease(self.mirrored(executor, 1))
            executor.tend()
            assert executor.host_bytes == self.mirrored(executor, 1)
            bench.check_answers(executor)

    @given(st.data())
    @settings(max_examples=15, deadline=None)
    def test_tokens_do_not_notice_leases_that_come_and_go(self, bench, data):
        with bench.placed(k=2, k_min=1, k_max=LAYERS, mirrors=3, poison=True) as executor:

            def between(_step: int) -> None:
                executor.lease(self.mirrored(executor, data.draw(st.integers(1, LAYERS))))
                # How many mirrors are written by now is a matter of time, and not to be drawn from.
                k = min(data.draw(st.integers(1, LAYERS)), executor.m, executor.cap)
                if not executor.shortfall(k):
                    executor.turn(k)
                executor.tend()
                assert executor.host_bytes <= max(
                    executor.lease_bytes, self.mirrored(executor, executor.m)
                )

            bench.check_answers(executor, between=between)
