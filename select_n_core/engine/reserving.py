"""Before weights are placed: room for the floor, and for as many mirrors more as there is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from select_n_core.decisions.lease import Ladder, paged, with_mirrors
from select_n_core.decisions.order import offload_order
from select_n_core.engine.planning import Prepared
from select_n_core.errors import HostMemoryError
from select_n_core.memory.reservation import Reservation
from select_n_core.memory.unit_maps import UnitMaps

_log = logging.getLogger(__name__)


def reserve_room(
    prepared: Prepared,
    maps: UnitMaps,
    reservation: Reservation,
    deadline_s: float,
    *,
    lent: bool = False,
) -> Prepared:
    """Keep host memory for what the engine starts with; what it is like with what it got.

    The floor must fit, and is waited for: a predecessor may be about to give it back. Mirrors
    beyond it are taken in pi's order as far as there is room; none, where they are to be `lent`.

    Raises:
        HostMemoryError: there was no room for the floor within `deadline_s`, and who holds it.
    """
    plan, unit_bytes = prepared.plan, prepared.record.unit_bytes
    order = offload_order(len(unit_bytes))
    host_kv_bytes = host_kv_bytes_of(prepared)

    def missing(units: Sequence[int]) -> int:
        return paged(host_kv_bytes) + maps.missing_bytes({u: unit_bytes[u] for u in units})

    reservation.set_floor(Ladder.of(plan, host_kv_bytes=host_kv_bytes).floor_bytes)
    reservation.wait_aside(lambda: missing(order[: plan.k_min]), deadline_s)
    count = plan.k_min
    most = count if lent else plan.mirrors
    try:
        while count < most:
            reservation.set_aside(missing(order[: count + 1]))
            count += 1
    except HostMemoryError as error:
        _log.warning(
            "model %s starts with %d of %d mirrors: %s",
            prepared.config.name,
            count,
            plan.mirrors,
            error,
        )
    return replace(prepared, plan=with_mirrors(plan, count))


def host_kv_bytes_of(prepared: Prepared) -> int:
    """Bytes of the host KV blocks, whole blocks."""
    config = prepared.config
    block_bytes = prepared.record.memory(config.block_tokens).kv_block_bytes
    return config.host_kv // block_bytes * block_bytes
