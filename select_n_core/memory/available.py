"""How much memory there is right now: the tightest of device, machine and control group."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from select_n_core.errors import DeviceMemoryError
from select_n_core.memory.domain import find_domain
from select_n_core.quantities import format_bytes

_USED = ("memory.current", "memory.usage_in_bytes")  # of a control group, version 2 and 1


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes this process may still map: MemAvailable, or less inside a control group.

    Args:
        root: of the file system with `proc` and the control groups.
    """
    meminfo = (root / "proc/meminfo").read_text().splitlines()
    values = dict(line.split(":", 1) for line in meminfo if ":" in line)
    available = int(values["MemAvailable"].split()[0]) << 10
    domain = find_domain(root)
    if domain.group is not None:
        used = next(
            int(file.read_text()) for name in _USED if (file := domain.group / name).exists()
        )
        available = min(available, domain.limit_bytes - used + _reclaimable_bytes(domain.group))
    return available


def _reclaimable_bytes(group: Path) -> int:
    """Page cache that the control group is charged for: it goes when memory is asked for."""
    stat = group / "memory.stat"
    if not stat.exists():
        return 0
    pages = dict(line.split() for line in stat.read_text().splitlines())
    # Version 1 has what is below the group in lines of their own.
    prefix = "total_" if "total_active_file" in pages else ""
    return sum(int(pages.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def available_device_bytes(device: torch.device) -> int:
    """Free bytes of the device; an emulated device is host memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_host_bytes()


def wait_for_bytes(
    what: str,
    need_bytes: int,
    available: Callable[[], int],
    *,
    deadline_s: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until a predecessor has given its memory back.

    Raises:
        DeviceMemoryError: `need_bytes` were not free within `deadline_s`.
    """
    end_s = clock() + deadline_s
    while (free := available()) < need_bytes:
        if clock() >= end_s:
            raise DeviceMemoryError(
                f"{what}: {format_bytes(need_bytes)} needed, {format_bytes(free)} free after "
                f"waiting {deadline_s:.0f} s; lower the budget or free memory on this machine"
            )
        pause(0.2)
