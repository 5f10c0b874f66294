"""The C allocator: what a step freed is at hand for the next one."""

import ctypes
import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from select_n_core.memory.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import torch
torch.set_num_threads(1)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return [torch.ones(3 << 20, dtype=torch.uint8) for _ in range(4)]

for _ in range(3):
    step()
begun = faults()
for _ in range(30):
    step()
print(faults() - begun)
"""


def faults_of_some_steps(habit: str) -> int:
    """In a process of its own, of which the allocator starts out with giving everything back."""
    command = [sys.executable, "-c", FAULTS, habit]
    given_back = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    environment = {**os.environ, **given_back}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(found.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc's allocator")
def test_memory_that_a_step_freed_is_not_faulted_in_again():
    assert 10 * faults_of_some_steps("kept") < faults_of_some_steps("default")
