"""What every policy is given alike: record, memory, targets, and a load that can be borne."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.slo_load import OUTPUT, PROMPT, Schedule
from select_n_core.config import ModelConfig
from select_n_core.decisions.candidate import PlanInputs, evaluate
from select_n_core.decisions.order import interval_of_k
from select_n_core.decisions.policy import Policy, forced_k
from select_n_core.engine.planning import paced_record, plan_inputs
from select_n_core.errors import InputError
from select_n_core.quantities import format_bytes
from select_n_core.record import PerformanceRecord
from select_n_core.slo import SLO

TARGETS = SLO(tpot_s=0.1, ttft_s=2.0)
HOST_BYTES = 1 << 30
MAX_BATCH = 64  # memory and targets limit a batch, not this
UTILISATION = 0.87  # of the best static interval, when steady


@dataclass(frozen=True, slots=True)
class Stand:
    """The conditions of one memory size.

    Attributes:
        link_share: of the bus that each replica's own link carries at most.
        board: whether replicas share the bus out among themselves.
        engine: see `ModelConfig.engine`; inline is for tests.
        targets: of every request.
    """

    record_path: Path
    record: PerformanceRecord
    memory_bytes: int
    rate_per_s: float | None = None
    engine: str = "process"
    targets: SLO = TARGETS
    link_share: float = 1.0
    board: bool = True

    @property
    def bus_bytes_per_s(self) -> float:
        """What the bus carries."""
        return self.record.link_bytes_per_s

    def config(self, policy: str, bus: str) -> ModelConfig:
        """A replica of `policy` on the bus of that name."""
        bus_bytes_per_s = self.bus_bytes_per_s
        return ModelConfig.model_validate(
            {
                "name": "slo",
                "source": self.record.fingerprint.model,
                "dtype": self.record.fingerprint.dtype,
                "units": self.record.fingerprint.units,
                "compute": {"kind": "paced", "record": str(self.record_path)},
                "policy": policy,
                "device_memory": self.memory_bytes,
                "host_memory": HOST_BYTES,
                "link": {
                    "kind": "emulated",
                    "bandwidth": self.link_share * bus_bytes_per_s,
                    "bus": {
                        "name": bus,
                        "bandwidth": bus_bytes_per_s,
                        "coordinated": self.board,
                    },
                },
                "slo": {"tpot": self.targets.tpot_s, "ttft": self.targets.ttft_s},
                "max_batch": MAX_BATCH,
                "max_queue": 4 * MAX_BATCH,
                "prefix_caching": False,  # the load's prompts are all alike
                "engine": self.engine,
                "workload": {
                    "prompt_tokens": PROMPT.mean,
                    "output_tokens": OUTPUT.mean,
                    "rate": self.rate_per_s,
                },
            }
        )

    def inputs(self) -> PlanInputs:
        """What the planner looks at, ours choosing."""
        config = self.config("select_n", bus="bus")
        return plan_inputs(config, paced_record(config))

    def facts(self) -> dict[str, object]:
        """What results depend on, where the files lie left out."""
        plain = self.config("select_n", bus="bus").model_dump(mode="json")
        return plain | {"compute": "paced"}


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the planner says that static intervals can bear.

    Attributes:
        k: of the best one. capacity_per_s: typical requests per second that it serves.
        rate_per_s: the mean load that follows.
    """

    units: int
    k: int
    capacity_per_s: float

    @property
    def rate_per_s(self) -> float:
        """The mean load."""
        return UTILISATION * self.capacity_per_s

    def line(self, memory_bytes: int) -> str:
        """For people."""
        interval = interval_of_k(self.k, self.units)
        shown = "off" if interval is None else f"{interval:.3g}"
        return (
            f"{format_bytes(memory_bytes)}: the best static interval is {shown} (k = {self.k}) "
            f"with {self.capacity_per_s:.2f} requests/s by the planner; the mean load is "
            f"{self.rate_per_s:.2f}/s, {UTILISATION:.0%} of it"
        )


def calibrate(stand: Stand) -> Calibration:
    """The load for this memory, from the record alone.

    Raises:
        InputError: no interval serves a typical request within the targets.
    """
    inputs = stand.inputs()
    units = inputs.memory.units
    capacities = [
        evaluate(replace(inputs, forced_k=k, rate_per_s=None), k).requests_per_s
        for k in range(units + 1)
    ]
    best = max(range(units + 1), key=capacities.__getitem__)
    if not capacities[best]:
        raise InputError(
            f"no interval serves a typical request in {format_bytes(stand.memory_bytes)} within "
            "the targets; raise --memory",
            field="memory",
        )
    return Calibration(units, best, capacities[best])


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the planner expects of one phase, were every request typical and every queue endless.

    Attributes:
        k: the best for this phase alone. best_per_s: requests per second that it serves, of all
            replicas. flexgen_per_s: the same for the k that `flexgen` keeps.
    """

    phase: str
    offered_per_s: float
    k: int
    best_per_s: float
    flexgen_per_s: float


def ceilings(stand: Stand, schedule: Schedule) -> tuple[Ceiling, ...]:
    """A bound for any policy that only chooses k, phase by phase; `stand` knows the mean load."""
    inputs = stand.inputs()
    fitted_k = forced_k(Policy.parse("flexgen"), inputs)
    found = []
    for index, phase in enumerate(schedule.phases):
        offered_per_s = schedule.offered(index) / schedule.phase_s
        replicas = 2 if phase.second_load else 1
        slower = replicas / phase.link_share
        there = replace(
            inputs,
            rate_per_s=None,
            prompt_tokens=phase.prompt.mean,
            latency=replace(inputs.latency, transfer_s=slower * inputs.latency.transfer_s),
        )
        served = [
            min(offered_per_s, replicas * evaluate(replace(there, forced_k=k), k).requests_per_s)
            for k in range(inputs.memory.units + 1)
        ]
        best = max(range(len(served)), key=served.__getitem__)
        flexgen_per_s = 0.0 if fitted_k is None else served[fitted_k]
        found.append(Ceiling(phase.name, offered_per_s, best, served[best], flexgen_per_s))
    return tuple(found)


def ceiling_line(found: Sequence[Ceiling]) -> str:
    """What that bound is against flexgen, for people."""
    flexgen_per_s = sum(each.flexgen_per_s for each in found)
    ratio = sum(each.best_per_s for each in found) / flexgen_per_s if flexgen_per_s else None
    phases = ", ".join(
        f"{each.phase} {each.best_per_s / each.offered_per_s:.0%} at k = {each.k} "
        f"(flexgen {each.flexgen_per_s / each.offered_per_s:.0%})"
        for each in found
    )
    times = "beyond flexgen, which serves none" if ratio is None else f"{ratio:.2f}x of flexgen"
    return f"the planner's ceiling of any choice of k is {times}: {phases}"
