"""What the cluster benchmark makes of what it saw: attainment, shares of tenants, how fast
something follows. Pure arithmetic over outcomes and samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

from benchmarks.cluster_load import BUCKET_S, UNSAID, Outcome, Seen, Source
from benchmarks.slo_score import Share

WINDOW_S = 10.0
_STEP_S = 1.0
_BACKLOG = 2  # requests that wait; a single one may just be in prefill


@dataclass(frozen=True, slots=True)
class Score:
    """Some requests against their targets.

    Attributes:
        ended: how those that did not complete ended, and how many.
        ttft, tpot: over admitted ones. good: met both, over offered ones.
        unsaid: that ended without a word from the server.
    """

    offered: int
    admitted: int
    ended: Mapping[str, int]
    ttft: Share
    tpot: Share
    good: Share
    goodput_per_s: float
    tokens_per_s: float
    unsaid: int

    def document(self) -> dict[str, Any]:
        """For the result's JSON."""
        shares = {name: getattr(self, name).document() for name in ("ttft", "tpot", "good")}
        return asdict(self) | shares

    def line(self, name: str) -> str:
        """For people."""
        ended = ", ".join(f"{code} {count}" for code, count in sorted(self.ended.items()))
        return (
            f"{name:<28}{self.offered:>8}{self.admitted:>9}  TTFT {_percent(self.ttft)}  "
            f"TPOT {_percent(self.tpot)}  good {_percent(self.good)}  "
            f"{self.goodput_per_s:.2f}/s  {self.tokens_per_s:.0f} tok/s  {ended}"
        )


def score(
    sources: Iterable[Source], outcomes: Iterable[Outcome], seconds: float, tokens: int
) -> Score:
    """Score the outcomes of these sources, all of a load of so many seconds."""
    by_name = {source.name: source for source in sources}
    own = [each for each in outcomes if each.source in by_name]
    admitted = [each for each in own if each.admitted]

    def in_time(each: Outcome) -> bool:
        return each.ttft_s is not None and each.ttft_s <= by_name[each.source].ttft_s

    def at_pace(each: Outcome) -> bool:
        return each.tpot_s is not None and each.tpot_s <= by_name[each.source].tpot_s

    good = sum(in_time(each) and at_pace(each) for each in own)
    return Score(
        offered=len(own),
        admitted=len(admitted),
        ended=dict(Counter(each.ended for each in own if each.ended not in ("length", "stop"))),
        ttft=Share(sum(map(in_time, admitted)), len(admitted)),
        tpot=Share(sum(map(at_pace, admitted)), len(admitted)),
        good=Share(good, len(own)),
        goodput_per_s=good / seconds,
        tokens_per_s=tokens / seconds,
        unsaid=sum(each.ended in UNSAID for each in own),
    )


def tokens_of(seen: Seen, names: Iterable[str]) -> int:
    """Tokens that came for these sources."""
    wanted = set(names)
    return sum(count for (name, _), count in seen.tokens.items() if name in wanted)


class WindowShare(NamedTuple):
    """One tenant in one window in which it and others were backlogged.

    Attributes:
        share: of the tokens of all who were. fair: by their weights.
    """

    begin_s: float
    source: str
    share: float
    fair: float

    @property
    def error(self) -> float:
        """Relative to the fair share."""
        return abs(self.share / self.fair - 1)


def window_shares(sources: Sequence[Source], seen: Seen) -> list[WindowShare]:
    """Shares of backlogged tenants of one model in every window of `WINDOW_S`, a second apart.

    A tenant is backlogged in a window when at every look in it more than one of its requests
    waited for a first token. Who had less to ask for than its share is left out, and so are windows
    with one tenant or none.
    """
    end_s = max((at_s for at_s, _ in seen.waiting), default=0.0)
    found = []
    for step in range(int((end_s - WINDOW_S) / _STEP_S) + 1):
        begin_s = step * _STEP_S
        looks = [w for at_s, w in seen.waiting if begin_s <= at_s <= begin_s + WINDOW_S]
        there = [s for s in sources if all(look.get(s.name, 0) >= _BACKLOG for look in looks)]
        if len(there) < 2:
            continue
        first, last = round(begin_s / BUCKET_S), round((begin_s + WINDOW_S) / BUCKET_S)
        came = {s.name: sum(seen.tokens[s.name, at] for at in range(first, last)) for s in there}
        total, weights = sum(came.values()), sum(source.weight for source in there)
        if not total:
            continue
        found += [
            WindowShare(begin_s, s.name, came[s.name] / total, s.weight / weights) for s in there
        ]
    return found


class Point(NamedTuple):
    """Something that was measured, at a moment."""

    at_s: float
    value: float


def follows_s(points: Sequence[Point], from_s: float, to_s: float) -> float | None:
    """Seconds from `from_s` until nine tenths of the way to where it settled before `to_s`.

    It settled at the median of the second half of that time. None where it did not move by a
    hundredth, or there is nothing to tell from.
    """
    before = [value for at_s, value in points if at_s <= from_s]
    after = [point for point in points if from_s < point.at_s <= to_s]
    half_s = (from_s + to_s) / 2
    late = [value for at_s, value in after if at_s > half_s]
    if not before or not late:
        return None
    begin, settled = before[-1], median(late)
    way = settled - begin
    if abs(way) <= 0.01 * max(abs(begin), abs(settled)):
        return None
    return next(at_s - from_s for at_s, value in after if (value - begin) / way >= 0.9)


def by_second(points: Sequence[Point], seconds: float) -> list[float]:
    """The value that held at the begin of every second; 0 before there was one."""
    values, at, held = [], 0, 0.0
    for second in range(int(seconds)):
        while at < len(points) and points[at].at_s <= second:
            held = points[at].value
            at += 1
        values.append(held)
    return values


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of them do not exceed; None of none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """p50, p95 and the largest, and how many there are."""
    return {
        "count": len(values),
        "p50": quantile(values, 0.5),
        "p95": quantile(values, 0.95),
        "max": max(values, default=None),
    }


def mean_curve(
    moments: Iterable[float],
    value: Callable[[float, float], float | None],
    steps_s: Sequence[float],
) -> list[tuple[float, float | None]]:
    """The mean of `value(from, to)` over several moments, for each step after them.

    Args:
        moments: at which the same happened. value: in a span of time; None is nothing seen.
        steps_s: edges, since the moment.
    """
    moments = list(moments)
    curve = []
    for begin_s, end_s in pairwise(steps_s):
        seen = [v for m in moments if (v := value(m + begin_s, m + end_s)) is not None]
        curve.append((end_s, fmean(seen) if seen else None))
    return curve


def _percent(share: Share) -> str:
    if share.share is None or share.low is None:
        return "-"
    return f"{share.share:.1%} ≥{share.low:.1%}"
