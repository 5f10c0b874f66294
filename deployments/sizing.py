"""What a replica claims of its node, and how much host memory it and its pod need.

A replica needs what its configuration grants, plus what its processes hold beside it; a pod needs
that, plus Ray's daemons and the ingress. The numbers for the processes are allowances, rounded up.
"""

from __future__ import annotations

import math

from select_n_core.config import ModelConfig

MIB = 1 << 20
GIB = 1 << 30

# Two Python processes per replica, one of them with torch, transformers and, on a GPU, the host
# side of a CUDA context.
PROCESSES_BYTES = 2 * GIB
OBJECT_STORE_BYTES = 256 * MIB  # requests and tokens only; Ray would take 30 % of the memory
DAEMONS_BYTES = GIB  # raylet, its agents, the Serve proxy
INGRESS_BYTES = 512 * MIB
CONTROLLER_BYTES = 512 * MIB
# Ray kills workers when a node's memory is 95 % used.
_USABLE = 0.9

# A replica runs mostly outside its actor (device, engine process): a small claim lets several
# share a small machine.
SMALL_CPUS = 0.1


def actor_options(model: ModelConfig) -> dict[str, float]:
    """What one replica of `model` claims from Ray: a CUDA link claims one GPU."""
    if model.link.kind == "cuda":
        return {"num_cpus": 1.0, "num_gpus": 1.0}
    return {"num_cpus": SMALL_CPUS}


def replica_memory_bytes(model: ModelConfig) -> int:
    """Host memory of one replica: the mirrors, the arena where it is emulated, the processes."""
    arena = model.device_memory if model.link.kind == "emulated" else 0
    return model.host_memory + arena + PROCESSES_BYTES


def pod_memory_bytes(replica_bytes: int, *, controlled: bool = False) -> int:
    """Memory of a pod that holds a replica of `replica_bytes`, whole MiB.

    Args:
        controlled: there is a controller, which may run in this pod.
    """
    held = replica_bytes + OBJECT_STORE_BYTES + DAEMONS_BYTES + INGRESS_BYTES
    if controlled:
        held += CONTROLLER_BYTES
    return math.ceil(held / _USABLE / MIB) * MIB
