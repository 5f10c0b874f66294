"""A replica's stand-in: serves one request at a time and reports the headroom it really kept."""

import asyncio
import collections
import time

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

SERVICE_S = 0.05
TARGET_S = 0.14
WINDOW_S = 1.0


class OneAtATime:
    """Latency grows with the requests that share it; idle, all headroom is there."""

    def __init__(self):
        self.turn = asyncio.Lock()
        self.running = 0
        self.arrived = 0
        self.latencies_s = collections.deque()

    async def __call__(self):
        began = time.monotonic()
        self.arrived += 1
        try:
            async with self.turn:
                self.running += 1
                try:
                    await asyncio.sleep(SERVICE_S)
                finally:
                    self.running -= 1
        finally:
            self.arrived -= 1
        now = time.monotonic()
        self.latencies_s.append((now, now - began))

    def record_autoscaling_stats(self):
        while self.latencies_s and self.latencies_s[0][0] < time.monotonic() - WINDOW_S:
            self.latencies_s.popleft()
        latencies_s = sorted(latency_s for _, latency_s in self.latencies_s)
        p95_s = latencies_s[int(0.95 * (len(latencies_s) - 1))] if latencies_s else 0.0
        return {
            "ttft_headroom": 1 - p95_s / TARGET_S,
            "tpot_headroom": 1.0,
            "running": self.running,
            "waiting": self.arrived - self.running,
        }


def application():
    """The deployment under test, scaled between one and two replicas."""
    return (
        serve.deployment(OneAtATime)
        .options(
            name="replica",
            max_ongoing_requests=64,
            graceful_shutdown_timeout_s=1,
            health_check_period_s=1,
            ray_actor_options={"num_cpus": 0.05},
            autoscaling_config=AutoscalingConfig(
                min_replicas=1,
                max_replicas=2,
                metrics_interval_s=0.2,
                look_back_period_s=1.0,
                upscale_delay_s=0.3,
                downscale_delay_s=1.0,
                policy=AutoscalingPolicy(
                    policy_function="autoscaler.policy:HeadroomPolicy",
                    policy_kwargs={"settle": "1s"},
                ),
            ),
        )
        .bind()
    )


def send(handle):
    """One request to its end; raises when it failed."""
    handle.remote().result(timeout_s=30)
