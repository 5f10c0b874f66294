"""Small integers on their way to the device: one copy for all of them, and no wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """The lists as int64 tensors on the device, by one copy that the host does not wait for."""
    flat = torch.tensor([value for each in lists for value in each], dtype=torch.long)
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    return list(flat.split([len(each) for each in lists]))
