"""Captured decode steps answer like uncaptured ones, wherever the units are."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from fake_graphs import TapeGraphs
from parity import answers_of, answers_of_transformers, assert_same, random_prompts
from streaming import LAYERS
from tiny import VOCAB_SIZE, tiny_llama

from select_n_core.decisions.layout import arena_bytes_for
from select_n_core.errors import StreamingError
from select_n_core.kv.pick import AttentionKind
from select_n_core.links.emulated import EmulatedLink
from select_n_core.models.load import take_apart
from select_n_core.offload.executor import Executor
from select_n_core.offload.graphs import Graphs, graph_runtime, padded_rows
from select_n_core.offload.placement import Placement, StepRow, model_memory

torch.set_num_threads(1)

CPU = torch.device("cpu")
NEW_TOKENS = 12
ATOL = 1e-4


@pytest.fixture(scope="module")
def model():
    return take_apart(tiny_llama(layers=LAYERS))


@pytest.fixture(scope="module")
def expected():
    prompts = random_prompts([17, 1, 9], VOCAB_SIZE)
    return prompts, answers_of_transformers(tiny_llama(layers=LAYERS), prompts, NEW_TOKENS)


@contextmanager
def placed(model, graphs, *, k, slots=2, k_max=None, mode=Graphs.ALL, poison=False):
    memory = model_memory(model, 8)
    link = EmulatedLink(bytes_per_s=2e9)
    placement = Placement(
        arena_bytes=arena_bytes_for(memory, 0, slots, 30) + slots * memory.slot_bytes + 256,
        k=k,
        slots=slots,
        k_min=0,
        k_max=k if k_max is None else k_max,
        mirrors=k if k_max is None else k_max,
        block_tokens=8,
        threads=1,
        attention=AttentionKind.GATHERED,
        graphs=mode,
        poison=poison,
    )
    executor = Executor(model, placement, link, CPU, graphs=graphs)
    yield executor
    executor.close()
    link.close()


@pytest.mark.parametrize(
    ("k", "slots"), [(0, 2), (1, 1), (1, 2), (2, 1), (3, 2), (2, 3), (LAYERS, 2)]
)
def test_captured_steps_get_transformers_tokens(model, expected, k, slots):
    prompts, answers = expected
    graphs = TapeGraphs()
    with placed(model, graphs, k=k, slots=slots, poison=k > 0) as executor:
        for _ in range(2):
            assert_same(answers_of(executor, prompts, NEW_TOKENS), answers, ATOL)
        assert executor.graphs is not None
        assert executor.graphs.refused is None
        assert executor.graphs.replays >= NEW_TOKENS
        # One graph where nothing is streamed, else cut before and after each streamed unit.
        assert len(graphs.tapes) == executor.graphs.captured * (2 * k + 1)


def test_with_nothing_streamed_no_hook_runs_in_a_captured_step(model):
    graphs = TapeGraphs()
    with placed(model, graphs, k=0) as executor:
        executor.blocks.reserve("r", 16)
        row = StepRow(executor.blocks.table("r"), 0, [5])
        for _ in range(3):
            executor.step([row])
        assert executor.graphs is not None
        assert executor.graphs.replays == 1
        assert executor.streamer.span.stamps == []  # no iteration was ever begun


def test_graphs_stay_right_while_k_turns(model, expected):
    prompts, answers = expected
    graphs = TapeGraphs()
    with placed(model, graphs, k=2, k_max=4) as executor:
        turns = iter([2, 2, 2, 2, 0, 0, 0, 0, 4, 4, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0] * 4)
        step = executor.step

        def turning(rows):
            executor.turn(next(turns))
            return step(rows)

        executor.step = turning
        for _ in range(3):
            assert_same(answers_of(executor, prompts, NEW_TOKENS), answers, ATOL)
        assert executor.graphs is not None
        assert executor.graphs.replays > 0
        assert executor.graphs.refused is None


def test_resident_graphs_leave_streamed_steps_alone(model, expected):
    prompts, answers = expected
    graphs = TapeGraphs()
    with placed(model, graphs, k=2, mode=Graphs.RESIDENT) as executor:
        assert_same(answers_of(executor, prompts, NEW_TOKENS), answers, ATOL)
        assert not graphs.tapes
        executor.turn(0)
        assert_same(answers_of(executor, prompts, NEW_TOKENS), answers, ATOL)
        assert graphs.tapes


def test_rows_that_want_no_logits_get_none(model):
    graphs = TapeGraphs()
    with placed(model, graphs, k=0) as executor:
        for name in ("a", "b", "c"):
            executor.blocks.reserve(name, 8)
        rows = [
            StepRow(executor.blocks.table(name), 0, [token], logits=name != "b")
            for name, token in (("a", 3), ("b", 4), ("c", 5))
        ]
        out = [executor.step(rows) for _ in range(4)]
        assert executor.graphs is not None
        assert executor.graphs.replays == 2
        for other in out[1:]:
            torch.testing.assert_close(other, out[0], atol=1e-5, rtol=0)


def test_a_model_that_cannot_be_captured_is_told_once_and_served(expected, caplog):
    module = tiny_llama(layers=LAYERS)
    model = take_apart(module)
    module.model.norm.register_forward_hook(lambda _m, _a, out: out * float(out.sum() * 0 + 1))
    prompts, answers = expected
    graphs = TapeGraphs()
    with placed(model, graphs, k=2) as executor:
        assert_same(answers_of(executor, prompts, NEW_TOKENS), answers, ATOL)
        assert executor.graphs is not None
        assert "not permitted" in (executor.graphs.refused or "")
        assert executor.graphs.captured == 0
    assert caplog.text.count("not captured") == 1


def test_sizes_that_were_not_used_for_long_make_room(model):
    graphs = TapeGraphs()
    with (
        patch("select_n_core.offload.graphs._MOST_SIZES", 1),
        placed(model, graphs, k=0) as executor,
    ):
        for name in ("a", "b", "c"):
            executor.blocks.reserve(name, 8)
        rows = [StepRow(executor.blocks.table(name), 0, [5]) for name in ("a", "b", "c")]
        alone = [executor.step(rows[:1]) for _ in range(3)]
        together = [executor.step(rows) for _ in range(3)]
        again = [executor.step(rows[:1]) for _ in range(3)]
        assert executor.graphs is not None
        assert executor.graphs.captured == 1
        assert executor.graphs.replays == 3
        for logits in (*alone, *again, *(each[:1] for each in together)):
            torch.testing.assert_close(logits, alone[0], atol=1e-5, rtol=0)


def test_graphs_can_be_turned_off_for_a_while(model):
    graphs = TapeGraphs()
    with placed(model, graphs, k=0) as executor:
        executor.blocks.reserve("r", 8)
        assert executor.graphs is not None
        executor.graphs.enabled = False
        for _ in range(3):
            executor.step([StepRow(executor.blocks.table("r"), 0, [5])])
        assert graphs.tapes == []


def test_batch_sizes_come_in_few_sizes():
    assert [padded_rows(n) for n in (1, 2, 3, 4, 5, 8, 9, 64, 65, 250)] == [
        1, 2, 4, 4, 8, 8, 16, 64, 96, 256
    ]  # fmt: skip


def test_graphs_want_a_gpu():
    assert graph_runtime(Graphs.OFF, CPU) is None
    with pytest.raises(StreamingError, match="say 'off'"):
        graph_runtime(Graphs.ALL, CPU)
