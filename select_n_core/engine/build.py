"""From a model's configuration to a running engine: prepare, wait for memory, place, assemble."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from select_n_core.config import ModelConfig
from select_n_core.decisions.candidate import decode_shape
from select_n_core.decisions.lease import Ladder
from select_n_core.decisions.plan import Plan, capacity_tokens
from select_n_core.engine.engine import Engine
from select_n_core.engine.messages import EngineInfo
from select_n_core.engine.online import OnlineModel
from select_n_core.engine.planning import Prepared, prepare
from select_n_core.engine.reserving import host_kv_bytes_of, reserve_room
from select_n_core.engine.residence import Swapping
from select_n_core.engine.scheduler import Limits, Scheduler, Turning
from select_n_core.kv.names import Salts
from select_n_core.kv.swap import HostBlocks
from select_n_core.links.base import Link
from select_n_core.links.open import join_bus, open_link
from select_n_core.links.paced import Timeline
from select_n_core.memory.available import (
    available_device_bytes,
    available_host_bytes,
    wait_for_bytes,
)
from select_n_core.memory.domain import Domain, find_domain
from select_n_core.memory.reservation import Reservation
from select_n_core.memory.shared import SharedMaps
from select_n_core.memory.unit_maps import UnitMaps
from select_n_core.models.load import load_model
from select_n_core.models.paced import ANY_TOKEN, paced_model
from select_n_core.offload.executor import Executor
from select_n_core.offload.graphs import Graphs
from select_n_core.offload.paced import PacedExecutor
from select_n_core.offload.placement import Placement
from select_n_core.profiling.fingerprint import weights_key
from select_n_core.profiling.measure import Progress

_MEMORY_DEADLINE_S = 30.0


def build_engine(
    config: ModelConfig,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
    domain: Domain | None = None,
    *,
    lent: bool = False,
) -> tuple[Engine, EngineInfo]:
    """Build the engine of one replica; see `prepare` and `reserve_room` for what it raises.

    Where `config.compute` paces it, nothing but the record is needed: no weights, no tokenizer.

    Args:
        domain: whose host memory it takes; None is this process's own.
        lent: mirrors beyond the floor are not taken but waited for: see `HostLease.offer`.
    """
    timeline = None if config.compute is None else Timeline()
    with ExitStack() as undo:  # a build that fails gives everything back
        link, device = open_link(config.link, timeline)
        undo.callback(link.close)
        prepared = prepare(config, progress)
        whole, group = prepared.plan, _weights_key(prepared, device)
        reservation = Reservation(domain or find_domain(), config.name, group=group)
        undo.callback(reservation.close)
        maps = UnitMaps(SharedMaps(reservation=reservation), group)
        prepared = reserve_room(prepared, maps, reservation, _MEMORY_DEADLINE_S, lent=lent)
        plan = prepared.plan
        if timeline is None:  # paced memory is never touched
            _wait_for_memory(config, device, reservation.aside_bytes)
        block_bytes = prepared.record.memory(config.block_tokens).kv_block_bytes
        host_blocks = HostBlocks(config.host_kv // block_bytes, block_bytes, link, reservation)
        undo.callback(host_blocks.close)
        placement = Placement(
            arena_bytes=config.device_memory,
            k=plan.k,
            k_min=plan.k_min,
            k_max=plan.k_max,
            mirrors=plan.mirrors,
            slots=plan.slots,
            block_tokens=config.block_tokens,
            threads=prepared.record.streaming.threads if timeline is None else 1,
            resident_threads=_resident_threads(prepared) if timeline is None else 1,
            graphs=Graphs.RESIDENT if device.type == "cuda" else Graphs.OFF,
        )
        executor = _placed(prepared, placement, link, device, maps, timeline)
        undo.callback(executor.close)
        executor.model.release_source()
        # What is lent later lets requests in that the floor has no room for.
        most_tokens = capacity_tokens(whole if lent else plan, prepared.inputs)
        scheduler = _scheduler(prepared, executor, host_blocks, clock, most_tokens)
        eos = () if prepared.directory is None else eos_token_ids(prepared.directory)
        promised = config.slo.targets()
        lifetime_s = config.workload.output_tokens * promised.tpot_s
        bus = (
            None
            if prepared.fixed
            else join_bus(config.link, prepared.record.link_bytes_per_s, lifetime_s)
        )
        if bus is not None:
            undo.callback(bus.leave)
        online = OnlineModel(
            prepared.inputs.latency,
            plan.slots,
            executor.memory.slot_bytes,
            bus,
            tpot_s=promised.tpot_s,
            corrected=not prepared.fixed,
        )
        engine = Engine(
            executor,
            scheduler,
            eos,
            clock,
            host_blocks,
            online,
            reservation=reservation,
            whole_lease_bytes=0 if lent else whole.host_bytes,
        )
        info = replace(
            _info(prepared, engine, eos, most_tokens),
            ladder=_ladder(prepared, whole),
            mirrors_group=group,
        )
        undo.pop_all()  # it is the engine's now
    return engine, info


def eos_token_ids(directory: Path) -> tuple[int, ...]:
    """Tokens that end a text, from generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.exists():
            continue
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (int(eos),)
    return ()


def _weights_key(prepared: Prepared, device: torch.device) -> str:
    """Names the mirrors that replicas of this model share."""
    if prepared.directory is None:
        said = prepared.record.model_dump_json().encode()
        return f"paced {hashlib.sha256(said).hexdigest()[:24]}"
    config = prepared.config
    return weights_key(prepared.directory, config.dtype, config.units, device)


def _wait_for_memory(config: ModelConfig, device: torch.device, host_bytes: int) -> None:
    """Until a predecessor has given device and host memory back."""
    wait_for_bytes(
        f"device_memory of model {config.name}",
        config.device_memory,
        lambda: available_device_bytes(device),
        deadline_s=_MEMORY_DEADLINE_S,
    )
    if host_bytes:
        wait_for_bytes(
            f"host memory of model {config.name}",
            host_bytes,
            available_host_bytes,
            deadline_s=_MEMORY_DEADLINE_S,
        )


def _placed(
    prepared: Prepared,
    placement: Placement,
    link: Link,
    device: torch.device,
    maps: UnitMaps,
    timeline: Timeline | None,
) -> Executor:
    """The model in its arena: real, or paced on `timeline`."""
    if timeline is not None:
        paced = paced_model(prepared.record, placement.slots, timeline)
        return PacedExecutor(paced, placement, link, timeline, maps)
    config = prepared.config
    model = prepared.loaded
    if model is None:
        assert prepared.directory is not None
        model = load_model(prepared.directory, config.dtype, config.units)
    return Executor(model, placement, link, device, maps)


def _scheduler(
    prepared: Prepared,
    executor: Executor,
    host_blocks: HostBlocks,
    clock: Callable[[], float],
    most_tokens: int,
) -> Scheduler:
    config, plan, record = prepared.config, prepared.plan, prepared.record
    return Scheduler(
        limits=Limits(
            max_batch=plan.max_running,
            max_step_tokens=config.max_step_tokens,
            max_queue=config.max_queue,
            max_tokens=most_tokens,
            vocab_size=executor.model.vocab_size if config.compute is None else ANY_TOKEN,
            expected_output=config.workload.output_tokens,
        ),
        slo=config.slo.targets(),
        latency=prepared.inputs.latency,
        blocks=executor.blocks,
        k=plan.k,
        slots=plan.slots,
        clock=clock,
        swapping=Swapping(
            space=host_blocks,
            bytes_of=executor.cache.bytes_of,
            block_copy_s=host_blocks.block_bytes / record.link_bytes_per_s + config.link.latency,
        ),
        turning=Turning(
            k_min=plan.k_min,
            k_most=lambda: min(executor.m, executor.cap),
            blocks_at=executor.layout.blocks_at,
        ),
        salts=Salts() if config.prefix_caching else None,
    )


def _ladder(prepared: Prepared, whole: Plan) -> Ladder:
    """Of the plan with all the host memory that the model may have."""
    workload = prepared.config.workload
    tokens = workload.prompt_tokens + workload.output_tokens
    return Ladder.of(whole, tokens, host_kv_bytes_of(prepared))


def _resident_threads(prepared: Prepared) -> int | None:
    resident = prepared.record.resident
    return None if resident is None else resident.threads


def _info(prepared: Prepared, engine: Engine, eos: tuple[int, ...], most_tokens: int) -> EngineInfo:
    plan, inputs, executor = prepared.plan, prepared.inputs, engine.executor
    one = decode_shape(1, inputs.prompt_tokens, inputs.output_tokens)
    return EngineInfo(
        plan_line=prepared.line(),
        units=executor.memory.units,
        k=plan.k,
        k_min=plan.k_min,
        interval=plan.interval,
        max_batch=plan.max_running,
        max_tokens=most_tokens,
        device_bytes=executor.arena.nbytes,
        host_bytes=executor.host_bytes + engine.host_kv_bytes,
        kv_tokens=plan.kv_tokens,
        predicted_tpot_s=plan.predicted_tpot_s,
        predicted_iteration_s=inputs.latency.iteration_s(one, plan.k, plan.slots),
        link_kind=executor.link.kind,
        compute_kind="real" if prepared.config.compute is None else prepared.config.compute.kind,
        link_bytes_per_s=prepared.record.link_bytes_per_s,
        eos_token_ids=eos,
    )
