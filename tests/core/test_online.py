"""The latency model while serving, alone on a link and on a bus."""

import math
from dataclasses import dataclass, field

import pytest

from select_n_core.decisions.bus import Grant
from select_n_core.decisions.correction import Seen
from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.engine.online import OnlineModel

MS = 1e-3
UNIT_BYTES = 7_000_000
LINK = 1e9
TPOT = 100 * MS
RECORDED = LatencyModel(
    units=30,
    transfer_s=UNIT_BYTES / LINK,
    streaming=ComputeModel(((1, 1 * MS), (64, 1.2 * MS)), 2e-8, 1e-9, 5 * MS, 1e-5),
)
DECODING = StepShape(decode_rows=8, context_tokens=1200)
ALONE = Grant(0.95 * LINK, 0.95 * LINK, LINK)
HALF = Grant(0.475 * LINK, 0.475 * LINK, LINK / 2)


@dataclass
class BusOfOne:
    """Grants what it is told to and remembers what it heard."""

    grant: Grant = ALONE
    members: int = 2
    heard: list[tuple[float, float | None, float | None]] = field(default_factory=list)
    left: bool = False

    def tick(self, demand_bytes_per_s, *, seen_bytes_per_s=None, copying_share=None):
        self.heard.append((demand_bytes_per_s, seen_bytes_per_s, copying_share))
        return self.grant.bytes_per_s

    def leave(self):
        self.left = True


def online(bus=None, **changes) -> OnlineModel:
    return OnlineModel(RECORDED, 2, UNIT_BYTES, bus, tpot_s=TPOT, **changes)


def slow_link(k=12) -> Seen:
    return Seen(DECODING, k, 168 * MS, 120 * MS, transfer_s=14 * MS, copied_s=168 * MS)


def test_alone_on_its_link_a_replica_learns_how_fast_it_is():
    model = online()
    for _ in range(8):
        model.saw(slow_link())
    assert model.latency.transfer_s == pytest.approx(14 * MS, rel=0.05)
    assert model.reserve > 0


def test_a_policy_that_learns_nothing_keeps_to_the_record():
    model = online(corrected=False)
    for _ in range(8):
        model.saw(slow_link())
    assert model.latency is RECORDED


def test_on_a_bus_what_copies_saw_is_told_to_all_and_the_grant_is_planned_with():
    bus = BusOfOne()
    model = online(bus)
    model.saw(slow_link())
    model.tick(12)
    ((_, seen_bytes_per_s, copying_share),) = bus.heard
    assert seen_bytes_per_s == pytest.approx(LINK / 2)
    assert copying_share == 1.0
    assert model.correction.transfer == 1.0
    before_s = model.latency.iteration_s(DECODING, 12, 2)
    bus.grant = HALF
    model.tick(12)
    assert model.latency.iteration_s(DECODING, 12, 2) > 1.6 * before_s


def test_alone_on_a_bus_it_learns_as_on_a_link_of_its_own():
    bus = BusOfOne(members=1)
    model = online(bus)
    for _ in range(8):
        model.tick(12)
        model.saw(slow_link())
    assert model.latency.transfer_s == pytest.approx(14 * MS, rel=0.05)
    bus.members = 2  # from here on, the bus's own estimate counts
    model.tick(12)
    assert model.correction.transfer == 1.0


def test_what_is_wanted_does_not_shrink_with_what_is_granted():
    bus = BusOfOne(HALF)
    model = online(bus)
    model.tick(12)
    model.tick(12)
    assert bus.heard[0][0] == bus.heard[1][0]


def test_what_is_wanted_is_what_keeps_the_promise_and_no_more():
    """However fast steps are, twelve units need not come more often than a token is due."""
    bus = BusOfOne()
    online(bus).tick(12)
    needed = 12 * UNIT_BYTES / TPOT
    assert needed < bus.heard[0][0] < 1.2 * needed


def test_who_has_moved_its_share_rests_while_others_share_the_bus():
    bus = BusOfOne(HALF)
    model = online(bus)
    model.tick(12)
    for begun_s in (0.0, 0.01, 0.02):
        model.begins(12, begun_s)
    moved_s = 12 * UNIT_BYTES / HALF.usable_bytes_per_s
    assert model.rest_s(0.03) == pytest.approx(2 * moved_s, rel=0.2)
    bus.members = 1
    model.tick(12)
    assert model.rest_s(0.03) == 0


def test_nothing_to_compute_wants_nothing():
    bus = BusOfOne()
    model = online(bus)
    model.tick(0)
    assert bus.heard == [(0.0, None, None)]


@pytest.mark.parametrize("seconds", [0.0, math.nan, -1.0])
def test_an_iteration_without_a_time_is_told_to_nobody(seconds):
    bus = BusOfOne()
    model = online(bus)
    model.saw(Seen(DECODING, 12, seconds, 0.0, transfer_s=14 * MS, copied_s=1.0))
    model.tick(12)
    assert bus.heard[0][1:] == (None, None)


def test_it_leaves_the_bus_when_it_closes():
    bus = BusOfOne()
    online(bus).close()
    assert bus.left
    online().close()
