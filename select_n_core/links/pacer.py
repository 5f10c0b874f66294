"""The pacer: a bus that several processes share, in one mapped file. On a CPU, it *is* the bus.

It serves all copies that are under way at once and evenly, as a root of PCIe lanes serves its
devices: each moves at its fair share of the bandwidth, never above its own link's. Who has how
much left is kept in the file and brought up to date by whoever looks, on one absolute timeline, so
that a worker sleeps until its copy will have ended and looks again only if others came meanwhile.
A process that dies owes nothing: its copy runs out like any other.
"""

from __future__ import annotations

import fcntl
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from select_n_core.decisions.bus import fair_shares
from select_n_core.errors import LinkError
from select_n_core.links.mapped import HEADER, MappedWords

PLACES = 64
DIRECTIONS = ("h2d", "d2h")  # words of `links.base.Direction`, which would bring torch along
_LONGEST_SLEEP_S = 0.25  # a bus that becomes faster is noticed after at most so long

_CONFIGURED, _BANDWIDTH = HEADER, HEADER + 1  # bytes/s: of the bus as it was made, and now
_LANES = HEADER + 2
_LEFT, _MOST, _ENDED = 1, 1 + PLACES, 1 + 2 * PLACES  # in a lane, after its time: by place
_LANE_WORDS = 1 + 3 * PLACES
_WORDS = _LANES + _LANE_WORDS * len(DIRECTIONS)


class Pacer:
    """A holder of a bus; a link's, or one that only sets its bandwidth.

    Args:
        name: of the bus; holders of the same user, machine and name share it.
        bytes_per_s: of the whole bus, each direction.
        directory: of the mapped file; None is this user's runtime directory.
        clock: seconds, on a scale that all processes have in common. sleep: for so many seconds.

    Raises:
        LinkError: the bandwidth is none, others hold the bus with another one, or the file cannot
            be used; see `MappedWords`.
    """

    def __init__(
        self,
        name: str,
        bytes_per_s: float,
        *,
        directory: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        _check_bandwidth(name, bytes_per_s)

        def begin(numbers: memoryview[float]) -> None:
            numbers[_CONFIGURED] = numbers[_BANDWIDTH] = bytes_per_s

        self.name = name
        self._words = MappedWords(name, "pacer1", _WORDS, PLACES, begin, directory=directory)
        self._numbers = self._words.numbers
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        configured = self._numbers[_CONFIGURED]
        if configured != bytes_per_s:
            self._words.close()
            raise LinkError(
                f"bus {name!r} has {configured:g} bytes/s in other processes and {bytes_per_s:g} "
                "here; give all its replicas the same bandwidth, or this one another bus"
            )
        with self._locked():
            for direction in DIRECTIONS:
                self._numbers[_lane(direction) + _LEFT + self._words.place] = 0.0

    @property
    def bytes_per_s(self) -> float:
        """The bus's bandwidth now."""
        return self._numbers[_BANDWIDTH]

    def set_bandwidth(self, bytes_per_s: float) -> None:
        """Let the bus carry `bytes_per_s` from now on, for all that share it.

        Raises:
            LinkError: that is no bandwidth.
        """
        _check_bandwidth(self.name, bytes_per_s)
        with self._locked():
            for direction in DIRECTIONS:
                self._advance(direction, self._clock())
            self._numbers[_BANDWIDTH] = bytes_per_s

    def start(
        self,
        direction: str,
        nbytes: int,
        ready_s: float,
        most_bytes_per_s: float = math.inf,
    ) -> None:
        """Begin this holder's next copy in this direction, when its last one has ended.

        Args:
            ready_s: when it could begin. Where that has passed and nobody used the bus since, it
                began then: who is woken late loses no time.
            most_bytes_per_s: of the holder's own link.
        """
        lane, place = _lane(direction), self._words.place
        with self._locked():
            now_s = self._clock()
            self._advance(direction, now_s)
            if not any(self._numbers[lane + _LEFT : lane + _LEFT + PLACES]):
                self._numbers[lane] = min(now_s, max(ready_s, self._numbers[lane]))
            self._numbers[lane + _MOST + place] = most_bytes_per_s
            self._numbers[lane + _LEFT + place] = float(nbytes)
            self._numbers[lane + _ENDED + place] = self._numbers[lane]  # of a copy of no bytes

    def wait(self, direction: str) -> float:
        """Block until the copy that was started last has ended; returns when it did."""
        lane, place = _lane(direction), self._words.place
        while True:
            with self._locked():
                now_s = self._clock()
                self._advance(direction, now_s)
                if not self._numbers[lane + _LEFT + place]:
                    return self._numbers[lane + _ENDED + place]
                at_s = self._numbers[lane]
                # The end if nobody else comes, so that it cannot be slept through.
                ends_s = flow(self._under_way(direction), self.bytes_per_s, at_s, math.inf)[1]
            self._sleep(min(ends_s[place] - now_s, _LONGEST_SLEEP_S))

    def close(self) -> None:
        """Give the place on the bus back. Idempotent."""
        self._words.close()

    def _advance(self, direction: str, now_s: float) -> None:
        """Bring a lane up to date."""
        lane, numbers = _lane(direction), self._numbers
        under_way = self._under_way(direction)
        at_s = min(now_s, numbers[lane])  # later only if it was written by another clock
        numbers[lane], ends_s = flow(under_way, self.bytes_per_s, at_s, now_s)
        for place, (left, _) in under_way.items():
            numbers[lane + _LEFT + place] = left
        for place, end_s in ends_s.items():
            numbers[lane + _ENDED + place] = end_s
            numbers[lane + _LEFT + place] = 0.0

    def _under_way(self, direction: str) -> dict[int, tuple[float, float]]:
        """Copies by place: bytes left and the most that their links carry."""
        lane, numbers = _lane(direction), self._numbers
        lefts = numbers[lane + _LEFT : lane + _LEFT + PLACES].tolist()
        return {
            place: (left, numbers[lane + _MOST + place])
            for place, left in enumerate(lefts)
            if left > 0
        }

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among threads and processes, for some tens of microseconds."""
        with self._lock:
            fcntl.flock(self._words.fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._words.fd, fcntl.LOCK_UN)


def flow(
    under_way: dict[int, tuple[float, float]], bytes_per_s: float, at_s: float, until_s: float
) -> tuple[float, dict[int, float]]:
    """Let copies share a bus until `until_s`, or until none is left.

    Args:
        under_way: by place, bytes left and the most bytes/s of its link; brought up to date.

    Returns:
        The time that was reached, and when those that ended did.
    """
    ends_s: dict[int, float] = {}
    while under_way and at_s < until_s:
        mosts = [most for _, most in under_way.values()]
        rates = dict(zip(under_way, fair_shares(mosts, bytes_per_s), strict=True))
        needs_s = {place: left / rates[place] for place, (left, _) in under_way.items()}
        step_s = min(needs_s.values())
        if at_s + step_s > until_s:
            step_s = until_s - at_s
            at_s = until_s
        else:
            at_s += step_s
        for place, need_s in needs_s.items():
            left, most = under_way.pop(place)
            left -= rates[place] * step_s
            if need_s <= step_s or left <= 0:
                ends_s[place] = at_s
            else:
                under_way[place] = (left, most)
    return at_s, ends_s


def _lane(direction: str) -> int:
    return _LANES + _LANE_WORDS * DIRECTIONS.index(direction)


def _check_bandwidth(name: str, bytes_per_s: float) -> None:
    if not 0 < bytes_per_s < math.inf:
        raise LinkError(f"bus {name!r} needs a bandwidth above 0, got {bytes_per_s} bytes/s")
