"""Where a GPU sits: its memory node, so that mirrors are touched first by cores beside it.

Memory belongs to the node of the core that touches it first. A mirror on the far socket crosses
the inter-socket link on every copy, so the process moves to the GPU's node before it maps any.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SYS = Path("/sys")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NumaPlace:
    """Where a device's host memory should lie.

    Attributes:
        node: None where the machine does not tell, or has one node only.
        cpus: of that node which this process may use; empty where `node` is None.
        reason: why there is no node; empty where there is one.
    """

    node: int | None
    cpus: frozenset[int]
    reason: str = ""


def pci_address(properties: Any) -> str | None:
    """`0000:3b:00.0` from torch's device properties; None from a torch that does not tell."""
    try:
        return (
            f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}"
            f":{properties.pci_device_id:02x}.0"
        )
    except AttributeError:
        return None


def numa_place(address: str | None, sys: Path = _SYS) -> NumaPlace:
    """The node of the PCI device at `address` and its cores."""
    if address is None:
        return _nowhere("torch does not tell the device's PCI address")
    file = sys / "bus" / "pci" / "devices" / address / "numa_node"
    try:
        node = int(file.read_text())
    except (OSError, ValueError) as error:
        return _nowhere(f"{file} cannot be read ({type(error).__name__})")
    if node < 0:
        return _nowhere(f"{file} says {node}: the machine has one node or does not tell")
    cpulist = sys / "devices" / "system" / "node" / f"node{node}" / "cpulist"
    try:
        cpus = _parse(cpulist.read_text())
    except (OSError, ValueError) as error:
        return _nowhere(f"{cpulist} cannot be read ({type(error).__name__})")
    allowed = cpus & os.sched_getaffinity(0)
    if not allowed:
        return _nowhere(f"none of node {node}'s cores is among those this process may use")
    return NumaPlace(node, frozenset(allowed))


def move_beside(address: str | None, sys: Path = _SYS) -> NumaPlace:
    """Let the calling thread, and those it starts from now on, run on the device's node only.

    Where the node is not known the affinity stays as it is, and a warning says why.
    """
    place = numa_place(address, sys)
    if place.node is None:
        _LOG.warning(
            "host memory may lie far from the GPU: %s; pin the process by hand (numactl) "
            "if the machine has several sockets",
            place.reason,
        )
    else:
        os.sched_setaffinity(0, place.cpus)
        _LOG.info("host memory on NUMA node %d, on %d cores", place.node, len(place.cpus))
    return place


def _nowhere(reason: str) -> NumaPlace:
    return NumaPlace(None, frozenset(), reason)


def _parse(cpulist: str) -> set[int]:
    """`0-3,8` -> {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in cpulist.strip().split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
