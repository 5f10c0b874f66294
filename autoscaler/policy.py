"""The Ray Serve entry point: `policy_function="autoscaler.policy:HeadroomPolicy"`.

Serve builds one instance per deployment in its controller and calls it on every control-loop tick
(ten per second), so a call only computes. Bounds and delays are Serve's own: it applies
`upscale_delay_s` and `downscale_delay_s` to what is returned. An exception here would stop the
control loop's turn for every application, so a reading that makes no sense is logged and left out.

Replicas publish, from `record_autoscaling_stats()`, a flat dict of numbers: `ttft_headroom`,
`tpot_headroom` (1 - p95 / target; 1.0 when idle), `running`, `waiting`, and, when the plan knows
it, `tpot_floor` (see `ReplicaFacts`). Nothing is summed over replicas to give a number of
replicas: a replica more would then ask for another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from autoscaler.decision import ReplicaFacts, ScalingFacts, desired_replicas
from autoscaler.options import parse_policy_kwargs
from select_n_core.errors import InputError

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_REQUIRED = ("ttft_headroom", "tpot_headroom", "running", "waiting")
_FLOOR = "tpot_floor"


class _Sample(Protocol):
    """One reading, stamped by the replica's clock."""

    timestamp: float
    value: float


class HeadroomPolicy:
    """Scales a deployment between its bounds on the TTFT and TPOT headroom its replicas report.

    Keyword arguments are `PolicyOptions`; raises `ConfigError` for an unknown or bad one.
    """

    def __init__(self, **policy_kwargs: object) -> None:
        self.options = parse_policy_kwargs(policy_kwargs)
        self.limits = self.options.limits()
        self._complained: set[str] = set()

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and the state Serve hands back at the next call."""
        now = time.time() if ctx.current_time is None else ctx.current_time
        fleet = len(ctx.running_replicas)
        grown_at = ctx.policy_state.get("grown_at", now)
        if fleet > ctx.policy_state.get("fleet", 0):
            grown_at = now
        settling = now - grown_at < self.options.settle

        readings = self._fresh_readings(ctx, now)

        def wanted(pick: Callable[[Sequence[float]], float]) -> int:
            replicas = tuple(self._replica_facts(readings, pick))
            facts = ScalingFacts(
                replicas=replicas,
                target_replicas=ctx.target_num_replicas,
                min_replicas=ctx.capacity_adjusted_min_replicas,
                max_replicas=ctx.capacity_adjusted_max_replicas,
                silent_replicas=fleet - len(replicas),
                settling=settling,
            )
            return desired_replicas(facts, self.limits)

        # The last reading is noisy and the window's mean is late: move only where both point,
        # which is the middle of the two answers and the present number.
        answers = (wanted(_last), wanted(fmean), ctx.target_num_replicas)
        return sorted(answers)[1], {"fleet": fleet, "grown_at": grown_at}

    def _fresh_readings(
        self, ctx: AutoscalingContext, now: float
    ) -> dict[str, dict[str, list[float]]]:
        """Per replica id and metric, the window's values, oldest first; stale replicas left out."""
        stale_after_s = self.options.stale_after_s(ctx.config.metrics_interval_s)
        metrics: Mapping[str, Mapping[Any, Sequence[_Sample]]] = ctx.raw_metrics or {}
        fresh: dict[str, dict[str, list[float]]] = {}
        for replica in ctx.running_replicas:
            series = {name: metrics.get(name, {}).get(replica) or () for name in _REQUIRED}
            if any(not s or now - s[-1].timestamp > stale_after_s for s in series.values()):
                continue
            series[_FLOOR] = metrics.get(_FLOOR, {}).get(replica) or ()
            fresh[str(replica)] = {
                name: [sample.value for sample in samples] for name, samples in series.items()
            }
        return fresh

    def _replica_facts(
        self,
        readings: Mapping[str, Mapping[str, Sequence[float]]],
        pick: Callable[[Sequence[float]], float],
    ) -> list[ReplicaFacts]:
        """One replica's headrooms as `pick` reads their window; requests always as means."""
        facts = []
        for replica, values in readings.items():
            try:
                facts.append(
                    ReplicaFacts(
                        ttft_headroom=pick(values["ttft_headroom"]),
                        tpot_headroom=pick(values["tpot_headroom"]),
                        running=fmean(values["running"]),
                        waiting=fmean(values["waiting"]),
                        tpot_floor=_last(values[_FLOOR]) if values[_FLOOR] else 0.0,
                    )
                )
            except InputError as error:
                if replica not in self._complained:
                    self._complained.add(replica)
                    logging.getLogger("autoscaler").warning(
                        "%s reports a number that makes no sense and is left out: %s",
                        replica,
                        error,
                    )
        return facts


def _last(values: Sequence[float]) -> float:
    return values[-1]
