"""Where a new request goes: replicas drawn by what they can still promise it, none left out.

Judged from reports that are some tens of milliseconds old, so the best one is not simply taken:
everybody who sees the same report would take it. Replicas are drawn instead, each as likely as it
has room, and the one that is asked has the last word.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from select_n_core.decisions.facts import Reason
from select_n_core.decisions.vacancy import Level, Vacancy

_STALE_S = 1.0  # a report older than this says little
_LEAST_CHUNK = 16  # prompt tokens of a step, however little time there is
_ALIKE = 0.1  # headrooms that differ by less are equal: something else may decide
_PROBE = 0.005  # of its room, for a replica that breaks its promise: else it never shows it is well
_SURELY = 2.0  # times what a request may wait, before it is refused without having been asked for
_SOON_S = 0.05
_LIGHT = 1e-9


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks of a replica.

    Attributes:
        prompt_tokens: as far as one can tell.
        most_output: tokens at most. expected_output: that requests of its class come to; None is
            what the replica takes for typical.
        max_wait_s: that it may wait to be let in.
    """

    prompt_tokens: int
    most_output: int
    ttft_s: float
    tpot_s: float
    max_wait_s: float
    expected_output: int | None = None
    priority: int = 0

    def output_tokens(self, vacancy: Vacancy) -> int:
        """Expected of it there."""
        expected = self.expected_output
        return min(self.most_output, vacancy.expected_output if expected is None else expected)


class Sent(NamedTuple):
    """What was sent to a replica and is not in its report yet."""

    requests: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    tpot_s: float = math.inf


NOTHING = Sent()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as whoever sends requests knows it.

    Attributes:
        vacancy: as reported; None before it said anything of itself.
        age_s: of the report.
        draining: it takes no more requests.
        sent: to be counted on top.
    """

    name: str
    vacancy: Vacancy | None
    age_s: float = 0.0
    draining: bool = False
    sent: Sent = NOTHING


class Judgement(NamedTuple):
    """What a replica could do for a request.

    Attributes:
        headroom: requests like it that the replica has room for; at 1 or more it is let in.
        reason: why it is not, or, where it `breaks` its promise, what it would lack; else None.
        fits_in_s: until it would be let in. first_in_s: if nobody waited before it.
        breaks: it would be let in at once, but even alone its steps take longer than promised.
    """

    headroom: float
    reason: Reason | None = None
    fits_in_s: float = 0.0
    first_in_s: float = 0.0
    breaks: bool = False


class TurnedAway(NamedTuple):
    """Nobody could let the request in for as long as it may wait."""

    reason: Reason
    fits_in_s: float


class Course(NamedTuple):
    """Where a request is sent.

    Attributes:
        prefer: in order, first to last. avoid: only where there is nobody else.
        turned_away: it need not be sent at all.
    """

    prefer: tuple[str, ...]
    avoid: tuple[str, ...] = ()
    turned_away: TurnedAway | None = None


def judge(vacancy: Vacancy, sent: Sent, need: Need) -> Judgement:
    """What the replica could do, at the k that suits the request best."""
    places = vacancy.max_batch - vacancy.running - vacancy.waiting - sent.requests
    judged = []
    for level in vacancy.levels:
        judged.append(_at(level, vacancy, sent, need))
        if judged[-1].reason is None and judged[-1].headroom >= places:
            break  # there are not more at any k
    return max(judged, key=lambda each: (each.reason is None, not each.breaks, each.headroom))


def plan_course(
    candidates: Sequence[Candidate],
    need: Need,
    draw: random.Random,
    affinity: str = "",
) -> Course:
    """In which order to ask; everybody is in it once, and nobody is left out.

    First come those that could let the request in and keep their promises, then those that could
    let it in, both drawn by headroom; then the others, drawn by how soon they could; then those of
    whom too little is known.

    Args:
        affinity: requests with the same one go to the same of several replicas of like headroom.
    """
    able: dict[str, float] = {}
    breaking: dict[str, float] = {}
    full: dict[str, Judgement] = {}
    unsure: dict[str, float] = {}
    avoid: list[str] = []
    in_vain = True
    for each in candidates:
        if each.draining:
            avoid.append(each.name)
            continue
        if each.vacancy is None or not each.vacancy.levels:
            unsure[each.name] = 1.0
            continue
        judgement = judge(each.vacancy, each.sent, need)
        if each.age_s > _STALE_S:
            unsure[each.name] = max(1.0, judgement.headroom)
        elif judgement.reason is None:
            able[each.name] = judgement.headroom
        elif not judgement.breaks:
            full[each.name] = judgement
            in_vain = in_vain and _in_vain(judgement, each.vacancy, need)
        elif each.vacancy.running + each.vacancy.waiting + each.sent.requests:
            breaking[each.name] = judgement.headroom
        else:
            able[each.name] = _PROBE * judgement.headroom
    first = _drawn(able, draw)
    if affinity and first:
        _prefer_alike(first, able, affinity)
    later = _drawn(breaking, draw)
    later += _drawn({name: 1 / (each.fits_in_s + _SOON_S) for name, each in full.items()}, draw)
    last = _drawn(unsure, draw)
    turned_away = None
    if full and in_vain and not (able or breaking or unsure):
        soonest = min(full.values(), key=lambda judgement: judgement.fits_in_s)
        turned_away = TurnedAway(soonest.reason or Reason.QUEUE, soonest.fits_in_s)
    return Course((*first, *later, *last), tuple(avoid), turned_away)


def _in_vain(judgement: Judgement, vacancy: Vacancy, need: Need) -> bool:
    """Whether it would surely wait in vain, though it went first.

    Where nobody waits yet it is asked for all the same: a replica that nobody is sent to seems to
    have less to do than is wanted of it, and whoever scales would not know.
    """
    if not vacancy.waiting:
        return False
    least = vacancy.least_priority
    if least is not None and least < need.priority:  # it may take somebody's place
        return False
    return judgement.first_in_s > _SURELY * need.max_wait_s


class _Spare(NamedTuple):
    """Requests like one that there is room for, by what limits them."""

    kv: float
    places: float
    in_time: float

    @property
    def least(self) -> float:
        return min(self)


def _at(level: Level, vacancy: Vacancy, sent: Sent, need: Need) -> Judgement:
    output = need.output_tokens(vacancy)
    end = need.prompt_tokens + output
    tpot_s = min(vacancy.tpot_s, need.tpot_s, sent.tpot_s)
    within_x, row_x = level.compute_within(tpot_s), max(_LIGHT, level.compute_s(1, end))
    breaks = within_x < row_x

    def spare(rows: int, tokens: int) -> _Spare:
        spare_x = within_x - level.compute_s(rows, tokens)
        return _Spare(
            kv=(level.kv_tokens - tokens) / end,
            places=vacancy.max_batch - rows,
            in_time=math.inf if breaks else spare_x / row_x,
        )

    rows = vacancy.running + vacancy.waiting + sent.requests
    tokens = vacancy.running_tokens + vacancy.waiting_tokens + sent.tokens
    room = spare(rows, tokens)
    now_x = level.compute_s(rows, tokens)
    prompts, late_s = _prompts(level, vacancy, sent, need, now_x, math.inf if breaks else within_x)
    headroom = min(room.least, prompts)
    if headroom >= 1:
        return Judgement(headroom, Reason.TPOT if breaks else None, breaks=breaks)

    # As many end per second as run, each after its output.
    per_end_s = output * level.step_s(now_x) / max(1, vacancy.running)
    first = spare(vacancy.running + sent.requests, vacancy.running_tokens + sent.tokens)
    return Judgement(
        headroom,
        _reason(room, headroom),
        fits_in_s=max(late_s, (1 - room.least) * per_end_s),
        # Where nobody runs, nobody's end brings room: the replica has to say what is wrong.
        first_in_s=max(0.0, 1 - first.least) * per_end_s if vacancy.running else 0.0,
    )


def _prompts(
    level: Level, vacancy: Vacancy, sent: Sent, need: Need, now_x: float, within_x: float
) -> tuple[float, float]:
    """How many prompts like the request's come in time, and by how much its own does not.

    Prompts are computed beside the rows that decode, in the time that these leave.
    """
    rows = vacancy.running + vacancy.waiting + sent.requests
    most = max(_LEAST_CHUNK, vacancy.max_step_tokens - rows)
    spare_x = within_x - now_x if rows else math.inf
    chunk = most
    if spare_x < most * level.prompt_token_s:
        chunk = max(_LEAST_CHUNK, int(max(0.0, spare_x) / level.prompt_token_s))
    queued = vacancy.backlog_tokens + sent.prompt_tokens + need.prompt_tokens
    step_s = level.step_s(now_x + min(chunk, queued) * level.prompt_token_s)
    first_token_s = math.ceil(queued / chunk) * step_s
    own_s = math.ceil(need.prompt_tokens / chunk) * step_s
    return 1 + (need.ttft_s - first_token_s) / own_s, max(0.0, first_token_s - need.ttft_s)


def _reason(room: _Spare, headroom: float) -> Reason:
    if room.least > headroom:
        return Reason.TTFT
    if room.in_time == headroom:
        return Reason.TPOT
    return Reason.KV if room.kv == headroom else Reason.QUEUE


def _drawn(weights: Mapping[str, float], draw: random.Random) -> list[str]:
    """All of them, drawn without replacement: each is next as likely as it has weight."""
    return sorted(weights, key=lambda name: draw.expovariate(max(_LIGHT, weights[name])))


def _prefer_alike(drawn: list[str], headroom: Mapping[str, float], affinity: str) -> None:
    """Put first, of those as good as the first, the one that the affinity has always had.

    Rendezvous hashing: where a replica comes or goes, nobody else's changes.
    """
    most = headroom[drawn[0]]
    alike = [
        name for name in drawn if abs(headroom[name] - most) <= _ALIKE * max(headroom[name], most)
    ]
    if len(alike) > 1:
        chosen = max(alike, key=lambda name: _hash(affinity, name))
        drawn.remove(chosen)
        drawn.insert(0, chosen)


def _hash(affinity: str, name: str) -> bytes:
    return hashlib.blake2b(f"{affinity}\0{name}".encode(errors="replace"), digest_size=8).digest()
