"""The engine: turns the scheduler's steps into tokens. Synchronous; one step at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from select_n_core.decisions.correction import Seen
from select_n_core.decisions.facts import Cause
from select_n_core.decisions.order import interval_of_k
from select_n_core.engine.headroom import HeadroomWindow
from select_n_core.engine.leases import HostLease
from select_n_core.engine.messages import (
    EngineStats,
    FinishReason,
    Output,
    Request,
    StepReport,
    Turned,
)
from select_n_core.engine.online import OnlineModel
from select_n_core.engine.sampler import Drawn, Sampler
from select_n_core.engine.scheduler import Clock, Scheduler
from select_n_core.engine.sequence import Sequence, Turn, shape_of
from select_n_core.engine.vacancy import VacancyMeter
from select_n_core.errors import EngineError, OverloadedError, SelectNError
from select_n_core.kv.swap import HostBlocks
from select_n_core.links.base import Direction
from select_n_core.memory.reservation import Reservation
from select_n_core.offload.executor import Executor
from select_n_core.offload.placement import StepRow


@dataclass(slots=True)
class _Outcome:
    """What one turn of a step led to."""

    turn: Turn
    drawn: Drawn | EngineError | None = None


class Engine:
    """Requests in, one `StepReport` per step out.

    Args:
        eos_token_ids: tokens that end a request unless it ignores them.
        clock: seconds; the scheduler's own.
        host_blocks: that the scheduler swaps to, if any, to be closed with the engine.
        online: what is learnt of the latency model while serving; None keeps the scheduler's.
        sleep: for so many seconds of `clock`.
        reservation: where its host memory is written down, to be closed with the engine.
        whole_lease_bytes: see `HostLease`.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        eos_token_ids: tuple[int, ...],
        clock: Clock = time.monotonic,
        host_blocks: HostBlocks | None = None,
        online: OnlineModel | None = None,
        sleep: Callable[[float], None] = time.sleep,
        reservation: Reservation | None = None,
        whole_lease_bytes: int = 0,
    ) -> None:
        self.executor = executor
        self.reservation = reservation
        self.scheduler = scheduler
        self._sampler = Sampler(executor.model.vocab_size)
        self._eos = frozenset(eos_token_ids)
        self._clock = clock
        self._host_blocks = host_blocks
        self._online = online
        self._sleep = sleep
        self._short = False  # somebody waits whom the last step left waiting
        self._rested_s = 0.0  # between the last step and the next one
        self.lease = HostLease(
            executor,
            lambda k: self.turn(k, Cause.LEASE),
            clock,
            reservation,
            whole_lease_bytes,
        )
        self._turns: Counter[Cause] = Counter()
        self._offered_tokens: Counter[int] = Counter()
        self._turned: list[Turned] = []
        self._headroom = HeadroomWindow(scheduler.slo)
        self._vacancy = VacancyMeter(scheduler)
        self._outputs: list[Output] = []
        self._iterations = 0
        self._iteration_s = 0.0

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return self.scheduler.idle and not self._outputs

    @property
    def rest_s(self) -> float:
        """Seconds until the next step may begin, for a bus that others need more."""
        if self._online is None or self.scheduler.idle:
            return 0.0
        return self._online.rest_s(self._clock())

    def submit(self, request: Request) -> None:
        """Queue a request; its first output is the verdict: it is let in, or its error."""
        self._vacancy.hear(request)
        typical = self.scheduler.limits.expected_output
        answer = min(request.sampling.max_tokens, typical)
        self._offered_tokens[request.priority] += len(request.prompt) + answer
        try:
            self.scheduler.add(request)
            try:
                self._sampler.add(request)
            except SelectNError:
                self.scheduler.remove(request.id)
                raise
        except SelectNError as error:
            self._note_returned(error)
            self._outputs.append(Output(request.id, finish=FinishReason.ERROR, error=error))

    def cancel(self, request_id: str) -> None:
        """End a request now; one that is no longer live is left alone."""
        if self._forget(request_id) is not None:
            self._outputs.append(Output(request_id, finish=FinishReason.CANCELLED))

    def abort(self, error: Exception) -> None:
        """End every live request with `error`."""
        for request_id in [*self.scheduler.running, *self.scheduler.waiting]:
            self._fail(request_id, error)

    def step(self, tell: Callable[[StepReport], None] | None = None) -> StepReport:
        """Run one step and report everything that happened since the last report.

        Args:
            tell: gets what is known before the step is computed: who is let in, who is returned.
        """
        if (left_s := self.rest_s) > 0:  # whoever drives the engine may have waited already
            self._sleep(left_s)
        self._predict()
        turns = self.scheduler.next_step()
        self._short = bool(self.scheduler.waiting)
        self._outputs += [
            Output(name, cached_tokens=cached) for name, cached in self.scheduler.take_entered()
        ]
        for request_id, error in self.scheduler.take_failed():
            self._note_returned(error)
            self._fail(request_id, error)
        if self.scheduler.change is not None:
            self.turn(*self.scheduler.change)
            turns = [turn for turn in turns if self.scheduler.runs(turn.sequence)]
        if turns:
            if tell is not None and self._outputs:
                tell(StepReport(self._take_outputs(), stats=self.stats()))
            self._compute(turns)
        elif self.scheduler.waiting and not self.scheduler.running:
            self.executor.settle()  # they wait for homes that no iteration comes to empty
        self.lease.tend(idle=not turns)
        turned, self._turned = tuple(self._turned), []
        return StepReport(self._take_outputs(), self.lease.take_answers(), self.stats(), turned)

    def turn(self, k: int, cause: Cause = Cause.ASKED) -> None:
        """Stream `k` units from the next step on; between steps only.

        The last requests in service order are preempted as far as their KV blocks are needed.

        Raises:
            InputError: k is out of range; see `Executor.turn`.
        """
        before = self.executor.k
        self.scheduler.release(self.executor.shortfall(k))
        self.executor.turn(k)
        self.scheduler.turned(k)
        self._turns[cause] += 1
        self._turned.append(Turned(self._clock(), before, k, cause))

    def close(self) -> None:
        """Give the host KV blocks, the executor's memory and the link back. Idempotent."""
        if self._host_blocks is not None:
            self._host_blocks.close()
        if self._online is not None:
            self._online.close()
        self.executor.close()
        self.executor.link.close()
        if self.reservation is not None:
            self.reservation.close()

    @property
    def host_kv_bytes(self) -> int:
        """Host memory of swapped KV blocks, exactly."""
        return 0 if self._host_blocks is None else self._host_blocks.nbytes

    def stats(self) -> EngineStats:
        """The engine as it stands."""
        executor, scheduler, now_s = self.executor, self.scheduler, self._clock()
        counters = executor.link.counters
        return EngineStats(
            measured_at_s=time.time(),
            k=executor.k,
            interval=interval_of_k(executor.k, executor.memory.units),
            mirrored=executor.m,
            cap=executor.cap,
            host_bytes=executor.host_bytes,
            lease_bytes=executor.lease_bytes,
            reserved_bytes=0 if self.reservation is None else self.reservation.held_bytes,
            turns={str(cause): count for cause, count in self._turns.items()},
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_free_tokens=executor.blocks.free_tokens,
            kv_cached_tokens=executor.blocks.cached_blocks * executor.blocks.block_tokens,
            kv_tokens=executor.blocks.blocks * executor.blocks.block_tokens,
            iterations=self._iterations,
            link_bytes=sum(
                nbytes
                for (direction, _), nbytes in counters.bytes.items()
                if direction is Direction.TO_DEVICE
            ),
            link_bytes_by={
                (str(direction), kind): nbytes
                for (direction, kind), nbytes in counters.bytes.items()
            },
            streamed_units=executor.streamer.streamed_units,
            stall_s=counters.stall_s,
            iteration_s=self._iteration_s,
            ttft_headroom=self._headroom.ttft(now_s),
            tpot_headroom=self._headroom.tpot(now_s),
            swaps=scheduler.swaps,
            recomputes=scheduler.recomputes,
            prefix_queried_tokens=scheduler.prefixes.queried_tokens,
            prefix_hit_tokens=scheduler.prefixes.hit_tokens,
            admitted=scheduler.admitted,
            returned={str(reason): count for reason, count in scheduler.returned.items()},
            vacancy=self._vacancy.read(now_s),
            offered_tokens=dict(self._offered_tokens),
        )

    def _predict(self) -> None:
        """Let the step be decided by what is known of the machine now."""
        if (online := self._online) is None:
            return
        scheduler, executor = self.scheduler, self.executor
        k = (scheduler.k_up if self._short else None) or executor.k
        online.tick(0 if scheduler.idle else k)
        scheduler.latency, scheduler.reserve = online.latency, online.reserve

    def _compute(self, turns: list[Turn]) -> None:
        """Run the step, and learn from how long it took.

        A rest before it is part of that: a wait for copies that the bus was not granted for.
        """
        shape, k = shape_of(turns), self.executor.k
        if self._online is not None:
            self._online.begins(k, self._clock())
        begun_s = time.perf_counter()
        outcomes = self._run(turns)
        ended_s = time.perf_counter()
        for outcome in outcomes:
            self._settle(outcome)
        self._iteration_s = time.perf_counter() - begun_s
        self._iterations += 1
        rested_s, self._rested_s = self._rested_s, self.rest_s
        if self._online is None:
            return
        link = self.executor.take_link_time()
        if not any(isinstance(outcome.drawn, EngineError) for outcome in outcomes):
            self._online.saw(
                Seen(
                    shape,
                    k,
                    rested_s + ended_s - begun_s,
                    link.stall_s if link.stall_s is None else rested_s + link.stall_s,
                    link.transfer_s,
                    link.copied_s,
                )
            )

    def _take_outputs(self) -> tuple[Output, ...]:
        outputs, self._outputs = tuple(self._outputs), []
        return outputs

    def _run(self, turns: list[Turn]) -> list[_Outcome]:
        """One forward for all; if it raises, each alone, so that only the culprit ends."""
        try:
            return self._forward(turns)
        except Exception as error:
            if len(turns) == 1:
                cause = EngineError(f"the forward failed: {error}")
                cause.__cause__ = error
                return [_Outcome(turns[0], cause)]
        return [outcome for turn in turns for outcome in self._run([turn])]

    def _forward(self, turns: list[Turn]) -> list[_Outcome]:
        logits = self.executor.step(
            [
                StepRow(
                    blocks=self.executor.blocks.table(turn.sequence.request.id),
                    context=turn.sequence.computed,
                    tokens=turn.new_tokens,
                    logits=turn.samples,
                )
                for turn in turns
            ]
        )
        return self._draw(turns, logits)

    def _draw(self, turns: Rows[Turn], logits: Tensor) -> list[_Outcome]:
        sampling = [turn for turn in turns if turn.samples]
        with torch.inference_mode():
            drawn = self._sampler.sample(logits, [turn.sequence.request.id for turn in sampling])
        found = {id(turn): token for turn, token in zip(sampling, drawn, strict=True)}
        return [_Outcome(turn, found.get(id(turn))) for turn in turns]

    def _settle(self, outcome: _Outcome) -> None:
        sequence, drawn = outcome.turn.sequence, outcome.drawn
        request = sequence.request
        if isinstance(drawn, EngineError):
            self._fail(request.id, drawn, spoiled=True)
            return
        sequence.computed += outcome.turn.amount
        if drawn is None:
            return
        sequence.tokens.append(drawn.token)
        self._note_time(sequence)
        ended = not request.sampling.ignore_eos and drawn.token in self._eos
        if ended or drawn.token in request.sampling.stop_token_ids:
            self._finish(sequence, Output(request.id, finish=FinishReason.STOP))
            return
        logprobs = () if drawn.logprob is None else (drawn.logprob,)
        if sequence.output_tokens >= request.sampling.max_tokens:
            self._finish(
                sequence, Output(request.id, (drawn.token,), logprobs, FinishReason.LENGTH)
            )
            return
        self._outputs.append(Output(request.id, (drawn.token,), logprobs))

    def _note_time(self, sequence: Sequence) -> None:
        now_s = self._clock()
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
            took_s = now_s - sequence.arrived_s
            self._headroom.saw_first_token(now_s, took_s / sequence.promise.ttft_s)
        sequence.last_token_s = now_s

    def _note_returned(self, error: SelectNError) -> None:
        if isinstance(error, OverloadedError):
            self._headroom.saw_returned(self._clock(), error.retry_after_s)

    def _finish(self, sequence: Sequence, output: Output) -> None:
        self._forget(sequence.request.id)
        self._outputs.append(output)
        if sequence.output_tokens > 1:
            assert sequence.first_token_s is not None
            assert sequence.last_token_s is not None
            span_s = sequence.last_token_s - sequence.first_token_s
            tpot_s = span_s / (sequence.output_tokens - 1)
            self._headroom.saw_finish(self._clock(), tpot_s / sequence.promise.tpot_s)

    def _fail(self, request_id: str, error: Exception, *, spoiled: bool = False) -> None:
        self._forget(request_id, spoiled=spoiled)
        self._outputs.append(Output(request_id, finish=FinishReason.ERROR, error=error))

    def _forget(self, request_id: str, *, spoiled: bool = False) -> Sequence | None:
        self._sampler.drop(request_id)
        return self.scheduler.remove(request_id, spoiled=spoiled)
