"""From a link's configuration to the link and the device it serves."""

from __future__ import annotations

import torch

from select_n_core.config import LinkConfig
from select_n_core.links.base import Link
from select_n_core.links.cuda import CudaLink
from select_n_core.links.emulated import EmulatedLink
from select_n_core.links.numa import move_beside, pci_address


def open_link(config: LinkConfig) -> tuple[Link, torch.device]:
    """The link and its device; raises LinkError where there is no such hardware."""
    if config.kind == "cuda":
        device = torch.device("cuda", 0)
        link = CudaLink(device)
        # Before anybody maps host memory: it lies where it is touched first.
        move_beside(pci_address(torch.cuda.get_device_properties(device)))
        return link, device
    assert config.bandwidth is not None  # LinkConfig checked it
    return EmulatedLink(config.bandwidth, config.latency), torch.device("cpu")
