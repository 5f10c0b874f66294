"""Copies by themselves, and beside compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from select_n_core.links.base import Copy, Direction, Link
from select_n_core.memory.host import HostMap
from select_n_core.profiling.passes import typical
from select_n_core.profiling.rig import Case, Rig
from select_n_core.record import TransferSample

_WARM_UP = 2
_PLACES = 4  # host buffers taken in turn: bytes that were just copied would be in the caches
_KIND = "profile"
_MOST_COPIES = 1000
_LONGER = 1.2  # copies are issued for so many times what a pass takes without them


class _Elsewhere:
    """Copies of some size to and from places that nobody computes with."""

    def __init__(self, link: Link, device: torch.device, nbytes: int) -> None:
        self._link = link
        self._hosts = [HostMap(nbytes) for _ in range(_PLACES)]
        for host in self._hosts:
            host.bytes.fill_(1)  # mapped for real
            link.register(host.bytes)
        self._targets = [
            torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(_PLACES)
        ]

    def issue(self, direction: Direction, count: int) -> list[Copy]:
        """`count` copies, one after another."""
        copies = []
        for index in range(count):
            device, host = self._targets[index % _PLACES], self._hosts[index % _PLACES].bytes
            to, source = (device, host) if direction is Direction.TO_DEVICE else (host, device)
            copies.append(self._link.copy(to, source, kind=_KIND, direction=direction))
        return copies

    def close(self) -> None:
        self._link.drain()
        for host in self._hosts:
            self._link.unregister(host.bytes)
            host.close()


@contextmanager
def _elsewhere(link: Link, device: torch.device, nbytes: int) -> Iterator[_Elsewhere]:
    places = _Elsewhere(link, device, nbytes)
    try:
        yield places
    finally:
        places.close()


def copies_alone(
    link: Link, device: torch.device, sizes: Sequence[int], repeats: int
) -> list[TransferSample]:
    """Every size in both directions, one copy at a time on an idle link."""
    samples = []
    for nbytes in sorted(set(sizes), reverse=True):
        with _elsewhere(link, device, nbytes) as places:
            for direction in Direction:
                seconds = []
                for _ in range(_WARM_UP + repeats):
                    copies = places.issue(direction, 1)
                    link.drain()
                    seconds.append(copies[0].duration_s())
                samples.append(
                    TransferSample(
                        direction=direction.value, nbytes=nbytes, seconds=tuple(seconds[_WARM_UP:])
                    )
                )
    return samples


def copies_beside(
    rig: Rig, case: Case, alone: Sequence[TransferSample], repeats: int
) -> list[TransferSample]:
    """The same copies without a pause while `case` computes; those that end before it does."""
    wall_s = typical(rig.run(case, repeats), "wall_s")
    found = []
    for sample in alone:
        count = min(_MOST_COPIES, math.ceil(_LONGER * wall_s / sample.alone_s))
        seconds: list[float] = []
        with _elsewhere(rig.link, rig.device, sample.nbytes) as places:
            for _ in range(repeats):
                copies = places.issue(Direction(sample.direction), count)
                rig.run_once(case)
                inside = sum(copy.done() for copy in copies)
                rig.link.drain()
                seconds += [copy.duration_s() for copy in copies[:inside]]
        found.append(sample.model_copy(update={"beside_compute_s": tuple(seconds)}))
    return found
