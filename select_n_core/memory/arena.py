"""The device arena: every device byte of a replica, allocated once and exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from select_n_core.errors import DeviceMemoryError
from select_n_core.memory.host import HostMap
from select_n_core.units import ALIGNMENT


class Arena:
    """One flat device allocation of exactly `nbytes`.

    On the CPU the "device" is an exact host map. Allocate it outside `inference_mode`: views
    must stay usable from every thread.

    Raises:
        DeviceMemoryError: the device cannot give that much.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self.device = device
        self._map: HostMap | None = None
        try:
            if device.type == "cpu":
                self._map = HostMap(nbytes, huge_pages=True)
                self.bytes: Tensor = self._map.bytes
            else:
                self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except (RuntimeError, OSError) as error:
            raise DeviceMemoryError(
                f"cannot allocate the arena of {nbytes} bytes on {device}; "
                f"lower `device_memory` ({error})"
            ) from error

    def region(self, offset: int, nbytes: int) -> Tensor:
        """The flat uint8 view [offset, offset + nbytes); offsets are aligned."""
        if offset % ALIGNMENT or offset < 0 or offset + nbytes > self.nbytes:
            raise DeviceMemoryError(
                f"region [{offset}, {offset + nbytes}) is no aligned part of {self.nbytes} bytes"
            )
        return self.bytes[offset : offset + nbytes]

    def holds(self, tensor: Tensor) -> bool:
        """Whether every byte of `tensor` lies in the arena (an empty tensor lies nowhere)."""
        start = tensor.data_ptr()
        span = _span_bytes(tensor)
        base = self.bytes.data_ptr()
        return span > 0 and base <= start and start + span <= base + self.nbytes

    def close(self) -> None:
        """Give the bytes back once the last tensor over them is gone."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        if self._map is not None:
            self._map.close()


def _span_bytes(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())
