"""One contract for every link: emulated, CUDA on a virtual clock, and CUDA where there is a GPU."""

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda, HazardError
from torch import Tensor

from select_n_core.config import LinkConfig
from select_n_core.errors import LinkError
from select_n_core.links.base import Copy, Direction, Event, Link
from select_n_core.links.cuda import CudaLink, CudaRuntime
from select_n_core.links.emulated import EmulatedEvent, EmulatedLink
from select_n_core.links.open import open_link
from select_n_core.links.pacer import Pacer
from select_n_core.memory.host import HostMap

torch.set_num_threads(1)

TO_DEVICE, TO_HOST = Direction.TO_DEVICE, Direction.TO_HOST
NBYTES = 64 << 10
HOLD_S = 0.2
DEADLINE_S = 20.0


@dataclass(frozen=True)
class Held:
    """An event that happens `HOLD_S` or more after `happen` (or by itself, on a GPU)."""

    event: Event
    happen: Callable[[], None]


@dataclass(frozen=True)
class Rig:
    """A link and what its kind needs around it."""

    link: Link
    device_bytes: Callable[[int], Tensor]
    hold: Callable[[], Held]
    pass_time: Callable[[float], None]
    real_gpu: bool = False

    def host_bytes(self, nbytes: int = NBYTES, value: int | None = None) -> Tensor:
        """Registered host memory, random unless a value is given."""
        host = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
        if value is not None:
            host.fill_(value)
        self.link.register(host)
        return host

    def until_done(self, copy: Copy) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not copy.done():
            assert time.monotonic() < end_s, "the copy never ended"
            self.pass_time(1e-3)


def emulated_rig(pacer: Pacer | None = None) -> Rig:
    link = EmulatedLink(bytes_per_s=2e9, pacer=pacer)

    def hold() -> Held:
        event = EmulatedEvent()
        later = threading.Timer(HOLD_S, lambda: event.set(time.perf_counter()))
        return Held(event, later.start)

    return Rig(link, lambda n: torch.zeros(n, dtype=torch.uint8), hold, lambda s: time.sleep(s))


def fake_rig(fake: FakeCuda) -> Rig:
    link = CudaLink(torch.device("cuda"), fake)

    def hold() -> Held:
        fake.compute(1e3 * HOLD_S, read=torch.zeros(1))
        return Held(link.compute_event(), lambda: fake.pass_time(1e3 * HOLD_S))

    return Rig(link, fake.device_memory, hold, fake.pass_time)


def cuda_rig() -> Rig:
    device = torch.device("cuda", 0)
    link = CudaLink(device)

    def hold() -> Held:
        torch.cuda._sleep(int(HOLD_S * 4e9))  # cycles; HOLD_S or more at any clock below 4 GHz
        return Held(link.compute_event(), lambda: None)

    return Rig(
        link,
        lambda n: torch.zeros(n, dtype=torch.uint8, device=device),
        hold,
        lambda s: time.sleep(s),
        real_gpu=True,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of mapped files."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture(params=["emulated", "bus", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def rig(request: pytest.FixtureRequest, directory: Path) -> Iterator[Rig]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "fake":
        rig = fake_rig(FakeCuda())
    elif request.param == "bus":
        rig = emulated_rig(Pacer("pcie0", 2e9, directory=directory))
    else:
        rig = {"emulated": emulated_rig, "cuda": cuda_rig}[request.param]()
    yield rig
    rig.link.close()


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda(bytes_per_s=1e6, latency_s=0.5)


def test_bytes_arrive_in_both_directions(rig):
    there, back = rig.host_bytes(), rig.host_bytes(value=0)
    device = rig.device_bytes(NBYTES)
    rig.until_done(rig.link.copy(device, there, kind="weights"))
    assert torch.equal(device.cpu(), there)
    rig.until_done(rig.link.copy(back, device, kind="kv", direction=TO_HOST))
    assert torch.equal(back, there)


def test_a_part_of_registered_memory_may_be_copied(rig):
    host, device = rig.host_bytes(), rig.device_bytes(NBYTES)
    rig.until_done(rig.link.copy(device[256:512], host[1024:1280], kind="weights"))
    assert torch.equal(device[256:512].cpu(), host[1024:1280])
    assert not device[:256].any()
    assert not device[512:].any()


def test_copies_of_one_direction_end_in_the_order_of_their_issue(rig):
    device = rig.device_bytes(NBYTES)
    copies = [
        rig.link.copy(device, rig.host_bytes(value=value), kind="weights") for value in range(8)
    ]
    rig.until_done(copies[-1])
    assert all(copy.done() for copy in copies)
    assert (device == 7).all()


def test_compute_that_waited_for_a_copy_sees_its_bytes(rig):
    host, device = rig.host_bytes(), rig.device_bytes(NBYTES)
    rig.link.wait(rig.link.copy(device, host, kind="weights"))
    event = rig.link.compute_event()
    rig.link.drain()
    assert event.done()
    assert torch.equal(device.cpu(), host)


def test_a_copy_waits_for_its_event_and_holds_up_its_own_direction_only(rig):
    target, other = rig.device_bytes(NBYTES), rig.device_bytes(NBYTES)
    source, back = rig.host_bytes(value=3), rig.host_bytes(value=9)
    held = rig.hold()
    waiting = rig.link.copy(target, source, kind="weights", after=(held.event,))
    behind = rig.link.copy(other, source, kind="weights")
    free = rig.link.copy(back, rig.device_bytes(NBYTES), kind="kv", direction=TO_HOST)
    rig.until_done(free)
    assert not held.event.done()
    assert not waiting.done()
    assert not behind.done()
    assert not back.any()
    held.happen()
    rig.until_done(behind)
    assert held.event.done()
    assert waiting.done()
    assert (target == 3).all()


def test_a_duration_leaves_out_the_wait_before_the_copy(rig):
    host, device = rig.host_bytes(), rig.device_bytes(NBYTES)
    rig.until_done(rig.link.copy(device, host, kind="weights"))  # the first one warms up
    held = rig.hold()
    waiting = rig.link.copy(device, host, kind="weights", after=(held.event,))
    behind = rig.link.copy(device, host, kind="weights")
    held.happen()
    rig.until_done(behind)
    assert 0 < waiting.duration_s() < HOLD_S / 2
    assert 0 < behind.duration_s() < HOLD_S / 2


def test_counters_tell_directions_and_kinds_apart(rig):
    host, device = rig.host_bytes(), rig.device_bytes(NBYTES)
    rig.link.copy(device, host, kind="weights")
    rig.link.copy(device[:256], host[:256], kind="weights")
    rig.link.copy(device[:512], host[:512], kind="kv")
    rig.link.drain()
    rig.link.copy(host[:1024], device[:1024], kind="kv", direction=TO_HOST)
    assert rig.link.counters.bytes == {
        (TO_DEVICE, "weights"): NBYTES + 256,
        (TO_DEVICE, "kv"): 512,
        (TO_HOST, "kv"): 1024,
    }
    assert rig.link.counters.copies == {
        (TO_DEVICE, "weights"): 2,
        (TO_DEVICE, "kv"): 1,
        (TO_HOST, "kv"): 1,
    }


def test_after_a_drain_every_copy_is_done(rig):
    host = rig.host_bytes()
    copies = [rig.link.copy(rig.device_bytes(NBYTES), host, kind="weights") for _ in range(5)]
    rig.link.drain()
    assert all(copy.done() for copy in copies)


def test_only_flat_bytes_of_equal_size_are_copied(rig):
    host, device = rig.host_bytes(), rig.device_bytes(NBYTES)
    wrong = [
        (device[:256], host[:512], "512 bytes into 256"),
        (device.view(torch.float32), host.view(torch.float32), "uint8"),
        (device.view(256, -1), host.view(256, -1), "flat"),
        (device[::2], host[::2], "contiguous"),
    ]
    for target, source, reason in wrong:
        with pytest.raises(LinkError, match=reason):
            rig.link.copy(target, source, kind="weights")
    assert not rig.link.counters.bytes


def test_the_host_side_of_a_copy_must_be_registered(rig):
    host, device = rig.host_bytes(), rig.device_bytes(NBYTES)
    stranger = torch.zeros(NBYTES, dtype=torch.uint8)
    with pytest.raises(LinkError, match="register it first"):
        rig.link.copy(device, stranger, kind="weights")
    with pytest.raises(LinkError, match="register it first"):
        rig.link.copy(stranger, device, kind="kv", direction=TO_HOST)
    rig.link.unregister(host)
    with pytest.raises(LinkError, match="register it first"):
        rig.link.copy(device, host, kind="weights")


def test_a_source_that_runs_past_its_registration_is_refused(rig):
    whole = torch.zeros(2 * NBYTES, dtype=torch.uint8)
    rig.link.register(whole[:NBYTES])
    with pytest.raises(LinkError, match="register it first"):
        rig.link.copy(rig.device_bytes(512), whole[NBYTES - 256 : NBYTES + 256], kind="weights")


def test_memory_is_registered_once_and_unregistered_once(rig):
    host = rig.host_bytes()
    with pytest.raises(LinkError, match="already registered"):
        rig.link.register(host)
    rig.link.unregister(host)
    with pytest.raises(LinkError, match="not registered"):
        rig.link.unregister(host)
    rig.link.register(host)
    rig.link.copy(rig.device_bytes(NBYTES), host, kind="weights")


def test_read_only_memory_is_copied_from_and_never_into(rig):
    host, device = torch.ones(NBYTES, dtype=torch.uint8), rig.device_bytes(NBYTES)
    if rig.real_gpu:
        pytest.skip("a real GPU wants a mapping without the right to write; see the shared maps")
    rig.link.register(host, read_only=True)
    rig.until_done(rig.link.copy(device, host, kind="weights"))
    assert (device == 1).all()
    with pytest.raises(LinkError, match="read-only"):
        rig.link.copy(host, device, kind="kv", direction=TO_HOST)
    rig.link.unregister(host)
    rig.link.register(host)
    rig.until_done(rig.link.copy(host, device, kind="kv", direction=TO_HOST))


def test_a_closed_link_ended_its_copies_and_takes_no_more(rig):
    host, device = rig.host_bytes(), rig.device_bytes(NBYTES)
    copy = rig.link.copy(device, host, kind="weights")
    rig.link.close()
    rig.link.close()
    assert copy.done()
    assert torch.equal(device.cpu(), host)
    with pytest.raises(LinkError, match="closed"):
        rig.link.copy(device, host, kind="weights")


def test_copies_and_events_of_another_link_are_refused(rig):
    host, device = rig.host_bytes(), rig.device_bytes(NBYTES)
    other = emulated_rig() if rig.link.kind == "cuda" else fake_rig(FakeCuda())
    foreign = other.link.copy(other.device_bytes(NBYTES), other.host_bytes(), kind="weights")
    with pytest.raises(LinkError, match="another link"):
        rig.link.wait(foreign)
    with pytest.raises(LinkError, match="another link"):
        rig.link.copy(device, host, kind="weights", after=(other.link.compute_event(),))
    other.link.close()


# The emulated link alone.


def test_emulated_copies_take_their_bytes_and_latency_one_after_the_other():
    link = EmulatedLink(bytes_per_s=50e6, latency_s=1e-3)
    host, device = torch.ones(50_000, dtype=torch.uint8), torch.zeros(50_000, dtype=torch.uint8)
    link.register(host)
    copies = [link.copy(device, host, kind="weights") for _ in range(5)]
    link.drain()
    link.close()
    each_s = 1e-3 + 50_000 / 50e6
    assert [copy.duration_s() >= each_s * 0.999 for copy in copies] == [True] * 5
    for before, copy in pairwise(copies):
        assert copy.started_s == before.ended.at_s
    total_s = copies[-1].ended.at_s - copies[0].started_s
    assert 5 * each_s * 0.999 <= total_s < 5 * each_s + 1.0
    assert copies[0].started_s == copies[0].issued_s


def test_compute_that_waits_on_the_emulated_link_counts_as_a_stall():
    link = EmulatedLink(bytes_per_s=1e6)
    host, device = torch.ones(200_000, dtype=torch.uint8), torch.zeros(200_000, dtype=torch.uint8)
    link.register(host)
    copy = link.copy(device, host, kind="weights")
    link.wait(copy)
    stall_s = link.counters.stall_s
    assert 0.01 < stall_s < 2.0  # 0.2 s, less what had passed already
    link.wait(copy)
    assert link.counters.stall_s == stall_s
    link.close()


def test_a_failed_emulated_copy_is_told_to_whoever_waits_and_the_link_goes_on():
    link = EmulatedLink(bytes_per_s=1e9)
    host, device = torch.ones(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
    link.register(host)
    failing = link.copy(torch.empty(256, dtype=torch.uint8, device="meta"), host, kind="weights")
    with pytest.raises(LinkError, match="a copy over the emulated link failed"):
        link.wait(failing)
    with pytest.raises(LinkError, match="a copy over the emulated link failed"):
        failing.done()
    link.wait(link.copy(device, host, kind="weights"))
    assert torch.equal(device, host)
    link.close()


def test_emulated_links_on_one_bus_share_its_bandwidth(directory):
    links = [EmulatedLink(50e6, pacer=Pacer("pcie0", 50e6, directory=directory)) for _ in range(2)]
    host, device = torch.ones(500_000, dtype=torch.uint8), torch.zeros(500_000, dtype=torch.uint8)
    for link in links:
        link.register(host)
    copies = [link.copy(device, host, kind="weights") for link in links for _ in range(5)]
    for link in links:
        link.drain()
        link.close()
    begun_s = min(copy.started_s for copy in copies)
    assert max(copy.ended.at_s for copy in copies) - begun_s >= 10 * 0.01 * 0.999
    assert copies[4].ended.at_s > copies[5].started_s  # they did overlap
    assert max(copy.duration_s() for copy in copies) > 0.015  # alone: 0.01 s


def test_on_an_idle_bus_copies_follow_each_other_as_without_one(directory):
    pacer = Pacer("pcie0", 50e6, directory=directory)
    link = EmulatedLink(bytes_per_s=50e6, latency_s=1e-3, pacer=pacer)
    host, device = torch.ones(50_000, dtype=torch.uint8), torch.zeros(50_000, dtype=torch.uint8)
    link.register(host)
    copies = [link.copy(device, host, kind="weights") for _ in range(5)]
    link.drain()
    link.close()
    for before, copy in pairwise(copies):
        assert copy.started_s == before.ended.at_s
        assert copy.duration_s() >= 2e-3 * 0.999
    assert copies[-1].ended.at_s - copies[0].started_s < 5 * 2e-3 + 1.0


def test_of_a_sampled_copy_the_first_bytes_arrive_and_all_are_paced_and_counted():
    link = EmulatedLink(bytes_per_s=50e6, sample_bytes=100)
    host, device = torch.ones(500_000, dtype=torch.uint8), torch.zeros(500_000, dtype=torch.uint8)
    link.register(host)
    copy = link.copy(device, host, kind="weights")
    link.drain()
    link.close()
    assert device[:100].all()
    assert not device[100:].any()
    assert copy.duration_s() >= 0.01 * 0.999
    assert link.counters.bytes == {(TO_DEVICE, "weights"): 500_000}
    with pytest.raises(LinkError, match="sample_bytes must be 0 or more"):
        EmulatedLink(bytes_per_s=50e6, sample_bytes=-1)


def test_a_configured_bus_is_shared_and_given_back(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    bus = {"name": "pcie0", "bandwidth": "1.5GB/s"}
    first, _ = open_link(LinkConfig(kind="emulated", bandwidth="1GB/s", bus=bus))
    second, _ = open_link(LinkConfig(kind="emulated", bandwidth="2GB/s", bus=bus))
    assert (first.bytes_per_s, first.pacer.bytes_per_s) == (1e9, 1.5e9)
    first.pacer.set_bandwidth(1e8)
    assert second.pacer.bytes_per_s == 1e8
    other = {"name": "pcie0", "bandwidth": "3GB/s"}
    with pytest.raises(LinkError, match="same bandwidth"):
        open_link(LinkConfig(kind="emulated", bandwidth="1GB/s", bus=other))
    first.close()
    second.close()
    third, _ = open_link(LinkConfig(kind="emulated", bandwidth="1GB/s", bus=other))
    assert third.pacer.bytes_per_s == 3e9
    third.close()


def test_a_bus_of_no_given_bandwidth_is_as_fast_as_the_link(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    link, _ = open_link(LinkConfig(kind="emulated", bandwidth="1GB/s", bus={"name": "pcie0"}))
    assert link.pacer.bytes_per_s == 1e9
    link.close()


@pytest.mark.parametrize(
    ("bus", "reason"),
    [
        ({"name": "../up"}, "match pattern"),
        ({"name": "pcie0", "bandwidth": "-1GB/s"}, "greater than 0"),
        ({"name": "pcie0", "bandwidth": "1GB/s"}, "remove `bus.bandwidth`"),
        ({}, "name"),
    ],
)
def test_a_bus_that_cannot_be_is_refused(bus, reason):
    with pytest.raises(ValueError, match=reason):
        LinkConfig(kind="cuda", bus=bus)


def test_closing_the_emulated_link_ends_its_threads():
    before = threading.active_count()
    link = EmulatedLink(bytes_per_s=1e9)
    host, device = torch.ones(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
    link.register(host)
    link.copy(device, host, kind="weights")
    link.copy(host, device, kind="kv", direction=TO_HOST)
    assert threading.active_count() == before + 2
    link.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("bytes_per_s", "latency_s"), [(0, 0), (-1, 0), (float("nan"), 0), (1, -1)]
)
def test_an_emulated_link_needs_a_possible_speed(bytes_per_s, latency_s):
    with pytest.raises(LinkError, match="bandwidth above 0"):
        EmulatedLink(bytes_per_s, latency_s)


# CUDA on the virtual clock, where times are exact.


def test_cuda_copies_run_beside_the_host_and_one_after_the_other(fake):
    rig = fake_rig(fake)
    host, device = rig.host_bytes(1_000_000), rig.device_bytes(1_000_000)
    copies = [rig.link.copy(device, host, kind="weights") for _ in range(3)]
    assert fake.now_s == 0
    assert not copies[0].done()
    fake.pass_time(3.1)
    assert [copy.done() for copy in copies] == [True, True, False]
    rig.link.drain()
    assert fake.now_s == pytest.approx(4.5)
    assert [copy.duration_s() for copy in copies] == pytest.approx([1.5] * 3)


def test_a_wait_holds_up_compute_and_not_the_host(fake):
    rig = fake_rig(fake)
    host, device = rig.host_bytes(1_000_000), rig.device_bytes(1_000_000)
    rig.link.wait(rig.link.copy(device, host, kind="weights"))
    assert fake.now_s == 0
    reading = fake.compute(1.0, read=device)
    assert (reading.start_s, reading.end_s) == pytest.approx((1.5, 2.5))
    fake.pass_time(2.5)
    assert torch.equal(reading.seen, host)


def test_a_copy_that_waits_on_compute_is_timed_from_the_end_of_the_wait(fake):
    rig = fake_rig(fake)
    host, device = rig.host_bytes(1_000_000), rig.device_bytes(1_000_000)
    reading = fake.compute(7.0, read=device)
    copy = rig.link.copy(device, host, kind="weights", after=(rig.link.compute_event(),))
    rig.link.drain()
    assert fake.now_s == pytest.approx(8.5)
    assert copy.duration_s() == pytest.approx(1.5)
    assert not reading.seen.any()


def test_the_virtual_clock_catches_what_a_gpu_would_get_wrong(fake):
    rig = fake_rig(fake)
    host, device = rig.host_bytes(1000), rig.device_bytes(1000)
    rig.link.copy(device, host, kind="weights")
    with pytest.raises(HazardError, match="delivered only at"):
        fake.compute(1.0, read=device)
    rig.link.drain()
    fake.compute(1.0, read=device)
    with pytest.raises(HazardError, match="in use until"):
        rig.link.copy(device, host, kind="weights")
    with pytest.raises(HazardError, match="nor pinned"):
        fake.copy_async(device, torch.zeros(1000, dtype=torch.uint8), fake.new_stream())


def test_a_cuda_copy_that_the_driver_refuses_is_a_link_error_and_the_link_goes_on(fake):
    rig = fake_rig(fake)
    host, device = rig.host_bytes(), rig.device_bytes(NBYTES)
    fake.failures.append(RuntimeError("CUDA error: invalid argument"))
    with pytest.raises(LinkError, match="invalid argument"):
        rig.link.copy(device, host, kind="weights")
    assert not rig.link.counters.bytes
    rig.link.copy(device, host, kind="weights")
    rig.link.drain()
    assert torch.equal(device, host)


def test_closing_the_cuda_link_unpins_what_is_still_pinned(fake):
    rig = fake_rig(fake)
    first, second = rig.host_bytes(), rig.host_bytes()
    assert fake.pinned == {first.data_ptr(): NBYTES, second.data_ptr(): NBYTES}
    rig.link.unregister(first)
    assert fake.pinned == {second.data_ptr(): NBYTES}
    rig.link.close()
    assert fake.pinned == {}


def test_memory_that_cannot_be_pinned_is_not_registered(fake):
    rig = fake_rig(fake)
    host = torch.zeros(NBYTES, dtype=torch.uint8)
    fake.pin(host.data_ptr(), NBYTES)  # somebody else did
    with pytest.raises(LinkError, match="pinned twice"):
        rig.link.register(host)
    with pytest.raises(LinkError, match="register it first"):
        rig.link.copy(rig.device_bytes(NBYTES), host, kind="weights")


def pieces_rig(fake: FakeCuda, pages_each: int) -> Rig:
    link = CudaLink(torch.device("cuda"), fake, piece_bytes=pages_each * mmap.PAGESIZE)
    fake.strict_pages = True
    return Rig(link, fake.device_memory, lambda: None, fake.pass_time)


def test_host_memory_is_pinned_in_pieces_and_no_copy_crosses_from_one_to_the_next(fake):
    rig, page = pieces_rig(fake, pages_each=4), mmap.PAGESIZE
    mirror = HostMap(10 * page + 256)
    mirror.bytes.random_(256)
    rig.link.register(mirror.bytes)
    assert list(fake.pinned.values()) == [4 * page, 4 * page, 2 * page + 256]
    device = rig.device_bytes(mirror.nbytes)
    whole = rig.link.copy(device, mirror.bytes, kind="weights")  # the fake refuses a crossing
    part = slice(3 * page + 256, 8 * page + 512)
    rig.link.drain()
    assert torch.equal(device, mirror.bytes)
    assert whole.duration_s() == pytest.approx(3 * 0.5 + mirror.nbytes / 1e6)
    back = rig.link.copy(device[part], mirror.bytes[part], kind="weights")
    rig.link.drain()
    assert back.done()
    assert rig.link.counters.copies == {(TO_DEVICE, "weights"): 2}
    rig.link.unregister(mirror.bytes)
    assert fake.pinned == {}


def test_pieces_of_memory_that_starts_inside_a_page_share_no_page(fake):
    rig, page = pieces_rig(fake, pages_each=1), mmap.PAGESIZE
    mirror = HostMap(5 * page)
    odd = mirror.bytes[768 : 3 * page + 512]
    rig.link.register(odd)
    assert sum(fake.pinned.values()) == odd.numel()
    device = rig.device_bytes(odd.numel())
    odd.random_(256)
    rig.link.copy(device, odd, kind="weights")
    rig.link.drain()
    assert torch.equal(device, odd)


def test_a_piece_that_cannot_be_pinned_unpins_the_others(fake):
    rig, page = pieces_rig(fake, pages_each=1), mmap.PAGESIZE
    mirror = HostMap(4 * page)
    fake.pin(mirror.bytes.data_ptr() + 2 * page, page)  # somebody else did
    with pytest.raises(LinkError, match="pinned twice"):
        rig.link.register(mirror.bytes)
    assert list(fake.pinned) == [mirror.bytes.data_ptr() + 2 * page]


def test_the_driver_is_told_of_read_only_memory(fake):
    rig = fake_rig(fake)
    ours, shared = rig.host_bytes(), torch.zeros(NBYTES, dtype=torch.uint8)
    rig.link.register(shared, read_only=True)
    assert fake.pins_read_only == {ours.data_ptr(): False, shared.data_ptr(): True}


def test_pieces_are_whole_pages():
    with pytest.raises(LinkError, match="whole pages"):
        CudaLink(torch.device("cuda"), FakeCuda(), piece_bytes=1000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_cuda_link_names_the_emulated_one():
    with pytest.raises(LinkError, match="kind: emulated"):
        CudaRuntime(torch.device("cuda", 0))
    with pytest.raises(LinkError, match="kind: emulated"):
        open_link(LinkConfig(kind="cuda"))


def test_a_configured_emulated_link_has_the_configured_speed():
    link, device = open_link(LinkConfig(kind="emulated", bandwidth="2GB/s", latency="10us"))
    assert isinstance(link, EmulatedLink)
    assert (link.kind, link.bytes_per_s, link.latency_s) == ("emulated", 2e9, pytest.approx(1e-5))
    assert device == torch.device("cpu")
    link.close()
