"""Host memory goes to the GPU's node, or a warning says why it may not."""

import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from select_n_core.links.numa import move_beside, numa_place, pci_address

GPU = "0000:3b:00.0"


def machine(sys: Path, node: str, cpulist: str | None) -> Path:
    """A /sys that knows one GPU and one memory node."""
    device = sys / "bus" / "pci" / "devices" / GPU
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    if cpulist is not None:
        directory = sys / "devices" / "system" / "node" / f"node{node}"
        directory.mkdir(parents=True)
        (directory / "cpulist").write_text(f"{cpulist}\n")
    return sys


def affinity_after(call) -> set[int]:
    """Which cores a thread may use after `call`; the test's own thread stays as it is."""
    found: list[set[int]] = []

    def run() -> None:
        call()
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_the_process_moves_to_the_cores_beside_the_gpu(tmp_path):
    here = os.sched_getaffinity(0)
    one = min(here)
    sys = machine(tmp_path, "1", f"{one}-{one},100000")
    assert numa_place(GPU, sys).node == 1
    assert affinity_after(lambda: move_beside(GPU, sys)) == {one}
    assert os.sched_getaffinity(0) == here


def test_ranges_and_single_cores_of_a_node_are_understood(tmp_path):
    here = os.sched_getaffinity(0)
    sys = machine(tmp_path, "0", f"0-{max(here)},4096-4099")
    assert numa_place(GPU, sys).cpus == here


@pytest.mark.parametrize(
    ("node", "cpulist", "address", "reason"),
    [
        ("-1", None, GPU, "one node"),
        ("0", None, GPU, "cpulist cannot be read"),
        ("0", "100000-100003", GPU, "none of node 0's cores"),
        ("zero", None, GPU, "cannot be read"),
        ("0", "0", "0000:ff:00.0", "numa_node cannot be read"),
        ("0", "0", None, "PCI address"),
    ],
)
def test_an_unknown_node_changes_nothing_and_is_told(
    tmp_path, caplog, node, cpulist, address, reason
):
    here, sys = os.sched_getaffinity(0), machine(tmp_path, node, cpulist)
    with caplog.at_level(logging.WARNING):
        assert affinity_after(lambda: move_beside(address, sys)) == here
    assert numa_place(address, sys).node is None
    assert reason in caplog.text


def test_a_device_names_its_pci_address_where_torch_does():
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    assert pci_address(properties) == GPU
    assert pci_address(SimpleNamespace(name="an older torch")) is None
