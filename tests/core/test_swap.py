"""Host KV blocks: what goes out comes back, whoever used the bytes in between."""

import gc
import time
import weakref

import pytest
import torch
from fake_executor import LateLink
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pydantic import ValidationError
from tiny import save_tiny

from select_n_core.config import ModelConfig
from select_n_core.engine.build import build_engine
from select_n_core.engine.messages import Request, SamplingParams
from select_n_core.errors import DeviceMemoryError, LinkError
from select_n_core.kv.swap import KV, PIECE_BYTES, HostBlocks
from select_n_core.links.base import Direction
from select_n_core.links.emulated import EmulatedLink
from select_n_core.models.cache import CACHE_VARIABLE

torch.set_num_threads(1)

SIZE = 256


@pytest.fixture
def link():
    link = EmulatedLink(1e11)
    yield link
    link.close()


@pytest.fixture
def host(link):
    host = HostBlocks(4, SIZE, link)
    yield host
    host.close()


def device(blocks: int, first: int = 1) -> list[torch.Tensor]:
    memory = torch.empty(blocks, SIZE, dtype=torch.uint8)
    for index in range(blocks):
        memory[index] = first + index
    return list(memory)


def test_blocks_come_back_as_they_went_to_wherever_there_is_room(host):
    blocks = device(3)
    host.keep("a", blocks)
    assert (host.free_blocks, host.holds("a")) == (1, True)
    for block in blocks:
        block.fill_(99)
    elsewhere = device(3, first=50)
    host.bring_back("a", elsewhere)
    host.settle("a")
    assert [int(block[0]) for block in elsewhere] == [1, 2, 3]
    assert all(bool((block == block[0]).all()) for block in elsewhere)
    assert (host.free_blocks, host.holds("a")) == (4, False)


def test_every_block_is_one_copy_each_way_counted_as_kv(host, link):
    host.keep("a", device(3))
    host.bring_back("a", device(3))
    host.settle("a")
    for direction in Direction:
        assert link.counters.copies[direction, KV] == 3
        assert link.counters.bytes[direction, KV] == 3 * SIZE


def test_a_large_block_goes_in_pieces_so_that_weights_get_between(link):
    host = HostBlocks(1, PIECE_BYTES + 512, link)
    block = torch.full((PIECE_BYTES + 512,), 7, dtype=torch.uint8)
    host.keep("a", [block])
    back = torch.zeros_like(block)
    host.bring_back("a", [back])
    host.settle("a")
    assert link.counters.copies[Direction.TO_HOST, KV] == 2
    assert torch.equal(back, block)
    host.close()


def test_more_than_fits_is_refused_and_takes_nothing(host):
    host.keep("a", device(2))
    with pytest.raises(DeviceMemoryError, match="3 host KV blocks are needed, 2 are free"):
        host.keep("b", device(3))
    assert (host.free_blocks, host.holds("b")) == (2, False)


def test_an_owner_keeps_one_cache_at_a_time(host):
    host.keep("a", device(1))
    with pytest.raises(DeviceMemoryError, match="drop it first"):
        host.keep("a", device(1))
    assert host.free_blocks == 3


def test_what_is_dropped_is_free_again_and_dropping_nothing_is_no_event(host):
    host.keep("a", device(4))
    host.drop("a")
    host.drop("nobody")
    assert host.free_blocks == 4


def test_none_at_all_is_a_host_that_keeps_nothing(link):
    host = HostBlocks(0, SIZE, link)
    assert (host.nbytes, host.free_blocks) == (0, 0)
    with pytest.raises(DeviceMemoryError):
        host.keep("a", device(1))
    host.close()


def test_closing_gives_the_exact_bytes_back(link):
    host = HostBlocks(5, SIZE, link)
    assert host.nbytes == 5 * SIZE
    host.keep("a", device(2))
    alive = weakref.ref(host._map._map)
    host.close()
    host.close()
    gc.collect()
    assert alive() is None


def test_keeping_waits_until_the_bytes_may_be_overwritten():
    slow = EmulatedLink(bytes_per_s=1e6)
    host = HostBlocks(2, 10_000, slow)
    block = torch.full((10_000,), 3, dtype=torch.uint8)
    begun_s = time.perf_counter()
    host.keep("a", [block])
    assert time.perf_counter() - begun_s >= 10_000 / 1e6
    host.close()
    slow.close()


class TestFailures:
    def test_a_copy_out_that_fails_keeps_nothing(self):
        link = LateLink()
        host = HostBlocks(4, SIZE, link)
        link.failing = 1
        with pytest.raises(LinkError, match="cable"):
            host.keep("a", device(2))
        assert (host.free_blocks, host.holds("a")) == (4, False)
        assert all(copy.ran for copy in link.copies), "nobody writes into blocks that are free"

    def test_a_copy_back_that_fails_is_told_and_frees_the_host_blocks(self):
        link = LateLink()
        host = HostBlocks(4, SIZE, link)
        host.keep("a", device(2))
        link.failing = 1
        host.bring_back("a", device(2))
        with pytest.raises(LinkError, match="cable"):
            host.settle("a")
        assert host.free_blocks == 4
        assert all(copy.ran for copy in link.copies)

    def test_an_owner_dropped_on_its_way_back_leaves_no_copy_under_way(self):
        link = LateLink()
        host = HostBlocks(4, SIZE, link)
        host.keep("a", device(2))
        host.bring_back("a", device(2))
        assert not all(copy.ran for copy in link.copies)
        host.drop("a")
        assert all(copy.ran for copy in link.copies)

    def test_a_link_that_takes_no_more_copies_fails_the_one_who_asked(self):
        link = EmulatedLink(1e11)
        host = HostBlocks(2, SIZE, link)
        host.keep("a", device(1))
        link.close()
        with pytest.raises(LinkError, match="closed"):
            host.keep("b", device(1))
        with pytest.raises(LinkError, match="closed"):
            host.bring_back("a", device(1))
        assert host.free_blocks == 1


FACTS = {
    "name": "tiny",
    "dtype": "float32",
    "device_memory": "1300KiB",
    "host_memory": "2MiB",
    "host_kv": "1MiB",
    "link": {"kind": "emulated", "bandwidth": "100GB/s"},
    "slo": {"tpot": "5s", "ttft": "30s"},
    "interval": 2,
    "max_batch": 4,
    "max_step_tokens": 64,
    "block_tokens": 16,
    "workload": {"prompt_tokens": 20, "output_tokens": 8},
}


def test_host_kv_of_the_configuration_is_a_part_of_host_memory_that_mirrors_leave(
    tmp_path, monkeypatch
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    source = save_tiny(tmp_path / "model")
    engine, info = build_engine(ModelConfig(source=str(source), **FACTS))
    host, executor = engine._host_blocks, engine.executor
    block = executor.memory.kv_block_bytes
    assert host.count == (1 << 20) // block
    assert info.host_bytes == executor.host_bytes + host.count * block
    assert executor.host_bytes + (1 << 20) <= 2 << 20
    prompts = [tuple(range(number, number + 60)) for number in range(1, 7)]
    for number, prompt in enumerate(prompts):
        engine.submit(Request(str(number), prompt, SamplingParams(60, ignore_eos=True)))
    tokens: dict[str, int] = {}
    while not engine.idle:
        for output in engine.step().outputs:
            tokens[output.request_id] = tokens.get(output.request_id, 0) + len(output.tokens)
    stats = engine.stats()
    assert stats.swaps + stats.recomputes > 0
    assert tokens == {str(number): 60 for number in range(6)}
    engine.close()


def test_host_kv_above_host_memory_is_refused_by_name():
    with pytest.raises(ValidationError, match=r"host_kv .* is a part of host_memory"):
        ModelConfig(source="x", **{**FACTS, "host_kv": "3MiB"})


class Histories(RuleBasedStateMachine):
    """Owners go and come in any order over a link that copies as late as it may."""

    @initialize(count=st.integers(0, 8))
    def make(self, count: int) -> None:
        self.link = LateLink()
        self.host = HostBlocks(count, SIZE, self.link)
        self.kept: dict[str, list[int]] = {}
        self.coming: dict[str, list[torch.Tensor]] = {}
        self.stamp = 0

    @rule(name=st.sampled_from("abcd"), count=st.integers(1, 4))
    def keep(self, name: str, count: int) -> None:
        if name in self.kept:
            return
        self.stamp = (self.stamp + 7) % 200
        blocks = device(count, self.stamp)
        if count > self.host.free_blocks:
            with pytest.raises(DeviceMemoryError):
                self.host.keep(name, blocks)
            return
        self.host.keep(name, blocks)
        self.kept[name] = [self.stamp + index for index in range(count)]
        for block in blocks:
            block.fill_(255)  # the next owner's

    @precondition(lambda self: getattr(self, "kept", None))
    @rule(data=st.data())
    def come_back(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.kept)))
        if name not in self.coming:
            self.coming[name] = device(len(self.kept[name]), 0)
            self.host.bring_back(name, self.coming[name])
        else:
            self.host.settle(name)
            assert [int(block[0]) for block in self.coming.pop(name)] == self.kept.pop(name)

    @rule(name=st.sampled_from("abcd"))
    def drop(self, name: str) -> None:
        self.host.drop(name)
        self.kept.pop(name, None)
        self.coming.pop(name, None)

    @invariant()
    def blocks_are_conserved(self) -> None:
        if hasattr(self, "host"):
            held = sum(map(len, self.kept.values()))
            assert self.host.free_blocks + held == self.host.count


Histories.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestHistories = Histories.TestCase
