"""Memory that a forward takes and gives back again and again stays with the process."""

import os
import subprocess
import sys
from pathlib import Path

# Eight tensors at once, each of which the C library maps and unmaps where it is told to.
FAULTS = """
import resource, torch
from select_n_core.memory.workspace import keep_workspace

def faults_of_a_forward():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(3 << 18) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3): faults_of_a_forward()
mapped = faults_of_a_forward()
keep_workspace()
for _ in range(3): faults_of_a_forward()
print(mapped, faults_of_a_forward())
"""


def test_a_forward_finds_its_memory_where_the_last_one_left_it():
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    mapped, kept = map(int, done.stdout.split())
    assert mapped > 1000
    assert kept < mapped / 100
