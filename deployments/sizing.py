"""What a replica claims of its node, and how much host memory it and its pod need.

A replica needs what its configuration grants, plus what its processes hold beside it; a pod needs
that, plus Ray's daemons and the ingress. The numbers for the processes are allowances, rounded up.
"""

from __future__ import annotations

import math

from select_n_core.config import DType, ModelConfig
from select_n_core.models.sizes import recorded_bytes, weights_bytes

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


_ELEMENT_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


def actor_options(model: ModelConfig) -> dict[str, float]:
    """What one replica of `model` claims from Ray: a CUDA link claims one GPU.

    Its memory is the least that it takes, so that Ray places it on no node that cannot hold it;
    mirrors beyond that are lent.
    """
    claim = {"num_cpus": SMALL_CPUS}
    if model.link.kind == "cuda":
        claim = {"num_cpus": 1.0, "num_gpus": 1.0}
    return {**claim, "memory": least_host_bytes(model)}


def least_host_bytes(model: ModelConfig) -> int:
    """Host memory below which no plan serves `model`, as far as this machine knows its weights.

    What of the weights the device has no place for is mirrored, and host KV is pinned from the
    start; an emulated device is host memory too. The planner's floor is as much or more: the
    device holds a ring and KV as well.
    """
    if model.compute is not None:
        weights, arena = recorded_bytes(model.compute.record), 0
    else:
        weights = weights_bytes(model.source, _ELEMENT_BYTES[model.dtype])
        arena = model.device_memory if model.link.kind == "emulated" else 0
    mirrored = max(0, (weights or 0) - model.device_memory)
    return min(mirrored, model.host_memory - model.host_kv) + model.host_kv + arena


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
