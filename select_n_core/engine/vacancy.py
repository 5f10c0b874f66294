"""What the engine says of the room it has left, after every step; see `decisions.vacancy`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from select_n_core.decisions.facts import RequestFacts
from select_n_core.decisions.latency import LatencyModel
from select_n_core.decisions.vacancy import Level, Vacancy, levels_of
from select_n_core.engine.messages import Request
from select_n_core.engine.scheduler import Scheduler

_LOOK_S = 0.05  # between two looks at how long steps take: a report does not leave more often
_MOST_SENDERS = 256


class VacancyMeter:
    """Reads a scheduler's vacancy, and keeps count of whom it heard."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._heard: dict[str, int] = {}
        self._of: tuple[object, ...] = ()
        self._levels: tuple[Level, ...] = ()
        self._looked_s = 0.0

    def hear(self, request: Request) -> None:
        """The request has come, whatever becomes of it."""
        if request.sender:
            last = self._heard.pop(request.sender, 0)  # who was heard last stands last
            self._heard[request.sender] = max(last, request.number)
            if len(self._heard) > _MOST_SENDERS:
                del self._heard[next(iter(self._heard))]

    def read(self, now_s: float) -> Vacancy:
        """The vacancy as it stands.

        Args:
            now_s: on the scheduler's clock.
        """
        scheduler, limits = self._scheduler, self._scheduler.limits
        size, exist = scheduler.blocks.block_tokens, scheduler.kv_blocks
        levels = self._look(scheduler.latency, now_s)
        running = [each.facts for each in scheduler.running.values()]
        waiting = [each.facts for each in scheduler.waiting.values()]
        return Vacancy(
            levels=levels,
            max_batch=limits.max_batch,
            max_step_tokens=limits.max_step_tokens,
            expected_output=limits.expected_output,
            tpot_s=scheduler.tightest_tpot_s,
            running=len(running),
            waiting=len(waiting),
            least_priority=min([each.priority for each in chain(running, waiting)], default=None),
            running_tokens=_tokens(running, size),
            waiting_tokens=_tokens(waiting, size),
            backlog_tokens=sum([each.prompt_left for each in chain(running, waiting)]),
            reclaimable_tokens=max(0, levels[-1].kv_tokens - exist * size),
            heard=dict(self._heard),
        )

    def _look(self, latency: LatencyModel, now_s: float) -> tuple[Level, ...]:
        scheduler, limits = self._scheduler, self._scheduler.limits
        turning, size = scheduler.turning, scheduler.blocks.block_tokens
        if turning is None:
            at = [(scheduler.k, scheduler.blocks.blocks * size)]
        else:
            most = max(scheduler.k, turning.k_most())
            ks = sorted({min(turning.k_min, scheduler.k), scheduler.k, most})
            at = [(k, turning.blocks_at[k] * size) for k in ks]
        of = (latency, *at)
        if self._levels and (of == self._of or 0 <= now_s - self._looked_s < _LOOK_S):
            return self._levels
        self._of, self._looked_s = of, now_s
        self._levels = levels_of(
            latency, scheduler.slots, at, limits.max_batch, limits.max_step_tokens
        )
        return self._levels


def _tokens(facts: Iterable[RequestFacts], block_tokens: int) -> int:
    """KV that the requests are expected to hold in the end, whole blocks."""
    ends = [max(each.expected_tokens, each.next_tokens) for each in facts]
    return block_tokens * sum([-(-end // block_tokens) for end in ends])
