"""The policy against contexts built with Serve's own classes, without a cluster."""

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from autoscaler.policy import HeadroomPolicy
from select_n_core.errors import ConfigError

NOW = 1_000_000.0
DEPLOYMENT = DeploymentID(name="replica", app_name="serve")


def report(headroom, *, age_s=0.0, **values):
    """A window of readings one second apart; a list of headrooms is the window itself."""
    window = headroom if isinstance(headroom, list) else [headroom] * 5
    numbers = {"running": 4, "waiting": 0, "ttft_headroom": 1.0} | values
    series = {name: [value] * len(window) for name, value in numbers.items()}
    return {"tpot_headroom": window, **series}, age_s


def context(
    *reports, running=None, target=None, state=None, now=NOW, low=1, high=4, interval_s=10.0
):
    names = [f"r{index}" for index in range(len(reports) if running is None else running)]
    replicas = [ReplicaID(unique_id=name, deployment_id=DEPLOYMENT) for name in names]
    raw = {}
    for replica, (series, age_s) in zip(replicas, reports, strict=False):
        for metric, values in series.items():
            raw.setdefault(metric, {})[replica] = [
                TimeStampedValue(now - age_s - (len(values) - 1 - i), float(value))
                for i, value in enumerate(values)
            ]
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="replica",
        app_name="serve",
        current_num_replicas=len(replicas),
        target_num_replicas=len(replicas) if target is None else target,
        running_replicas=replicas,
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics=lambda: pytest.fail("the policy reads the raw window"),
        raw_metrics=lambda: raw,
        capacity_adjusted_min_replicas=low,
        capacity_adjusted_max_replicas=high,
        policy_state={"fleet": len(replicas), "grown_at": now - 3600} if state is None else state,
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=AutoscalingConfig(
            min_replicas=low, max_replicas=high, metrics_interval_s=interval_s
        ),
    )


def wanted(ctx, **policy_kwargs):
    return HeadroomPolicy(**policy_kwargs)(ctx)[0]


def test_before_any_report_the_target_is_kept():
    assert wanted(context(running=2)) == 2
    assert wanted(context(running=0, target=1)) == 1


def test_a_lasting_broken_promise_asks_for_one_more():
    assert wanted(context(report(-0.5))) == 2


def test_waiting_requests_ask_for_one_more():
    assert wanted(context(report(0.1, waiting=3))) == 2


def test_idle_replicas_leave():
    assert wanted(context(report(1.0, running=0), report(1.0, running=0))) == 1


def test_one_noisy_reading_moves_nothing():
    assert wanted(context(report([0.2, 0.2, 0.2, 0.2, -0.3]))) == 1
    assert wanted(context(report([-0.3, -0.3, -0.3, -0.3, 0.2]))) == 1
    busy_until_now = report([0.2, 0.2, 0.2, 0.2, 1.0])
    assert wanted(context(busy_until_now, busy_until_now)) == 2


def test_a_report_that_is_too_old_does_not_count():
    assert wanted(context(report(-0.5, age_s=29))) == 2  # three intervals of 10 s
    assert wanted(context(report(-0.5, age_s=31))) == 1
    assert wanted(context(report(-0.5, age_s=4), interval_s=0.5)) == 2  # never below 5 s
    assert wanted(context(report(-0.5, age_s=6), interval_s=0.5)) == 1
    assert wanted(context(report(-0.5, age_s=31)), stale_after=60) == 2
    assert wanted(context(report(-0.5, age_s=3)), stale_after="2s") == 1


def test_a_replica_that_does_not_report_everything_counts_as_silent():
    series, age_s = report(1.0, running=0)
    del series["waiting"]
    idle = report(1.0, running=0)
    assert wanted(context((series, age_s), idle, idle)) == 3


def test_after_a_replica_joined_the_next_step_waits_until_it_shows():
    policy = HeadroomPolicy(settle="10s")
    bad = report(-0.5)
    number, state = policy(context(bad))
    assert number == 2
    number, state = policy(context(bad, target=2, state=state, now=NOW + 5))
    assert number == 2  # asked for, still starting
    number, state = policy(context(bad, bad, state=state, now=NOW + 100))
    assert number == 2  # it has only just joined
    number, state = policy(context(bad, bad, state=state, now=NOW + 109))
    assert number == 2
    number, state = policy(context(bad, bad, state=state, now=NOW + 111))
    assert number == 3


def test_the_floor_a_replica_publishes_is_used():
    assert wanted(context(report(0.04))) == 2
    assert wanted(context(report(0.04, tpot_floor=0.9))) == 1


def test_a_number_that_makes_no_sense_is_logged_once_and_the_replica_left_out(caplog):
    policy = HeadroomPolicy()
    idle = report(1.0, running=0)
    for _ in range(3):
        assert policy(context(report(float("nan")), idle, idle))[0] == 3
    assert len(caplog.records) == 1
    assert "tpot_headroom" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"low_watr": 0.1}, "policy_kwargs.low_watr"),
        ({"settle": "3 bananas"}, "policy_kwargs.settle"),
        ({"settle": -1}, "policy_kwargs.settle"),
        ({"stale_after": 0}, "policy_kwargs.stale_after"),
        ({"low_water": "high"}, "policy_kwargs.low_water"),
        ({"low_water": 0.5, "high_water": 0.4}, "policy_kwargs.low_water"),
    ],
)
def test_bad_settings_are_refused_by_name(kwargs, field):
    with pytest.raises(ConfigError) as error:
        HeadroomPolicy(**kwargs)
    assert error.value.field == field
    assert str(error.value).startswith(field)
    assert "\n" not in str(error.value)


def test_serve_builds_it_from_its_import_path_and_settings():
    from ray.serve._private.autoscaling_state import _resolve_policy_callable

    policy = _resolve_policy_callable(
        AutoscalingPolicy(
            policy_function="autoscaler.policy:HeadroomPolicy",
            policy_kwargs={"low_water": 0.1, "settle": "2s"},
        )
    )
    assert policy.options.low_water == 0.1
    assert policy.options.settle == 2.0
    assert policy(context(report(0.08)))[0] == 2
