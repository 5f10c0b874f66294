"""From a link's configuration to the link, the device it serves, and its seat on the bus."""

from __future__ import annotations

import torch

from select_n_core.config import LinkConfig
from select_n_core.links.base import Link
from select_n_core.links.board import Member
from select_n_core.links.cuda import CudaLink
from select_n_core.links.emulated import EmulatedLink
from select_n_core.links.numa import move_beside, pci_address
from select_n_core.links.paced import PacedLink, Timeline
from select_n_core.links.pacer import Pacer


def open_link(config: LinkConfig, timeline: Timeline | None = None) -> tuple[Link, torch.device]:
    """The link and its device.

    Args:
        timeline: of paced compute beside an emulated link; None where compute is real.

    Raises:
        LinkError: there is no such hardware, or see `Pacer`.
    """
    if config.kind == "cuda":
        device = torch.device("cuda", 0)
        link: Link = CudaLink(device)
        # Before anybody maps host memory: it lies where it is touched first.
        move_beside(pci_address(torch.cuda.get_device_properties(device)))
        return link, device
    assert config.bandwidth is not None  # LinkConfig checked it
    pacer = open_pacer(config)
    if timeline is not None:
        link = PacedLink(timeline, config.bandwidth, config.latency, pacer)
        return link, torch.device("cpu")
    return EmulatedLink(config.bandwidth, config.latency, pacer), torch.device("cpu")


def open_pacer(config: LinkConfig) -> Pacer | None:
    """The emulated bus of a link; None where it has none, or a real one.

    Raises:
        LinkError: see `Pacer`.
    """
    bytes_per_s = config.bus_bytes_per_s
    if config.bus is None or bytes_per_s is None:
        return None
    return Pacer(config.bus.name, bytes_per_s)


def join_bus(config: LinkConfig, measured_bytes_per_s: float, lifetime_s: float) -> Member | None:
    """A seat on the link's bus; None where it has none, or is not to be coordinated.

    Args:
        measured_bytes_per_s: of the link, as recorded; a real bus is taken to be as fast until
            its members have seen more.
        lifetime_s: of a typical request.

    Raises:
        LinkError: see `Member`.
    """
    if config.bus is None or not config.bus.coordinated:
        return None
    bytes_per_s = config.bus_bytes_per_s or measured_bytes_per_s
    return Member(config.bus.name, bytes_per_s, lifetime_s=lifetime_s)
