"""The weight streamer over CUDA's virtual clock: right bytes, no hazards, the law's times."""

from dataclasses import dataclass, field

import pytest
import torch
from fake_cuda import FakeCuda, Reading
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from select_n_core.decisions.law import iteration_s
from select_n_core.decisions.order import streamed_units
from select_n_core.errors import LinkError, StreamingError
from select_n_core.links.base import Direction
from select_n_core.links.cuda import CudaLink
from select_n_core.offload.streamer import WEIGHTS, WeightStreamer
from select_n_core.units import FlatUnit, named_tensors

torch.set_num_threads(1)

SENT = (Direction.TO_DEVICE, WEIGHTS)
property_test = settings(max_examples=60, deadline=None)


class LayerError(Exception):
    """A layer that fails in the middle of a forward."""


class Layer(nn.Module):
    """Queues compute that reads its weight, and keeps what that compute saw."""

    def __init__(self, numbers: int, compute_s: float, fake: FakeCuda) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(numbers), requires_grad=False)
        self.truth = self.weight.clone()
        self.compute_s = compute_s
        self.fake = fake
        self.readings: list[Reading] = []
        self.fails = False

    def forward(self, hidden: Tensor) -> Tensor:
        self.readings.append(self.fake.compute(self.compute_s, read=self.weight))
        if self.fails:
            raise LayerError
        return hidden


@dataclass
class Bench:
    """A streamer over toy layers on the virtual clock.

    `homes` and `mirrors` name the units that have one; by default every unit has both.
    """

    sizes: list[int]
    slots: int
    compute_s: float = 1.0
    bytes_per_s: float = 1e3
    homes: frozenset[int] | None = None
    mirrors: frozenset[int] | None = None
    fake: FakeCuda = field(init=False)

    def __post_init__(self) -> None:
        self.fake = FakeCuda(self.bytes_per_s)
        self.link = CudaLink(torch.device("cuda"), self.fake)
        everything = frozenset(range(len(self.sizes)))
        self.layers = [Layer(size // 4, self.compute_s, self.fake) for size in self.sizes]
        self.units = [
            FlatUnit(f"layer{i}", named_tensors(layer)) for i, layer in enumerate(self.layers)
        ]
        homes: dict[int, Tensor] = {}
        for i in sorted(everything if self.homes is None else self.homes):
            homes[i] = self.fake.device_memory(self.units[i].nbytes)
            self.units[i].fill(homes[i])
        mirrors: dict[int, Tensor] = {}
        for i in sorted(everything if self.mirrors is None else self.mirrors):
            mirrors[i] = torch.empty(self.units[i].nbytes, dtype=torch.uint8)
            self.units[i].fill(mirrors[i])
            self.link.register(mirrors[i])
        largest = max(unit.nbytes for unit in self.units)
        self.streamer = WeightStreamer(
            list(zip(self.units, self.layers, self.layers, strict=True)),
            homes,
            mirrors,
            [self.fake.device_memory(largest) for _ in range(self.slots)],
            self.link,
        )

    def forward(self) -> None:
        hidden = torch.zeros(1)
        for layer in self.layers:
            hidden = layer(hidden)

    def iterate(self, streamed: tuple[int, ...], outside_s: float = 0.0) -> float:
        """One forward and its end on the compute stream; the host reads tokens and goes on."""
        with self.streamer.iteration(streamed):
            self.forward()
        self.fake.compute(outside_s, read=torch.zeros(1))
        self.fake.synchronize(self.fake.compute_stream())
        return self.fake.now_s

    def check(self, forwards: int) -> None:
        """Every layer computed that many times, each time with exactly its own bytes."""
        for layer in self.layers:
            assert len(layer.readings) == forwards
            for reading in layer.readings:
                assert torch.equal(reading.seen, layer.truth)


def sizes(units: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from([256, 300, 1024, 4096]), min_size=units, max_size=units)


@st.composite
def streamings(draw: st.DrawFn) -> tuple[list[int], int, int]:
    units = draw(st.integers(1, 12))
    return draw(sizes(units)), draw(st.integers(1, units)), draw(st.integers(1, 4))


times = st.floats(0.01, 10.0)


@given(streamings(), times, st.lists(times, min_size=2, max_size=5))
@property_test
def test_every_unit_computes_with_its_own_bytes_whatever_the_shape(shape, compute_s, gaps_s):
    unit_sizes, k, slots = shape
    streamed = streamed_units(len(unit_sizes), k)
    homes = frozenset(range(len(unit_sizes))) - set(streamed)
    bench = Bench(unit_sizes, slots, compute_s, homes=homes, mirrors=frozenset(streamed))
    for gap_s in gaps_s:
        bench.iterate(streamed, outside_s=gap_s)
    bench.check(len(gaps_s))
    # k units an iteration, and the ring is filled ahead of the next one.
    assert bench.streamer.streamed_units == k * len(gaps_s)
    assert bench.link.counters.copies[SENT] == k * len(gaps_s) + min(slots, k)


@given(
    st.integers(1, 12).flatmap(lambda units: st.tuples(st.just(units), st.integers(1, units))),
    st.integers(1, 4),
    times,
    times,
    times,
)
@property_test
def test_iterations_take_exactly_the_time_that_the_law_predicts(shape, slots, c, g, t):
    units, k = shape
    bench = Bench([1024] * units, slots, compute_s=c, bytes_per_s=1024 / t)
    ends_s = [bench.iterate(streamed_units(units, k), outside_s=g) for _ in range(40)]
    predicted_s = iteration_s(units, k, slots, c, g, t)
    assert (ends_s[-1] - ends_s[-3]) / 2 == pytest.approx(predicted_s, rel=1e-6)


@given(streamings(), times, st.data())
@property_test
def test_a_forward_that_raises_restarts_cold_and_the_next_one_is_right(shape, compute_s, data):
    unit_sizes, k, slots = shape
    streamed = streamed_units(len(unit_sizes), k)
    homes = frozenset(range(len(unit_sizes))) - set(streamed)
    bench = Bench(unit_sizes, slots, compute_s, homes=homes, mirrors=frozenset(streamed))
    bench.iterate(streamed)
    failing = data.draw(st.sampled_from(bench.layers))
    failing.fails = True
    with pytest.raises(LayerError):
        bench.iterate(streamed)
    failing.fails = False
    for unit in streamed:
        assert bench.layers[unit].weight.numel() == 0
    for layer in bench.layers:
        layer.readings.clear()
    before = bench.link.counters.copies[SENT]
    bench.iterate(streamed)
    bench.iterate(streamed)
    bench.check(2)
    assert bench.link.counters.copies[SENT] - before == 2 * k + min(slots, k)


@given(st.integers(1, 8), st.integers(1, 4), times, st.data())
@property_test
def test_another_set_of_units_may_be_streamed_in_every_iteration(units, slots, compute_s, data):
    bench = Bench(data.draw(sizes(units)), slots, compute_s)
    plans = data.draw(st.lists(st.sets(st.integers(0, units - 1)), min_size=2, max_size=5))
    for plan in plans:
        streamed = tuple(sorted(plan))
        bench.iterate(streamed)
        for unit in range(units):
            size = 0 if unit in plan else bench.layers[unit].truth.numel()
            assert bench.layers[unit].weight.numel() == size
    bench.check(len(plans))


def test_without_a_plan_a_model_at_home_runs_plain():
    bench = Bench([1024] * 3, slots=2)
    bench.forward()
    bench.iterate(())
    bench.check(2)
    assert not bench.link.counters.copies


def test_a_streamed_unit_is_there_while_it_computes_and_gone_afterwards():
    bench = Bench([1024] * 4, slots=2, homes=frozenset({0, 2}), mirrors=frozenset({1, 3}))
    present: list[list[int]] = []
    for layer in bench.layers:
        layer.register_forward_hook(
            lambda *_: present.append([i for i, x in enumerate(bench.layers) if x.weight.numel()]),
            prepend=True,
        )
    bench.iterate((1, 3))
    assert present == [[0, 2], [0, 1, 2], [0, 2], [0, 2, 3]]
    assert [layer.weight.numel() for layer in bench.layers] == [256, 0, 256, 0]


def test_a_copy_into_a_slot_waits_for_the_compute_that_reads_it():
    bench = Bench([1000], slots=1, compute_s=5.0, bytes_per_s=1024)
    for _ in range(3):
        bench.iterate((0,))
    starts = [reading.start_s for reading in bench.layers[0].readings]
    assert starts == pytest.approx([1.0, 7.0, 13.0])  # copy 1 s, compute 5 s, never together


def test_a_failed_copy_ends_the_forward_and_the_next_iteration_is_right():
    bench = Bench([1024] * 3, slots=2)
    bench.iterate((1, 2))
    bench.fake.failures.append(RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(LinkError, match="unspecified launch failure"):
        bench.iterate((1, 2))
    for layer in bench.layers:
        layer.readings.clear()
    bench.iterate((1, 2))
    bench.check(1)


@pytest.mark.parametrize(
    ("streamed", "reason"),
    [
        ((0, 1, 2), r"units \[0\] have no mirror"),
        ((2,), r"units \[1\] have no home"),
        ((), r"units \[1\] have no home"),
    ],
)
def test_a_plan_that_the_memory_does_not_carry_is_refused(streamed, reason):
    bench = Bench([1024] * 3, 2, homes=frozenset({0, 2}), mirrors=frozenset({1, 2}))
    bench.iterate((1,))
    with pytest.raises(StreamingError, match=reason):
        bench.iterate(streamed)
    bench.iterate((1, 2))
    bench.check(2)


def test_nothing_is_streamed_without_a_ring():
    bench = Bench([1024] * 3, slots=0)
    with pytest.raises(StreamingError, match="no staging ring"):
        bench.iterate((1,))


def test_a_closed_streamer_leaves_the_modules_alone():
    bench = Bench([1024] * 2, slots=1, homes=frozenset({0}), mirrors=frozenset({1}))
    bench.iterate((1,))
    bench.streamer.close()
    bench.units[1].restore()
    bench.forward()
    bench.fake.synchronize(bench.fake.compute_stream())
    bench.check(2)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in bench.layers)


def test_the_span_has_one_stamp_for_every_unit():
    bench = Bench([1024] * 4, slots=2)
    bench.iterate((1, 3))
    assert len(bench.streamer.span.waits_s()) == len(bench.streamer.span.computes_s()) == 4
    assert min(bench.streamer.span.waits_s() + bench.streamer.span.computes_s()) >= 0


def test_what_lies_in_slots_and_homes_changes_places_before_weights_come():
    """While the ring is handed over, compute reads slots and homes: no copy overwrites them."""
    bench = Bench([1024] * 6, slots=2)
    slots, homes = bench.streamer._slots, bench.streamer._homes
    everyone, taken = (0, 2, 4), []

    def move(*held: Tensor) -> None:
        taken.extend(bench.fake.compute(50.0, read=each) for each in held)

    bench.streamer.restart(everyone, lambda: move(*slots))
    assert not bench.streamer.at_home & set(everyone)
    bench.iterate(everyone)
    bench.iterate(everyone)
    bench.streamer.restart((), lambda: move(*(homes[unit] for unit in everyone)))
    bench.iterate(())
    assert bench.streamer.at_home == frozenset(range(6))
    bench.iterate(())
    bench.check(4)
    assert len(taken) == 5
    # Two iterations, two units that were ahead and are lost, and three that come home.
    assert bench.link.counters.copies[SENT] == 2 * 3 + 2 + 3


def test_the_ring_is_not_handed_over_within_an_iteration():
    bench = Bench([1024] * 3, slots=2)
    with bench.streamer.iteration((0,)), pytest.raises(StreamingError, match="is running"):
        bench.streamer.restart(())
