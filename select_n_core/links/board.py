"""The board of a bus: what its members want, claim and see, in one mapped file; no extra process.

Every word is written by one member alone, in its own place. A member lives as long as its place's
lock is held and its counter turns; a thread of its own turns it and looks after the others, so
that a tick is nothing but memory.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from select_n_core.decisions.bus import SHARED, Claim, Grant, Shown, Vitals
from select_n_core.decisions.bus_capacity import Sightings, combined
from select_n_core.errors import LinkError
from select_n_core.links.mapped import HEADER, MappedWords

PLACES = 32
BEAT_S = 0.2  # between two turns of a member's counter
PATIENCE_S = 0.8  # a counter that stands still for longer is a dead member's
_LAPSE_S = 0.6  # a member that finds itself this late has to assume that it was given up
_RESTING_S = 0.5  # without a copy that ended, a member copies no more

_CAPACITY = HEADER
_BEATS = HEADER + 2
_DEMANDS = _BEATS + PLACES
_CLAIMS = _DEMANDS + PLACES
_COPYING = _CLAIMS + PLACES  # share of the time
_FOUND = _COPYING + PLACES  # capacity, in bytes/s; 0 is unknown
_WORDS = _FOUND + PLACES

_log = logging.getLogger(__name__)


class Member:
    """A replica's seat on a bus.

    Args:
        name: of the bus; members of the same user, machine and name share it.
        capacity_bytes_per_s: of the whole bus as far as this member knows. Counts where it is the
            first; later the members' own sightings do.
        lifetime_s: of what its share was promised to; see `Claim`.
        directory: of the board; None is this user's runtime directory.
        clock: seconds.

    Raises:
        LinkError: the capacity is no bandwidth, or the board cannot be used; see `MappedWords`.
    """

    _board: MappedWords
    _beat_s: float

    def __init__(
        self,
        name: str,
        capacity_bytes_per_s: float,
        *,
        lifetime_s: float = 0.0,
        directory: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < capacity_bytes_per_s < math.inf:
            raise LinkError(
                f"bus {name!r} needs a measured bandwidth above 0, got {capacity_bytes_per_s}"
            )
        self.name = name
        self._known_bytes_per_s = capacity_bytes_per_s
        self._lifetime_s = lifetime_s
        self._directory = directory
        self._clock = clock
        self._lock = threading.Lock()
        self._fence = threading.Lock()
        self._warned: set[str] = set()
        self._demand = 0.0
        self._grant = Grant(0.0, capacity_bytes_per_s, capacity_bytes_per_s)
        self._enter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name=f"select-n-bus-{name}", daemon=True)
        self._thread.start()

    @property
    def grant(self) -> Grant:
        """What this member may count on, as of its last tick."""
        return self._grant

    @property
    def capacity_bytes_per_s(self) -> float:
        """Of the whole bus, as its members found it."""
        return self._board.numbers[_CAPACITY]

    @property
    def members(self) -> int:
        """Living members, this one among them."""
        return 1 + len(self._others())

    def tick(
        self,
        demand_bytes_per_s: float,
        *,
        seen_bytes_per_s: float | None = None,
        copying_share: float | None = None,
    ) -> float:
        """Say what is wanted and what copies saw; returns the share granted until the next tick.

        Call it before every iteration, and with a demand of 0 when there will be none.

        Args:
            demand_bytes_per_s: wanted on average, from a model that has the link to itself; see
                `decisions.grant.link_use`. Infinite is all there is. What cannot be a demand is
                taken as the last one.
            seen_bytes_per_s: of the copies that ended since the last tick, their bytes over the
                seconds that they took; None where none ended. What cannot be a bandwidth is left
                out.
            copying_share: of the time since the last tick in which a copy was under way; None
                takes it from the claim and what was seen.
        """
        with self._lock:
            now_s = self._clock()
            if now_s - self._beat_s > _LAPSE_S:
                self._lapsed = True
            if self._lapsed:
                self._claim = Claim(self._lifetime_s)  # the others may have shared it out
                self._lapsed = False
            if demand_bytes_per_s >= 0:
                self._demand = demand_bytes_per_s
            else:
                self._warn_once("a demand of %s is left out", demand_bytes_per_s)
            self._see(seen_bytes_per_s, copying_share, now_s)
            self._grant = self._claim.tick(self, self._demand, self._capacity(now_s), now_s)
            return self._grant.bytes_per_s

    def heartbeat(self) -> None:
        """Tell the others that this member lives; its own thread does, a few times a second."""
        now_s = self._clock()
        if now_s - self._beat_s > _LAPSE_S:
            self._lapsed = True
        self._board.counters[_BEATS + self._board.place] += 1
        self._beat_s = now_s

    def leave(self) -> None:
        """Give the share and the place back. Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            if self._board.fd < 0:
                return
            self.show(0.0, 0.0)
            self._board.counters[_BEATS + self._board.place] = 0
            self._board.close()

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def show(self, demand: float, claim: float) -> None:
        """See `Words.show`."""
        numbers, place = self._board.numbers, self._board.place
        numbers[_DEMANDS + place] = demand
        numbers[_CLAIMS + place] = claim
        with self._fence:  # a processor may read ahead of its own writes, but not across a lock
            pass

    def others(self) -> list[Shown]:
        """See `Words.others`."""
        numbers, shown = self._board.numbers, []
        for place in self._others():
            other = Shown(numbers[_DEMANDS + place], numbers[_CLAIMS + place])
            if other.demand >= 0 and other.claim >= 0:
                shown.append(other)
            else:
                self._warn_once("a member that shows %s is left out", other)
        return shown

    def _enter(self) -> None:
        """Take a place on the board, as a member that has nothing yet."""

        def begin(numbers: memoryview[float]) -> None:
            numbers[_CAPACITY] = self._known_bytes_per_s

        self._board = MappedWords(
            self.name, "board1", _WORDS, PLACES, begin, directory=self._directory
        )
        self._claim = Claim(self._lifetime_s)
        self._vitals = Vitals(PATIENCE_S)
        self._sightings = Sightings()
        self._seen_bytes_per_s, self._seen_s = 0.0, -math.inf
        self._lapsed = False
        self._look()
        numbers, place = self._board.numbers, self._board.place
        for column in (_DEMANDS, _CLAIMS, _COPYING, _FOUND):
            numbers[column + place] = 0.0
        # Last: with it the place lives. No holder before began at the same number, so that a
        # verdict on one of them is not taken for one on this member.
        self._board.counters[_BEATS + place] = time.monotonic_ns()
        self._beat_s = self._clock()

    def _live(self) -> None:
        while not self._stop.wait(BEAT_S):
            with self._lock:
                self.heartbeat()
                self._look()
                if not self._board.linked:
                    self._move()

    def _look(self) -> None:
        """Judge who lives."""
        beats = self._beats()
        held = [bool(beat) and self._board.held(place) for place, beat in enumerate(beats)]
        self._vitals.look(beats, held, self._clock())

    def _move(self) -> None:
        """The file was removed under its members: all meet again on the one that is made next."""
        left = self._board
        self._known_bytes_per_s = self.capacity_bytes_per_s
        try:
            self._enter()
        except LinkError as error:
            self._warn_once("the board was removed and cannot be made anew: %s", error)
            return
        left.close()
        _log.warning("board %s was removed; its members meet on a new one", self._board.path)

    def _beats(self) -> list[int]:
        return self._board.counters[_BEATS : _BEATS + PLACES].tolist()

    def _others(self) -> list[int]:
        own = self._board.place
        return [place for place in self._vitals.living(self._beats()) if place != own]

    def _see(self, seen: float | None, copying: float | None, now_s: float) -> None:
        """Take in what copies saw, and show how much of the time this member copies."""
        numbers, place = self._board.numbers, self._board.place
        if seen is not None:
            beside = [numbers[_COPYING + other] for other in self._others()]
            if self._sightings.add(seen, beside, now_s):
                self._seen_bytes_per_s, self._seen_s = seen, now_s
            else:
                self._warn_once("copies that saw %s bytes/s are left out", seen)
        if copying is None:
            resting = now_s - self._seen_s > _RESTING_S
            # Members that use all that is shared out leave the bus no rest: the reserve is used.
            in_use = self._claim.in_use / SHARED
            copying = 0.0 if resting else in_use / self._seen_bytes_per_s
        if not copying >= 0:
            self._warn_once("a copying share of %s is left out", copying)
            copying = 0.0
        numbers[_COPYING + place] = min(1.0, copying)
        numbers[_FOUND + place] = self._sightings.capacity(now_s) or 0.0

    def _capacity(self, now_s: float) -> float:
        """The bus's capacity, from what all living members found; what it was where none did."""
        numbers = self._board.numbers
        places = [self._board.place, *self._others()]
        found = [capacity for place in places if (capacity := numbers[_FOUND + place]) > 0]
        capacity = combined(found, numbers[_CAPACITY])
        numbers[_CAPACITY] = capacity  # for who joins; all members write the same
        return capacity

    def _warn_once(self, what: str, value: object) -> None:
        if what not in self._warned:
            self._warned.add(what)
            _log.warning(f"bus %s: {what}", self.name, value)
