"""Before weights are placed: find or make the record, plan, and say so in one line."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from select_n_core.config import ModelConfig
from select_n_core.decisions.candidate import PlanInputs
from select_n_core.decisions.order import k_of_interval
from select_n_core.decisions.plan import Plan, make_plan
from select_n_core.decisions.policy import Policy, forced_k
from select_n_core.errors import ConfigError, InfeasibleError, InputError
from select_n_core.models.cache import cache_directory
from select_n_core.models.load import LoadedModel, load_model
from select_n_core.models.source import resolve
from select_n_core.profiling.fingerprint import fingerprint
from select_n_core.profiling.measure import Effort, Progress, measure_record
from select_n_core.quantities import format_bytes, format_seconds
from select_n_core.record import Fingerprint, PerformanceRecord, load_record

UNIT_NAMES = {"layer": "layers", "half": "half layers"}


@dataclass(slots=True)
class Prepared:
    """Everything known about a model before it is placed.

    Attributes:
        directory: of the checkpoint; None where compute is paced.
        loaded: the model, if finding the record needed its weights.
    """

    config: ModelConfig
    directory: Path | None
    record: PerformanceRecord
    inputs: PlanInputs
    plan: Plan
    loaded: LoadedModel | None

    @property
    def fixed(self) -> bool:
        """Whether k stands still and nothing seen while serving is learnt from: a baseline."""
        return Policy.parse(self.config.policy).fixed

    def line(self) -> str:
        """Requested, pinned, N and predicted TPOT, for people."""
        return plan_line(self.config, self.plan, self.record)


def prepare(config: ModelConfig, progress: Progress | None = None) -> Prepared:
    """Resolve the model, find or measure its record and plan.

    Raises:
        ModelNotFoundError, UnsupportedModelError: the source. LinkError: no such hardware.
        ConfigError: the record of paced compute.
        InfeasibleError: no plan meets the SLO in the memory given, with the reason.
    """
    directory: Path | None = None
    loaded: LoadedModel | None = None
    if config.compute is not None:
        record = paced_record(config)
    else:
        directory = resolve(config.source)
        record, loaded = record_for(config, directory, progress)
    inputs = plan_inputs(config, record)
    plan = make_plan(inputs)
    if not plan.feasible:
        assert plan.reason is not None
        raise InfeasibleError(
            f"model {config.name}: {plan.reason}: {plan.message}", reason=plan.reason
        )
    return Prepared(config, directory, record, inputs, plan, loaded)


def record_for(
    config: ModelConfig, directory: Path, progress: Progress | None = None
) -> tuple[PerformanceRecord, LoadedModel | None]:
    """The cached record of this model on this machine; measured once, briefly, if there is none."""
    here = fingerprint(config.source, directory, config.dtype, config.link, config.units)
    path = record_path(here)
    if path.exists():
        try:
            record = load_record(path)
            record.check(here, where=str(path))
            return record, None
        except InputError:
            path.unlink(missing_ok=True)  # ours, and of another version: measure again
    loaded = load_model(directory, config.dtype, config.units)
    with FileLock(f"{path}.lock"):  # two replicas measuring at once would disturb each other
        if path.exists():
            return load_record(path), loaded
        effort = Effort.brief(config.max_batch, config.max_step_tokens)
        record = measure_record(loaded, here, config.link, effort, progress)
        record.save(path)
    return record, loaded


def paced_record(config: ModelConfig) -> PerformanceRecord:
    """The record that paces compute, over the link of the configuration.

    It may be any machine's: what it is for is to stand in for that machine here.

    Raises:
        ConfigError: there is no such record, it is broken, or made of another kind of weights.
    """
    assert config.compute is not None
    assert config.link.bandwidth is not None  # ModelConfig checked both
    try:
        record = load_record(Path(config.compute.record).expanduser())
    except InputError as error:
        raise ConfigError(f"compute.record: {error}", field="compute.record") from error
    for name in ("dtype", "units"):
        recorded, asked = getattr(record.fingerprint, name), getattr(config, name)
        if recorded != asked:
            raise ConfigError(
                f"{name}: the record {config.compute.record} was made with {recorded}; "
                f"write {name}: {recorded} instead of {asked}",
                field=name,
            )
    link_bytes_per_s = config.link.bandwidth
    if config.link.bus_bytes_per_s is not None:
        link_bytes_per_s = min(link_bytes_per_s, config.link.bus_bytes_per_s)
    transfer_s = config.link.latency + max(record.unit_bytes) / link_bytes_per_s
    # Without samples, no copy is taken to be slower beside compute: here none is.
    return record.model_copy(update={"transfer_s": transfer_s, "transfers": ()})


def record_path(here: Fingerprint) -> Path:
    """Where the record of this fingerprint is cached."""
    digest = hashlib.sha256(here.model_dump_json().encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", here.model).strip("-")[-60:]
    return cache_directory("records") / f"{name}-{digest}.json"


def plan_inputs(config: ModelConfig, record: PerformanceRecord) -> PlanInputs:
    """The planner's facts from a model's configuration and its record."""
    units = len(record.unit_bytes)
    forced: int | None = None
    if config.interval == "off":
        forced = 0
    elif config.interval != "auto":
        forced = k_of_interval(config.interval, units)
    policy = Policy.parse(config.policy)
    inputs = PlanInputs(
        memory=record.memory(config.block_tokens),
        latency=record.latency_model(),
        slo=config.slo.targets(),
        device_bytes=config.device_memory,
        host_bytes=config.host_memory - config.host_kv,
        slots=config.slots,
        max_batch=config.max_batch,
        max_step_tokens=config.max_step_tokens,
        max_context=record.max_context,
        prompt_tokens=config.workload.prompt_tokens,
        output_tokens=config.workload.output_tokens,
        rate_per_s=config.workload.rate,
        forced_k=forced,
        unit_name=UNIT_NAMES[config.units],
    )
    if policy.fixed:
        inputs = replace(inputs, forced_k=forced_k(policy, inputs), policy=str(policy))
    return inputs


def plan_line(config: ModelConfig, plan: Plan, record: PerformanceRecord) -> str:
    """One line: what was asked, what is pinned, which N, what it is predicted to cost."""
    units = len(record.unit_bytes)
    what = UNIT_NAMES[config.units]
    asked = f"interval {config.interval}"
    if Policy.parse(config.policy).fixed:
        asked = f"policy {config.policy}"
    interval = "off" if plan.interval is None else f"{plan.interval:.3g}"
    line = (
        f"{config.name}: requested {asked}, tpot "
        f"{format_seconds(config.slo.tpot)}, device {format_bytes(config.device_memory)}; "
        f"pinned {format_bytes(plan.host_bytes + config.host_kv)} of host memory; N = {interval} "
        f"(k = {plan.k} of {units} {what} streamed over the {config.link.kind} link at "
        f"{record.link_bytes_per_s / 1e9:.3g} GB/s); predicted TPOT "
        f"{format_seconds(plan.predicted_tpot_s)} at {plan.max_batch} requests, "
        f"{plan.kv_tokens} KV tokens"
    )
    if config.compute is not None:
        line += f"; compute is paced by a record of {record.fingerprint.device}"
    return line if plan.note is None else f"{line} [{plan.note}: {plan.message}]"
