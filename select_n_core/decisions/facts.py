"""What a step is decided from and what is decided: plain facts about requests, blocks and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from select_n_core.decisions.service import ServicePolicy


@dataclass(slots=True, eq=False)
class RequestFacts:
    """A live request; no decision changes it.

    Not frozen, because there are hundreds and every step has them newly: whoever serves keeps one
    per request and brings it up to date before each decision. What is to be kept must be copied.

    Attributes:
        context_tokens: in the cache: on the device, or in host blocks. Of one that waits and has
            none there, the beginning that the cache holds, to be had as soon as it is let in.
        prompt_left: known tokens to compute before it yields its next one (after a recompute its
            own output is among them); 0 means it decodes, one token a step.
        slack_s: until its next token is due; negative when it is late.
        blocks: on the device that it owns.
        expected_tokens: prompt and output in all, as far as one can tell.
        most_tokens: prompt and output at most.
        priority: its class; larger goes first.
        waited_s: not running, in all.
        wait_left_s: until a request that was never let in is returned to its caller; infinite for
            all others.
        shared: it waits, and of the blocks that hold the beginning of its context others own so
            many: they need not be free for it to be let in.
        in_host: it waits, and its cache does so in host blocks.
    """

    id: str
    context_tokens: int
    prompt_left: int
    slack_s: float
    blocks: int = 0
    expected_tokens: int = 0
    most_tokens: int = 0
    tenant: str = ""
    priority: int = 0
    waited_s: float = 0.0
    arrived_s: float = 0.0
    wait_left_s: float = math.inf
    shared: int = 0
    in_host: bool = False

    @property
    def next_tokens(self) -> int:
        """In the cache once it has yielded its next token."""
        return self.context_tokens + (self.prompt_left or 1)

    @property
    def at_hand(self) -> int:
        """Blocks that it need not be given: its own, or those that it will share."""
        return self.blocks or self.shared

    @property
    def is_new(self) -> bool:
        """Whether it waits and was never let in."""
        return self.wait_left_s < math.inf


def _none(_: str) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class StepState:
    """All that a step's decision depends on.

    Attributes:
        running: requests that hold KV blocks. waiting: those that do not, new or preempted.
        free_blocks, blocks: that nobody owns (what they hold may be found again until somebody
            takes them), that exist.
        host_blocks: free in host memory for requests that are swapped out.
        block_copy_s: one block over the link, one way.
        k_min: the least k may become.
        k_up: the next larger k that gives more blocks; None where there is none.
        blocks_at: KV blocks that exist at every k; empty where k stands still.
        tpot_s: the tightest promise to anyone; a batch that takes longer per step cannot keep it.
        calm_s: since a miss was predicted. dwell_s: since k turned.
        reserve: share by which a step may take longer than predicted.
        levels: weighted tokens served so far, of every tenant with a live request.
        shared_of: blocks of a running request, by its id, that others own too. It is asked for
            those few that may have to leave.
    """

    running: tuple[RequestFacts, ...]
    waiting: tuple[RequestFacts, ...]
    free_blocks: int
    blocks: int
    block_tokens: int
    max_batch: int
    max_step_tokens: int
    least_chunk: int
    k: int
    slots: int
    tpot_s: float
    policy: ServicePolicy
    k_min: int = 0
    k_up: int | None = None
    blocks_at: tuple[int, ...] = ()
    host_blocks: int = 0
    block_copy_s: float = 0.0
    calm_s: float = 0.0
    dwell_s: float = 0.0
    reserve: float = 0.0
    levels: Mapping[str, float] = field(default_factory=dict)
    shared_of: Callable[[str], int] = _none

    def freed_by(self, running: RequestFacts) -> int:
        """Blocks that come free when it leaves, the others staying."""
        return running.blocks - self.shared_of(running.id)

    def blocks_of(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one request take."""
        return -(-tokens // self.block_tokens)


class Way(StrEnum):
    """How a preempted request's cache comes back."""

    SWAP = "swap"  # copied to host blocks and back
    RECOMPUTE = "recompute"  # computed again from its tokens


class Preemption(NamedTuple):
    """A running request that gives its blocks back."""

    id: str
    way: Way


class Cause(StrEnum):
    """Why k turns."""

    TPOT = "tpot"  # somebody's TPOT would be missed
    LINK = "link"  # the same, because copies take longer than promised steps
    KV = "kv"  # requests wait for KV blocks, and there is time
    SPARE = "spare"  # KV blocks in homes that nobody needs
    LEASE = "lease"  # host memory was revoked
    ASKED = "asked"  # by a caller


class Change(NamedTuple):
    """A turn of k."""

    k: int
    cause: Cause


class Reason(StrEnum):
    """Why a request is not let in."""

    KV = "kv"  # the KV blocks it is expected to need are not free
    TPOT = "tpot"  # with one more row, steps take longer than promised
    TTFT = "ttft"  # its first token, or that of one let in before, would be late
    QUEUE = "queue"  # no place in the batch, or others come before it


class Refusal(NamedTuple):
    """A waiting request that is returned to its caller.

    Attributes:
        fits_in_s: until it would be let in, as far as one can tell, if nobody else came.
    """

    id: str
    reason: Reason
    fits_in_s: float


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What happens in this step, in this order.

    Attributes:
        preempt: running requests that give their blocks back first.
        fail: waiting requests that no turn of k can make fit, even alone.
        admit: waiting requests that hold KV blocks from now on, in order. Those with a cache in
            host memory get it back during this step and have no row in it.
        rows: (request, new tokens) of this step, decoding rows first.
        change: what k turns to from this step on, and why; None leaves it.
        missed: whether somebody's next token is predicted to be late.
        refuse: waiting requests that were never let in and waited for as long as they may, or
            whose first token comes too late whatever is done.
    """

    preempt: tuple[Preemption, ...]
    fail: tuple[str, ...]
    admit: tuple[str, ...]
    rows: tuple[tuple[str, int], ...]
    change: Change | None
    missed: bool
    refuse: tuple[Refusal, ...] = ()
