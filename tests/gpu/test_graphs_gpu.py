"""Captured graphs, attention kernels and the law's bounds on a real GPU."""

import importlib.util
import statistics
import time
from contextlib import contextmanager

import pytest
import streaming
import torch
from parity import answers_of, assert_same
from streaming import LAYERS, NEW_TOKENS, Bench
from tiny import tiny_llama

from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.kv.attention import Row
from select_n_core.kv.cache import KVCache, block_bytes
from select_n_core.kv.pick import AttentionKind, pick_attention
from select_n_core.links.base import Direction
from select_n_core.links.cuda import CudaLink
from select_n_core.memory.host import HostMap
from select_n_core.models.load import take_apart
from select_n_core.models.seam import AttentionTraits, LayerKV
from select_n_core.offload.executor import Executor
from select_n_core.offload.graphs import Graphs
from select_n_core.offload.placement import Placement, StepRow, model_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def bench():
    link = CudaLink(GPU)
    yield Bench(link, GPU, atol=1e-3)
    link.close()


@contextmanager
def placed(model, link, *, k=0, slots=2, graphs=Graphs.ALL, blocks=30, block_tokens=8):
    """An arena that holds the whole model and some KV at k = 0, with every unit mirrored."""
    memory = model_memory(model, block_tokens)
    executor = Executor(
        model,
        Placement(
            arena_bytes=arena_bytes_for(memory, 0, slots, blocks) + slots * memory.slot_bytes + 256,
            k=k,
            k_min=0,
            k_max=memory.units,
            mirrors=memory.units,
            slots=slots,
            block_tokens=block_tokens,
            graphs=graphs,
        ),
        link,
        GPU,
    )
    try:
        yield executor
    finally:
        executor.close()


@pytest.mark.parametrize(("k", "slots"), [(0, 2), (1, 1), (2, 2), (3, 2), (2, 3), (LAYERS, 2)])
def test_captured_steps_get_transformers_tokens(bench, k, slots):
    with placed(bench.model, bench.link, k=k, slots=slots) as executor:
        for _ in range(3):
            assert_same(answers_of(executor, bench.prompts, NEW_TOKENS), bench.expected, bench.atol)
        assert executor.graphs.refused is None
        assert executor.graphs.replays > 0


def test_graphs_stay_right_while_k_turns(bench):
    with placed(bench.model, bench.link, k=2) as executor:
        turns = iter([2, 2, 2, 2, 0, 0, 0, 0, 4, 4, 1, 1, 1, 1, 1, 1, 0, 0, 0] * 6)
        step = executor.step

        def turning(rows):
            executor.turn(next(turns))
            return step(rows)

        executor.step = turning
        for _ in range(3):
            assert_same(answers_of(executor, bench.prompts, NEW_TOKENS), bench.expected, bench.atol)
        assert executor.graphs.refused is None


def test_tokens_hold_with_poisoned_slots_under_graphs(bench):
    streaming.check_that_poisoned_slots_change_nothing(bench, k=2, slots=2)


@pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="needs the extra `cuda` (FlashInfer)"
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize(
    "traits", [AttentionTraits(0.125), AttentionTraits(0.125, window=9)], ids=["plain", "window"]
)
def test_flashinfer_and_gathered_pages_agree(heads, kv_heads, traits):
    kv, size, dtype = (LayerKV(kv_heads, 64, 64),), 16, torch.bfloat16
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(count, tokens):
        shape = (count, tokens, 64)
        return torch.randn(shape, generator=generator, device=GPU, dtype=dtype)

    steps = [
        [Row([5, 3, 9], 0, 40), Row([7], 0, 3)],
        [Row([5, 3, 9], 40, 1), Row([7], 3, 1)],
        [Row([5, 3, 9], 41, 5), Row([7], 4, 1)],
    ]
    inputs = [
        [random(n, sum(row.tokens for row in rows)) for n in (heads, kv_heads, kv_heads)]
        for rows in steps
    ]
    outs = {}
    for kind in (AttentionKind.GATHERED, AttentionKind.FLASHINFER):
        region = torch.full(
            (12 * block_bytes(kv, size, dtype),), 0xFF, dtype=torch.uint8, device=GPU
        )
        cache = KVCache(region, kv, size, dtype)
        attention = pick_attention(cache, kv, dtype, GPU, kind)
        outs[kind] = [
            attention.step(rows).attend(0, *own, traits).float()
            for rows, own in zip(steps, inputs, strict=True)
        ]
    for ours, theirs in zip(*outs.values(), strict=True):
        torch.testing.assert_close(theirs, ours, atol=2e-2, rtol=2e-2)


@pytest.fixture(scope="module")
def wide():
    """Units large enough that their copies take longer than launching their kernels."""
    return take_apart(tiny_llama(layers=8, hidden=2048, heads=16, kv_heads=16))


def _iteration_s(executor, k, count=8):
    executor.turn(k)
    row = StepRow(executor.blocks.table("r"), 4, [3])
    times_s = []
    for _ in range(count + 4):
        begun_s = time.perf_counter()
        executor.step([row]).argmax(-1).tolist()
        times_s.append(time.perf_counter() - begun_s)
    return statistics.median(times_s[4:])


def test_no_iteration_is_faster_than_its_copies_and_copies_hide_behind_compute(wide):
    """The law's bounds: k*t from below; less than compute and copies one after the other above."""
    link = CudaLink(GPU)
    with placed(wide, link, graphs=Graphs.OFF) as executor:
        executor.blocks.reserve("r", 8)
        nbytes = executor.memory.slot_bytes
        host = HostMap(nbytes)
        link.register(host.bytes)
        target = torch.empty(nbytes, dtype=torch.uint8, device=GPU)
        copies = [link.copy(target, host.bytes, kind="test") for _ in range(6)]
        link.drain()
        transfer_s = statistics.median(copy.duration_s() for copy in copies)
        resident_s = _iteration_s(executor, 0)
        for k in (2, 4, 8):
            streamed_s = _iteration_s(executor, k)
            assert streamed_s > 0.8 * k * transfer_s
            if k < 8:  # with every unit streamed, compute may wait for each
                assert streamed_s < resident_s + k * transfer_s
        link.unregister(host.bytes)
    link.close()


def test_the_host_never_waits_inside_a_forward(wide):
    """The host is done launching while most copies are still on their way."""
    link = CudaLink(GPU)
    with placed(wide, link, k=8, graphs=Graphs.OFF) as executor:
        executor.blocks.reserve("r", 8)
        row = StepRow(executor.blocks.table("r"), 4, [3])
        executor.step([row])
        torch.cuda.synchronize()
        event = None
        copy = link.copy

        def held(*arguments, **options):
            nonlocal event
            if event is None:
                torch.cuda._sleep(int(1e9))  # cycles: half a second of compute in front
                event = link.compute_event()
            return copy(*arguments, **options)

        link.copy = held
        executor.step([row])
        assert event is not None
        assert not event.done()
        link.copy = copy
        link.drain()
    assert link.counters.copies[Direction.TO_DEVICE, "weights"] > 8
    link.close()
