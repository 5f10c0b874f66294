"""The streaming is real: checks over a placed Llama, shared by every link that can run them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from parity import (
    Answer,
    answers_of,
    answers_of_transformers,
    assert_same,
    placed,
    random_prompts,
)
from tiny import VOCAB_SIZE, tiny_llama
from torch import Tensor

from select_n_core.decisions.order import offload_order, streamed_units
from select_n_core.links.base import Copy, Direction, Link
from select_n_core.models.load import LoadedModel, take_apart
from select_n_core.offload.executor import Executor
from select_n_core.offload.placement import StepRow
from select_n_core.offload.streamer import WEIGHTS

LAYERS = 5
NEW_TOKENS = 8
CHUNK = 6
SENT = (Direction.TO_DEVICE, WEIGHTS)


@dataclass
class Bench:
    """A tiny Llama in float32, taken apart, with transformers' own answers to some prompts."""

    link: Link
    device: torch.device
    atol: float = 1e-4
    prompts: list[list[int]] = field(
        default_factory=lambda: random_prompts([17, 1, 9, 24], VOCAB_SIZE)
    )
    module: Any = field(init=False)
    model: LoadedModel = field(init=False)
    expected: list[Answer] = field(init=False)

    def __post_init__(self) -> None:
        self.module = tiny_llama(layers=LAYERS)
        self.expected = answers_of_transformers(self.module, self.prompts, NEW_TOKENS)
        assert min(answer.margin() for answer in self.expected) > 2 * self.atol, "a near-tie"
        self.model = take_apart(self.module)

    def placed(self, **placement: Any):
        return placed(self.model, self.link, self.device, **placement)

    def answers(
        self, executor: Executor, between: Callable[[int], None] = lambda _step: None
    ) -> list[Answer]:
        return answers_of(executor, self.prompts, NEW_TOKENS, CHUNK, between)

    def check_answers(
        self, executor: Executor, between: Callable[[int], None] = lambda _step: None
    ) -> None:
        assert_same(self.answers(executor, between), self.expected, self.atol)

    def one_step(self, executor: Executor) -> Tensor:
        """The logits after the first prompt, on the CPU."""
        executor.blocks.reserve("step", len(self.prompts[0]))
        row = StepRow(executor.blocks.table("step"), 0, self.prompts[0])
        logits = executor.step([row]).float().cpu()
        executor.blocks.release("step")
        return logits


def check_tokens_at(bench: Bench, k: int, slots: int) -> None:
    with bench.placed(k=k, slots=slots) as executor:
        bench.check_answers(executor)


def check_that_every_tensor_lies_in_the_arena(bench: Bench, k: int, slots: int) -> None:
    """Inside each layer's forward all tensors of the model are in the arena, or not there."""
    with bench.placed(k=k, slots=slots) as executor:
        model, streamed = bench.model, set(executor.streamed)
        seen: list[int] = []

        def look(index: int) -> None:
            seen.append(index)
            for tensor in [*model.units[index].tensors(), *model.static.tensors()]:
                assert executor.arena.holds(tensor)
            for other, unit in enumerate(model.units):
                if other != index and other in streamed:
                    assert all(tensor.numel() == 0 for tensor in unit.tensors())

        handles = [
            layer.register_forward_pre_hook(lambda *_, index=index: look(index))
            for index, layer in enumerate(model.layers)
        ]
        bench.one_step(executor)
        for handle in handles:
            handle.remove()
        assert seen == list(range(LAYERS))
        for layer in range(LAYERS):
            assert executor.arena.holds(executor.cache.keys(layer))
            assert executor.arena.holds(executor.cache.values(layer))
        assert executor.arena.bytes.numel() == executor.placement.arena_bytes
        storage = executor.arena.bytes.untyped_storage()
        assert storage.nbytes() == executor.placement.arena_bytes


def check_that_poisoned_slots_change_nothing(bench: Bench, k: int, slots: int) -> None:
    with bench.placed(k=k, slots=slots, poison=True) as executor:
        copy, poisoned = bench.link.copy, []

        def look(target: Tensor, source: Tensor, **rest: Any) -> Copy:
            poisoned.append(bool(target.view(torch.float32).isnan().all()))
            return copy(target, source, **rest)

        with patch.object(bench.link, "copy", look):
            bench.check_answers(executor)
        # All but the first copies refill a slot that somebody released.
        assert poisoned[slots:] == [True] * (len(poisoned) - slots)
        assert len(poisoned) > NEW_TOKENS * k


def check_that_mirrors_are_what_is_computed_with(bench: Bench) -> None:
    """One changed byte of a mirror changes the logits; changed back, they are back."""
    with bench.placed(k=2, slots=1) as executor:
        before = bench.one_step(executor)
        mirror = executor.mirrors[executor.streamed[-1]]
        position = mirror.view(torch.float32).abs().argmax().item() * 4 + 3
        for changed in (True, False):
            bench.link.drain()
            mirror[position] ^= 0x40  # the top of a float's exponent
            bench.one_step(executor)  # what was copied ahead is used up
            assert torch.equal(bench.one_step(executor), before) != changed


def check_link_bytes(bench: Bench, k: int, slots: int, iterations: int) -> None:
    with bench.placed(k=k, slots=slots) as executor:
        before = bench.link.counters.bytes[SENT]
        for _ in range(iterations):
            bench.one_step(executor)
        sent = bench.link.counters.bytes[SENT] - before
        unit_bytes = executor.memory.unit_bytes[0]
        assert executor.memory.unit_bytes == (unit_bytes,) * LAYERS
        assert sent == (iterations * k + min(slots, k)) * unit_bytes
        assert executor.streamer.streamed_units == iterations * k


def check_host_bytes(bench: Bench, k: int, mirrors: int) -> None:
    with bench.placed(k=k, mirrors=mirrors) as executor:
        mirrored = offload_order(LAYERS)[:mirrors]
        assert executor.streamed == streamed_units(LAYERS, k)
        assert set(executor.mirrors) == set(mirrored)
        assert executor.host_bytes == sum(executor.memory.unit_bytes[unit] for unit in mirrored)
        for unit, mirror in executor.mirrors.items():
            assert mirror.numel() == executor.memory.unit_bytes[unit]
            assert mirror.device.type == "cpu"


def check_that_released_units_are_empty(bench: Bench) -> None:
    with bench.placed(k=2) as executor:
        bench.one_step(executor)
        for index, unit in enumerate(bench.model.units):
            empty = all(tensor.numel() == 0 for tensor in unit.tensors())
            assert empty == (index in executor.streamed)


def check_that_close_gives_everything_back(bench: Bench) -> None:
    with bench.placed(k=2) as executor:
        mirrors = [host.data_ptr() for host in executor.mirrors.values()]
        assert len(set(mirrors)) == 2
    for unit in [*bench.model.units, bench.model.static]:
        assert all(tensor.numel() == 0 for tensor in unit.tensors())
    with bench.placed(k=LAYERS, slots=3) as executor:
        bench.check_answers(executor)


def check_turning_k(bench: Bench, ks: Sequence[int], slots: int) -> None:
    """k moves before every step: the same tokens, no byte for nothing, KV that follows k."""
    with bench.placed(k=ks[0], k_min=0, mirrors=LAYERS, slots=slots, poison=True) as executor:
        before, streamed, last = bench.link.counters.bytes[SENT], 0, ks[0]

        def turn(step: int) -> None:
            nonlocal streamed, last
            if step:
                assert executor.blocks.ids == executor.layout.kv_ids(last)
            executor.turn(ks[step % len(ks)])
            streamed += max(last, executor.k)
            last = executor.k

        bench.check_answers(executor, between=turn)
        assert executor.blocks.ids == executor.layout.kv_ids(last)
        sent = bench.link.counters.bytes[SENT] - before
        assert sent <= (streamed + min(slots, last)) * executor.memory.unit_bytes[0]
        for unit in range(LAYERS):
            away = all(tensor.numel() == 0 for tensor in bench.model.units[unit].tensors())
            assert away == (unit in executor.streamed)


def check_turning_a_full_k(bench: Bench, ks: Sequence[int], slots: int, crowd: int) -> None:
    """As `check_turning_k`, where so many blocks are taken that k = 0 needs those in the ring."""
    with bench.placed(k=0, k_min=0, mirrors=LAYERS, slots=slots, poison=True) as executor:
        before, streamed = bench.link.counters.bytes[SENT], 0
        executor.blocks.reserve("crowd", crowd * executor.placement.block_tokens)

        def turn(step: int) -> None:
            nonlocal streamed
            k, last = ks[step % len(ks)], executor.k
            if executor.blocks.blocks - executor.blocks.free_blocks > len(
                executor.layout.kv_ids(k)
            ):
                assert executor.shortfall(k) > 0
                k = last
            assert executor.shortfall(k) == 0
            executor.turn(k)
            streamed += max(last, k) + (slots if k != last else 0)

        bench.check_answers(executor, between=turn)
        executor.blocks.release("crowd")
        assert executor.blocks.free_blocks == len(executor.layout.kv_ids(executor.k))
        sent = bench.link.counters.bytes[SENT] - before
        assert sent <= (streamed + slots) * executor.memory.unit_bytes[0]


def check_steady_bytes_after_turning(bench: Bench) -> None:
    """Once k stands still again, an iteration moves k units, as if it had never moved."""
    with bench.placed(k=4, k_min=0, mirrors=LAYERS) as executor:
        for k in (4, 1, 3, 0, 2):
            executor.turn(k)
            bench.one_step(executor)
        bench.one_step(executor)
        before = bench.link.counters.bytes[SENT]
        for _ in range(3):
            bench.one_step(executor)
        sent = bench.link.counters.bytes[SENT] - before
        assert sent == 3 * 2 * executor.memory.unit_bytes[0]
