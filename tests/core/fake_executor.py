"""An executor without a model: its next token is a hash of what lies in the KV blocks.

A block holds the token ids themselves, so a block that was lost, overwritten too early, taken for
another or brought back to the wrong place shows as a wrong token. Copies between host and device
run as late as the contract of a link allows: when compute waits for them.
"""

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from select_n_core.engine.engine import Engine
from select_n_core.engine.messages import Request
from select_n_core.engine.residence import Swapping
from select_n_core.engine.scheduler import Limits, Scheduler, Turning
from select_n_core.errors import InputError, LinkError
from select_n_core.kv.blocks import BlockTable
from select_n_core.kv.names import Salts
from select_n_core.kv.swap import HostBlocks
from select_n_core.links.base import Direction, LinkCounters

VOCAB = 97
BLOCK_TOKENS = 4
_GARBAGE = 255


def next_token(tokens: list[int]) -> int:
    return sum((place + 1) * (token + 3) for place, token in enumerate(tokens)) % VOCAB


def expected_tokens(request: Request) -> list[int]:
    tokens = list(request.prompt)
    for _ in range(request.sampling.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(request.prompt) :]


@dataclass(eq=False)
class LateCopy:
    target: Tensor
    source: Tensor
    fails: bool
    ran: bool = False

    def run(self) -> None:
        if not self.ran:
            self.ran = True
            if not self.fails:
                self.target.copy_(self.source)

    def done(self) -> bool:
        return self.ran

    def duration_s(self) -> float:
        return 0.0


@dataclass
class LateLink:
    """Runs a copy when it is waited for; `failing` copies of those to come do nothing and fail."""

    kind: str = "late"
    failing: int = 0
    counters: LinkCounters = field(default_factory=LinkCounters)
    copies: list[LateCopy] = field(default_factory=list)
    registered: list[int] = field(default_factory=list)

    def register(self, host: Tensor) -> None:
        self.registered.append(host.data_ptr())

    def unregister(self, host: Tensor) -> None:
        self.registered.remove(host.data_ptr())

    def copy(self, target, source, *, kind, after=(), direction=Direction.TO_DEVICE) -> LateCopy:
        assert after, "a copy waits for the compute that used its bytes"
        assert target.numel() == source.numel()
        copy = LateCopy(target, source, fails=self.failing > 0)
        self.failing = max(0, self.failing - 1)
        self.counters.bytes[direction, kind] += source.numel()
        self.counters.copies[direction, kind] += 1
        self.copies.append(copy)
        return copy

    def compute_event(self) -> object:
        return object()

    def wait(self, copy: LateCopy) -> None:
        copy.run()
        if copy.fails:
            raise LinkError("the cable is out")

    def drain(self) -> None:
        for copy in self.copies:
            copy.run()
        self.copies.clear()

    def close(self) -> None:
        self.drain()


class FakeExecutor:
    """`blocks_at[k]` KV blocks exist while k units are streamed, a larger k has more of them."""

    def __init__(self, blocks_at: list[int], k: int, link: LateLink) -> None:
        self.blocks_at = blocks_at
        self.link = link
        self.k = k
        self.m = len(blocks_at) - 1
        self.cap = self.m
        self.host_bytes = self.lease_bytes = 0
        self.total = blocks_at[-1]
        self.layout = SimpleNamespace(kv_ids=self.kv_ids, k_max=self.m)
        self.memory = SimpleNamespace(units=max(1, self.m))
        self.model = SimpleNamespace(vocab_size=VOCAB)
        self.streamer = SimpleNamespace(streamed_units=0)
        self.blocks = BlockTable(self.kv_ids(k), BLOCK_TOKENS)
        self.cache = torch.full((self.total, BLOCK_TOKENS), _GARBAGE, dtype=torch.uint8)
        self.fails_on: int | None = None  # a token id that no forward survives
        self.steps = self.computed = self.moved = 0  # tokens and blocks

    def kv_ids(self, k: int) -> range:
        if not 0 <= k <= self.m:
            raise InputError(f"k must be between 0 and {self.m}, got {k}", field="k")
        return range(self.total - self.blocks_at[k], self.total)

    def bytes_of(self, block: int) -> Tensor:
        assert block in self.blocks.ids, "these bytes are somebody's weights"
        return self.cache[block]

    def shortfall(self, k: int) -> int:
        return self.blocks.shortfall(self._kept(k))

    def turn(self, k: int) -> None:
        moves = self.blocks.resize(self._kept(k))
        self.moved += len(moves)
        for old, new in moves.items():
            self.cache[new] = self.cache[old]
        self.k = k
        self.cache[: self.blocks.ids.start] = _GARBAGE  # weights come home

    def settle(self) -> None:
        self.blocks.resize(self.kv_ids(self.k))

    def tend(self) -> None:
        pass

    def step(self, rows) -> Tensor:
        tokens = [token for row in rows for token in row.tokens]
        if self.fails_on in tokens:
            raise RuntimeError("a kernel did not like this token")
        logits = []
        owners = owners_of(self.blocks)
        for row in rows:
            assert row.tokens, "a row computes something"
            assert set(row.blocks) <= set(self.blocks.ids)
            for offset, token in enumerate(row.tokens):
                place = row.context + offset
                block = row.blocks[place // BLOCK_TOKENS]
                assert owners[block] == 1, "nobody writes into what others own"
                assert self.blocks._named.name_of(block) is None, "nor into what they may come by"
                self.cache[block, place % BLOCK_TOKENS] = token
            if row.logits:
                seen = self.cache[torch.tensor(row.blocks)].flatten().tolist()
                one = torch.zeros(VOCAB)
                one[next_token(seen[: row.context + len(row.tokens)])] = 1.0
                logits.append(one)
        self.steps, self.computed = self.steps + 1, self.computed + len(tokens)
        self.blocks.resize(self.kv_ids(self.k))
        return torch.stack(logits) if logits else torch.zeros(0, VOCAB)

    def close(self) -> None:
        self.link.close()

    def _kept(self, k: int) -> range:
        now, then = self.blocks.ids, self.kv_ids(k)
        return range(max(now.start, then.start), min(now.stop, then.stop))


def owners_of(blocks: BlockTable) -> Counter[int]:
    """How many requests own each block that anybody owns."""
    return Counter(block for table in blocks._owned.values() for block in table)


class Clock:
    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Served:
    """An engine over a fake executor, and everything it reported."""

    engine: Engine
    executor: FakeExecutor
    link: LateLink
    host: HostBlocks
    clock: Clock
    step_s: float
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, object] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    def step(self) -> None:
        for output in self.engine.step().outputs:
            assert output.request_id not in self.ends, "nothing follows the last output"
            self.tokens.setdefault(output.request_id, []).extend(output.tokens)
            if output.finish is not None:
                self.ends[output.request_id] = output.finish
            if output.error is not None:
                self.errors[output.request_id] = output.error
        self.clock.now_s += self.step_s
        self.check_blocks()

    def run(self, most: int = 3000) -> None:
        for _ in range(most):
            if self.engine.idle:
                return
            self.step()
        raise AssertionError(f"still live after {most} steps: {[*self.scheduler.waiting]}")

    def check_blocks(self) -> None:
        """Every block on the device and in host memory is free or has live owners."""
        blocks, scheduler = self.executor.blocks, self.scheduler
        owners = owners_of(blocks)
        assert set(blocks._owned) <= set(scheduler.running)
        assert len(owners) == blocks.blocks - blocks.free_blocks
        assert blocks._others == {each: count - 1 for each, count in owners.items() if count > 1}
        assert all(blocks._named.name_of(block) for block in blocks._others)
        assert all(not blocks.owned_blocks(name) for name in scheduler.waiting)
        kept = 0
        for sequence in [*scheduler.running.values(), *scheduler.waiting.values()]:
            name = sequence.request.id
            waits = name in scheduler.waiting
            assert self.host.holds(name) == (
                sequence.coming_back or (waits and sequence.computed > 0)
            )
            if self.host.holds(name):
                kept += blocks.blocks_of(sequence.computed)
        assert self.host.free_blocks + kept == self.host.count


def served(
    latency,
    slo,
    blocks_at: list[int],
    k: int = 0,
    *,
    host_blocks: int = 8,
    block_copy_s: float = 1e-6,
    step_s: float = 0.01,
    k_min: int = 0,
    salts: Salts | None = None,
    **limits,
) -> Served:
    """Build one; `limits` are changes of the scheduler's."""
    link, clock = LateLink(), Clock()
    executor = FakeExecutor(blocks_at, k, link)
    host = HostBlocks(host_blocks, BLOCK_TOKENS, link)
    facts = {
        "max_batch": 6,
        "max_step_tokens": 24,
        "max_queue": 1000,
        "max_tokens": min(blocks_at) * BLOCK_TOKENS,
        "vocab_size": VOCAB,
        "least_chunk": 4,
        "expected_output": 4,
    }
    scheduler = Scheduler(
        limits=Limits(**{**facts, **limits}),
        slo=slo,
        latency=latency,
        blocks=executor.blocks,
        k=k,
        slots=2,
        clock=clock,
        swapping=Swapping(host, executor.bytes_of, block_copy_s),
        turning=Turning(
            k_min=k_min,
            k_most=lambda: executor.m,
            blocks_at=tuple(blocks_at),
        ),
        salts=salts,
    )
    engine = Engine(executor, scheduler, (), clock, host)
    return Served(engine, executor, link, host, clock, step_s)
