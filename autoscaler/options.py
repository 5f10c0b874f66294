"""The policy's settings, as they stand under `autoscaling_config.policy.policy_kwargs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoscaler.decision import ScalingLimits
from select_n_core.errors import ConfigError
from select_n_core.quantities import Seconds
from select_n_core.strict import config_error

PREFIX = "policy_kwargs"
_DEFAULTS = ScalingLimits()
_LEAST_STALE_S = 5.0  # a busy machine delays a report without anything being wrong


class PolicyOptions(BaseModel):
    """Settings of `HeadroomPolicy`; an unknown one is an error.

    Attributes:
        low_water: below this headroom a replica more is wanted.
        high_water: this headroom must remain after taking a replica away.
        settle: how long after a replica joined the others' p95 still shows the time before.
        stale_after: a report older than this does not count; by default three of the deployment's
            `metrics_interval_s`, at least 5 s. Replicas stamp with their own clock, so nodes need
            a common time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low_water: float = _DEFAULTS.low_water
    high_water: float = _DEFAULTS.high_water
    settle: Annotated[Seconds, Field(ge=0)] = 10.0
    stale_after: Annotated[Seconds, Field(gt=0)] | None = None

    def stale_after_s(self, metrics_interval_s: float) -> float:
        """The age from which a report does not count, for a deployment that reports that often."""
        if self.stale_after is not None:
            return self.stale_after
        return max(3 * metrics_interval_s, _LEAST_STALE_S)

    def limits(self) -> ScalingLimits:
        """The water marks as the decision takes them; raises `ConfigError` when they cross."""
        return ScalingLimits(low_water=self.low_water, high_water=self.high_water)


def parse_policy_kwargs(kwargs: Mapping[str, object]) -> PolicyOptions:
    """Validate `policy_kwargs`; raises `ConfigError` naming the field and the mend.

    Call it when the application is built, too: what the Serve controller raises reaches nobody.
    """
    try:
        options = PolicyOptions.model_validate(dict(kwargs))
    except ValidationError as error:
        raise config_error(error, prefix=PREFIX) from error
    try:
        options.limits()
    except ConfigError as error:
        raise ConfigError(f"{PREFIX}.{error}", field=f"{PREFIX}.{error.field}") from error
    return options
