"""A clock that only sleepers move, and a link on it: a paced engine without real time."""

from dataclasses import dataclass, field

from torch import Tensor

from select_n_core.links.base import Direction, LinkCounters, check_shapes
from select_n_core.links.paced import Timeline


class VirtualClock:
    """Seconds; `sleep` moves it, and `late_s` too far."""

    def __init__(self, now_s: float = 1000.0, late_s: float = 0.0) -> None:
        self.now_s = now_s
        self.late_s = late_s

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds + self.late_s


@dataclass(frozen=True)
class Moment:
    clock: VirtualClock
    at_s: float

    def done(self) -> bool:
        return self.clock() >= self.at_s


@dataclass(frozen=True)
class VirtualCopy(Moment):
    started_s: float

    def duration_s(self) -> float:
        return self.at_s - self.started_s


@dataclass
class VirtualLink:
    """One queue, `bytes_per_s`; bytes move when a copy is issued, as late as it counts."""

    clock: VirtualClock
    timeline: Timeline
    bytes_per_s: float
    kind: str = "virtual"
    counters: LinkCounters = field(default_factory=LinkCounters)
    free_s: float = 0.0

    def register(self, host: Tensor, *, read_only: bool = False) -> None:
        pass

    def unregister(self, host: Tensor) -> None:
        pass

    def copy(self, target, source, *, kind, after=(), direction=Direction.TO_DEVICE):
        check_shapes(target, source)
        ready_s = max([self.timeline.now_s(), *(event.at_s for event in after)])
        started_s = max(ready_s, self.free_s)
        self.free_s = started_s + source.numel() / self.bytes_per_s
        target[:64].copy_(source[:64])
        self.counters.bytes[direction, kind] += source.numel()
        self.counters.copies[direction, kind] += 1
        return VirtualCopy(self.clock, self.free_s, started_s)

    def move(self, target: Tensor, source: Tensor) -> None:
        target[:64].copy_(source[:64])

    def compute_event(self) -> Moment:
        return Moment(self.clock, self.timeline.now_s())

    def wait(self, copy: VirtualCopy) -> None:
        if self.timeline.running:
            self.counters.stall_s += self.timeline.reach(copy.at_s)
        else:
            self.timeline.sleep_until(copy.at_s)

    def drain(self) -> None:
        self.timeline.sleep_until(self.free_s)

    def close(self) -> None:
        pass
