"""The scheduler: requests from arrival to their last token, one pure decision per step.

It applies what `plan_step` decides to the block table and the host blocks. A request is either
running (it owns KV blocks) or waiting: new, or preempted with its tokens kept and its cache in
host blocks or nowhere. It says which k the next step should have; whoever turns k tells it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from select_n_core.decisions.batch import Batch
from select_n_core.decisions.facts import (
    Change,
    Preemption,
    Reason,
    Refusal,
    StepState,
    Way,
)
from select_n_core.decisions.forecast import Forecast
from select_n_core.decisions.interval import next_up
from select_n_core.decisions.latency import LatencyModel
from select_n_core.decisions.pace import pace_of
from select_n_core.decisions.preemption import release
from select_n_core.decisions.service import ServicePolicy, TenantLedger
from select_n_core.decisions.step import plan_step
from select_n_core.engine.messages import Request
from select_n_core.engine.overload import queue_full, waited_in_vain
from select_n_core.engine.prefixes import Prefixes
from select_n_core.engine.residence import Residence, Swapping
from select_n_core.engine.sequence import Sequence, Turn, facts_of
from select_n_core.engine.targets import TPOT_AIM, promised
from select_n_core.errors import (
    ContextLengthError,
    DeviceMemoryError,
    RequestError,
    SelectNError,
)
from select_n_core.kv.blocks import BlockTable
from select_n_core.kv.names import Salts
from select_n_core.slo import SLO

Clock = Callable[[], float]

_PATIENCE = 4.0  # promised lifetimes of a typical request that one waits to be lifted by a class


@dataclass(frozen=True, slots=True)
class Limits:
    """What a replica lets in.

    Attributes:
        max_tokens: prompt plus output of one request.
        max_queue: new requests waiting at most.
        least_chunk: prompt tokens a step takes even when promises are already broken.
        expected_output: tokens of a typical answer, for which room is kept.
    """

    max_batch: int
    max_step_tokens: int
    max_queue: int
    max_tokens: int
    vocab_size: int
    least_chunk: int = 32
    expected_output: int = 64


@dataclass(frozen=True, slots=True)
class Turning:
    """How far k may turn.

    Attributes:
        k_min, k_most: both included; the most follows what is mirrored.
        blocks_at: KV blocks that exist at every k up to the largest; what stands below `k_min` is
            not looked at.
    """

    k_min: int
    k_most: Callable[[], int]
    blocks_at: tuple[int, ...]


class Entered(NamedTuple):
    """A request that is let in for the first time, and how much of its prompt was cached."""

    id: str
    cached_tokens: int


@dataclass(slots=True)
class Scheduler:
    """Queues, admits, preempts and orders; `plan_step` decides.

    Attributes:
        latency: what decisions predict with. reserve: share by which steps may take longer.
        k: units streamed now. change: what it is to turn to, as decided last.
        swapping: None where there are no host KV blocks. turning: None where k stands still.
        salts: of the prefixes that are cached; None caches none.
        waiting, running: live requests by id.
        swaps, recomputes: preemptions so far, by what became of the cache.
        admitted: requests let in so far. returned: those that were not, by reason.
        prefixes: what the cache holds of the requests' beginnings.
    """

    limits: Limits
    slo: SLO
    latency: LatencyModel
    blocks: BlockTable
    k: int
    slots: int
    clock: Clock
    swapping: Swapping | None = None
    turning: Turning | None = None
    salts: Salts | None = None
    waiting: dict[str, Sequence] = field(default_factory=dict, init=False)
    running: dict[str, Sequence] = field(default_factory=dict, init=False)
    reserve: float = field(default=0.0, init=False)
    change: Change | None = field(default=None, init=False)
    swaps: int = field(default=0, init=False)
    recomputes: int = field(default=0, init=False)
    admitted: int = field(default=0, init=False)
    returned: Counter[Reason] = field(default_factory=Counter, init=False)
    prefixes: Prefixes = field(init=False)
    _ledger: TenantLedger = field(init=False)
    _residence: Residence = field(init=False)
    _policy: ServicePolicy = field(init=False)
    _failed: list[tuple[str, SelectNError]] = field(default_factory=list, init=False)
    _entered: list[Entered] = field(default_factory=list, init=False)
    _filling: list[Sequence] = field(default_factory=list, init=False)  # a block, by this step
    _forecast: Forecast | None = field(default=None, init=False)  # of the step to come
    _tpots_s: Counter[float] = field(default_factory=Counter, init=False)  # aimed at, of the live
    _missed_s: float = field(init=False)
    _turned_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._ledger = TenantLedger()
        self.prefixes = Prefixes(self.blocks, self.salts)
        self._residence = Residence(self.blocks, self.swapping, self.prefixes)
        lifetime_s = self.slo.ttft_s + self.limits.expected_output * self.slo.tpot_s
        self._policy = ServicePolicy(
            quantum_s=self.slo.tpot_s,
            patience_s=_PATIENCE * lifetime_s,
            overtaken_s=self.slo.ttft_s / 2,
            share_tokens=float(self.limits.max_tokens),  # one request of the largest size
        )
        self._missed_s = self._turned_s = self.clock()

    @property
    def k_up(self) -> int | None:
        """The next k that frees memory for those who wait; None where there is none."""
        turning = self.turning
        if turning is None or not self.waiting:
            return None
        return next_up(self.k, turning.k_most(), turning.k_min, self.slots, turning.blocks_at)

    @property
    def tightest_tpot_s(self) -> float:
        """The tightest promise to any live request, as decisions aim at it; else the model's."""
        return min(self._tpots_s, default=self.slo.tpot_s * TPOT_AIM)

    @property
    def kv_blocks(self) -> int:
        """That exist at this k."""
        return self.blocks.blocks if self.turning is None else self.turning.blocks_at[self.k]

    @property
    def idle(self) -> bool:
        """Whether nobody runs or waits."""
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ContextLengthError: it can never fit. RequestError: malformed or not unique.
            OverloadedError: the queue is full.
        """
        if not request.prompt:
            raise RequestError("the prompt is empty", field="prompt")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.limits.vocab_size:
            raise RequestError(
                f"prompt token ids must be between 0 and {self.limits.vocab_size - 1}",
                field="prompt",
            )
        asked = len(request.prompt) + request.sampling.max_tokens
        if asked > self.limits.max_tokens:
            raise ContextLengthError(
                f"prompt ({len(request.prompt)} tokens) plus max_tokens "
                f"({request.sampling.max_tokens}) is {asked}; this model serves at most "
                f"{self.limits.max_tokens} tokens per request here",
                field="max_tokens",
            )
        if self.find(request.id) is not None:
            raise RequestError(f"request id {request.id!r} is in use", field="id")
        # Those who wait for no more than the next step to begin are not queued yet, and those who
        # were preempted were let in before.
        places = self.limits.max_batch - len(self.running)
        arrived_s = self.clock()
        if request.sent_s is not None:
            arrived_s = min(arrived_s, request.sent_s)
        sequence = Sequence(request, arrived_s, promised(self.slo, request), since_s=arrived_s)
        if (queued := self._crowd(request, places)) is not None:
            self.returned[Reason.QUEUE] += 1
            raise queue_full(queued, self._fits_in_s(sequence))
        self.prefixes.waits(sequence)
        self._ledger.join(request.tenant, request.weight)
        self._tpots_s[sequence.aim.tpot_s] += 1
        self.waiting[request.id] = sequence

    def _crowd(self, request: Request, places: int) -> int | None:
        """How many wait, of all or of its class or tenant, where no more may; else None."""
        bounds = (request.max_queue, request.max_tenant_queue)
        if bounds == (None, None) and len(self.waiting) < self.limits.max_queue + places:
            return None
        waiting = [each for each in self.waiting.values() if not each.preempted]
        if len(waiting) >= self.limits.max_queue + places:
            return len(waiting)
        if request.max_queue is not None:
            alike = sum(each.request.slo_class == request.slo_class for each in waiting)
            if alike >= request.max_queue + places:
                return alike
        if request.max_tenant_queue is not None:
            own = sum(each.request.tenant == request.tenant for each in waiting)
            if own >= request.max_tenant_queue + places:
                return own
        return None

    def find(self, request_id: str) -> Sequence | None:
        """The live sequence of that id."""
        return self.running.get(request_id) or self.waiting.get(request_id)

    def remove(self, request_id: str, *, spoiled: bool = False) -> Sequence | None:
        """Forget a live sequence and take its blocks back; None if it is not live.

        Args:
            spoiled: nobody is to go on from what it computed.
        """
        sequence = self.running.pop(request_id, None)
        if sequence is None:
            sequence = self.waiting.pop(request_id, None)
        if sequence is not None:
            self._residence.forget(sequence, spoiled=spoiled)
            self._ledger.leave(sequence.request.tenant)
            self._tpots_s[sequence.aim.tpot_s] -= 1
            if not self._tpots_s[sequence.aim.tpot_s]:
                del self._tpots_s[sequence.aim.tpot_s]
        return sequence

    def runs(self, sequence: Sequence) -> bool:
        """Whether it has its place in the coming step."""
        return self.running.get(sequence.request.id) is sequence

    def take_entered(self) -> list[Entered]:
        """The requests let in for the first time since the last call."""
        entered, self._entered = self._entered, []
        return entered

    def take_failed(self) -> list[tuple[str, SelectNError]]:
        """The requests that can never fit or were returned since the last call; none is live."""
        failed, self._failed = self._failed, []
        return failed

    def next_step(self) -> list[Turn]:
        """Decide the step, apply the decision and return everyone's turn."""
        self._arrive()
        self.prefixes.name(self._filling)
        self._forecast = None
        decision = plan_step(self.state(), self.latency)
        if decision.missed:
            self._missed_s = self.clock()
        for request_id in decision.fail:
            self._fail(request_id)
        for refusal in decision.refuse:
            self._return(refusal)
        self._preempt(decision.preempt)
        came = [self._let_in(request_id) for request_id in decision.admit]
        for sequence in came:  # once everyone has what was found, blocks may be given away
            if not self._residence.bring_back(sequence):
                self._wait_again(sequence, Way.RECOMPUTE)
        self.change = decision.change
        turns: list[Turn] = []
        running, self._filling = self.running, []
        for request_id, count in decision.rows:
            sequence = running[request_id]
            end = sequence.computed + count
            if end > sequence.room:
                self._residence.reserve(sequence, end)
                # Tenants pay by the block, and once for what is computed again.
                self._ledger.charge(sequence.request.tenant, sequence.charge(sequence.room))
            if end >= sequence.name_at:
                self._filling.append(sequence)
            turns.append(Turn(sequence, count))
        return turns

    def release(self, blocks: int) -> None:
        """Preempt the last running requests in service order until `blocks` came back.

        Before every turn of k, also for no blocks: what is on its way back to a block must be
        there before the block moves.
        """
        self._arrive()
        if blocks > 0:
            self._preempt(release(self.state(), blocks, self.latency))

    def turned(self, k: int) -> None:
        """K was turned; it is `k` from the next step on."""
        self.k, self.change = k, None
        self._turned_s = self.clock()

    def state(self) -> StepState:
        """The facts that the step's decision is made from."""
        self.prefixes.look(self.waiting.values())
        now_s, expected = self.clock(), self.limits.expected_output
        size = self.blocks.block_tokens
        turning = self.turning
        return StepState(
            running=facts_of(self.running.values(), now_s, expected),
            waiting=facts_of(self.waiting.values(), now_s, expected),
            free_blocks=self.blocks.free_blocks,
            blocks=self.kv_blocks,
            block_tokens=size,
            max_batch=self.limits.max_batch,
            max_step_tokens=self.limits.max_step_tokens,
            least_chunk=self.limits.least_chunk,
            k=self.k,
            slots=self.slots,
            tpot_s=self.tightest_tpot_s,
            policy=self._policy,
            k_min=self.k if turning is None else turning.k_min,
            k_up=self.k_up,
            blocks_at=() if turning is None else turning.blocks_at,
            host_blocks=self._residence.host_blocks,
            block_copy_s=self._residence.block_copy_s,
            calm_s=now_s - self._missed_s,
            dwell_s=now_s - self._turned_s,
            reserve=self.reserve,
            levels=self._ledger.levels(),
            shared_of=self.blocks.shared,
        )

    def _let_in(self, request_id: str) -> Sequence:
        sequence = self.waiting.pop(request_id)
        sequence.let_in(self.clock())
        self.prefixes.begin(sequence)
        if not sequence.preempted:
            self.admitted += 1
            self._entered.append(Entered(request_id, sequence.computed))
        self.running[request_id] = sequence
        return sequence

    def _arrive(self) -> None:
        for lost in self._residence.settle(self.running.values()):
            self._wait_again(lost, Way.RECOMPUTE)

    def _preempt(self, preemptions: tuple[Preemption, ...]) -> None:
        for request_id, way in preemptions:
            self._wait_again(self.running[request_id], way)

    def _wait_again(self, sequence: Sequence, way: Way) -> None:
        taken = self._residence.leave(sequence, way)
        self.swaps += taken is Way.SWAP
        self.recomputes += taken is Way.RECOMPUTE
        sequence.preempted += 1
        sequence.since_s = self.clock()
        self.waiting[sequence.request.id] = self.running.pop(sequence.request.id)

    def _fail(self, request_id: str) -> None:
        sequence = self.waiting[request_id]
        need = self.blocks.blocks_of(len(sequence.tokens))
        self._failed.append(
            (
                request_id,
                DeviceMemoryError(
                    f"request {request_id} needs {need} KV blocks to go on, this replica has "
                    f"{self.blocks.blocks} now, even alone; send a shorter one or raise "
                    "device_memory"
                ),
            )
        )
        self.remove(request_id)

    def _return(self, refusal: Refusal) -> None:
        sequence = self.waiting[refusal.id]
        assert sequence.since_s is not None
        self.returned[refusal.reason] += 1
        waited_s = self.clock() - sequence.since_s
        error = waited_in_vain(refusal.reason, waited_s, refusal.fits_in_s)
        self._failed.append((refusal.id, error))
        self.remove(refusal.id)

    def _fits_in_s(self, sequence: Sequence) -> float:
        """When a new request would be let in that finds the queue full."""
        if self._forecast is None:
            state = self.state()
            batch = Batch(state.running, state)
            pace = pace_of(self.latency, self.k, self.slots)
            self._forecast = Forecast(state, batch, (), state.waiting, pace)
        (facts,) = facts_of([sequence], self.clock(), self.limits.expected_output)
        return self._forecast.fits_in_s(facts)
