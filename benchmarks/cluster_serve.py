"""What the cluster benchmark serves: models paced by a record, in one configuration of the product.

A record is scaled, so that several replicas fit on two cores: bytes and times are `factor` times
as large, and so are the targets; the link carries as many bytes per second as before.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cluster_nodes import HEAD
from benchmarks.slo_load import OUTPUT, PROMPT
from deployments import ray_compat
from deployments.cli.serve import find_cause
from deployments.naming import INGRESS, deployment_name
from deployments.sizing import SMALL_CPUS
from select_n_core.config import (
    BUILDER,
    CONTROL_APPLICATION,
    CONTROLLER,
    SERVE_APPLICATION,
    ModelConfig,
)
from select_n_core.decisions.candidate import PlanInputs
from select_n_core.engine.planning import paced_record, plan_inputs
from select_n_core.record import ColdSample, ModeRecord, PerformanceRecord
from select_n_core.slo import SLO

PORT = 8000
URL = f"http://127.0.0.1:{PORT}"
MAX_BATCH = 64  # memory and targets limit a batch, not this
_START_S = 300.0
_POLL_S = 0.25


def scaled(record: PerformanceRecord, factor: int) -> PerformanceRecord:
    """The record of a model whose bytes and times are `factor` times as large."""
    resident = None if record.resident is None else _scaled_mode(record.resident, factor)
    return record.model_copy(
        update={
            "static_bytes": record.static_bytes * factor,
            "unit_bytes": tuple(nbytes * factor for nbytes in record.unit_bytes),
            "kv_bytes_per_token": record.kv_bytes_per_token * factor,
            "transfer_s": record.transfer_s * factor,
            "transfers": (),
            "streaming": _scaled_mode(record.streaming, factor),
            "resident": resident,
            "streamed": (),
            "held_out": (),
        }
    )


def _scaled_mode(mode: ModeRecord, factor: int) -> ModeRecord:
    seconds = ("per_context_token_s", "per_pair_s", "outside_s", "outside_per_row_s", "per_part_s")
    cold = mode.cold and ColdSample(
        streamed_extra_s=mode.cold.streamed_extra_s * factor,
        stalled_extra_s=mode.cold.stalled_extra_s * factor,
        stall_s=mode.cold.stall_s * factor,
        copy_slowdown=mode.cold.copy_slowdown,
    )
    return mode.model_copy(
        update={name: getattr(mode, name) * factor for name in seconds}
        | {
            "samples": (),
            "cold": cold,
            "token_grid": tuple((tokens, s * factor) for tokens, s in mode.token_grid),
        }
    )


@dataclass(frozen=True, slots=True)
class PacedModel:
    """One model of the configuration.

    Attributes:
        source: of its tokenizer. record_path: of the record that paces it.
        host_bytes: what one replica's mirrors may take.
        link_bytes_per_s: of each replica's bus, which is a node's own.
        spread: at most one replica on each node.
        changes: of any field of `ModelConfig`.
    """

    name: str
    source: str
    record_path: Path
    record: PerformanceRecord
    device_bytes: int
    host_bytes: int
    targets: SLO
    link_bytes_per_s: float = 1e9
    replicas: int = 1
    spread: bool = True
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def bus(self) -> str:
        """The name of the bus that its replica has on every node."""
        return f"bus-{self.name}"

    @property
    def deployment(self) -> str:
        """Its name in Serve."""
        return deployment_name(self.name)

    def entry(self) -> dict[str, Any]:
        """Of the configuration's `models`."""
        return {
            "name": self.name,
            "source": self.source,
            "dtype": self.record.fingerprint.dtype,
            "units": self.record.fingerprint.units,
            "compute": {"kind": "paced", "record": str(self.record_path)},
            "device_memory": self.device_bytes,
            "host_memory": self.host_bytes,
            "link": {
                "kind": "emulated",
                "bandwidth": self.link_bytes_per_s,
                "bus": {"name": self.bus},
            },
            "slo": {"tpot": self.targets.tpot_s, "ttft": self.targets.ttft_s},
            "max_batch": MAX_BATCH,
            "max_queue": 4 * MAX_BATCH,
            "replicas": {"min": self.replicas, "max": self.replicas},
            "workload": {"prompt_tokens": PROMPT.mean, "output_tokens": OUTPUT.mean},
        } | self.changes

    def inputs(self) -> PlanInputs:
        """What the planner looks at."""
        config = ModelConfig.model_validate(self.entry())
        return plan_inputs(config, paced_record(config))

    def with_host(self, nbytes: int) -> PacedModel:
        """With so much host memory."""
        return replace(self, host_bytes=nbytes)


def document(
    models: Sequence[PacedModel],
    policy: dict[str, Any] | None = None,
    **args: Any,
) -> dict[str, Any]:
    """The configuration: `models`, and a controller with this policy; None is no controller.

    Whatever all requests need is on the head, which is never lost.
    """
    on_head = {"ray_actor_options": {"num_cpus": SMALL_CPUS, "resources": {HEAD: 0.01}}}
    serve = {
        "name": SERVE_APPLICATION,
        "route_prefix": "/",
        "import_path": BUILDER,
        "args": {"models": [model.entry() for model in models], "stream_timeout": "10s", **args},
        "deployments": [
            {"name": INGRESS} | on_head,
            *(
                {"name": model.deployment, "max_replicas_per_node": 1}
                for model in models
                if model.spread
            ),
        ],
    }
    applications = [serve]
    if policy is not None:
        applications.insert(
            0,
            {
                "name": CONTROL_APPLICATION,
                "route_prefix": None,
                "import_path": "deployments.control.app:build_app",
                "deployments": [{"name": CONTROLLER, "user_config": policy} | on_head],
            },
        )
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "applications": applications,
    }


def deploy(config: dict[str, Any]) -> None:
    """Serve a configuration on the connected cluster; returns once all of it answers.

    Raises:
        RuntimeError: it cannot be served, with the reason.
    """
    ray_compat.check_document(config)
    ray_compat.start_serve(config)
    ray_compat.deploy(config)
    wait_until_running({each["name"] for each in config["applications"]})


def wait_until_running(names: set[str], timeout_s: float = _START_S) -> None:
    """Wait until these applications run and HTTP answers; raises RuntimeError where they fail."""
    from ray import serve

    end_s = time.monotonic() + timeout_s
    while True:
        found = serve.status().applications
        states = {name: found[name].status.value for name in names if name in found}
        for name, state in states.items():
            if state == "DEPLOY_FAILED":
                said = [found[name].message, *(d.message for d in found[name].deployments.values())]
                cause = find_cause(" ".join(said))
                raise RuntimeError(f"{name}: {cause.line if cause else ' '.join(said)}")
        if set(states.values()) == {"RUNNING"} and len(states) == len(names) and is_healthy():
            return
        if time.monotonic() > end_s:
            raise RuntimeError(f"not everything runs after {timeout_s:g} s: {states}")
        time.sleep(_POLL_S)


def is_healthy() -> bool:
    """Whether every model answers."""
    try:
        with urllib.request.urlopen(f"{URL}/health", timeout=3) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
