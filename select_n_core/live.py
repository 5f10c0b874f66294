"""The live policy: what may change while everything serves, without a restart.

It is the `user_config` of the deployment `ClusterController` in the application `control`: latency
classes, tenants and their quotas, budgets. The controller hands it on to everyone, versioned.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from select_n_core.errors import ConfigError
from select_n_core.quantities import Bytes, Seconds
from select_n_core.slo import SLO
from select_n_core.strict import Strict, config_error

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class SLOConfig(Strict):
    """Latency targets: of a model, or of a class."""

    tpot: Annotated[Seconds, Field(gt=0)]
    ttft: Annotated[Seconds, Field(gt=0)] = 2.0
    max_wait: Annotated[Seconds, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _nobody_waits_in_vain(self) -> SLOConfig:
        if self.max_wait is not None and self.max_wait > self.ttft:
            raise ValueError(
                f"max_wait ({self.max_wait:g} s) is above ttft ({self.ttft:g} s): who waited so "
                "long has missed the first token; lower it or leave it out"
            )
        return self

    def targets(self) -> SLO:
        """The targets as the plain fact that decisions take."""
        return SLO(tpot_s=self.tpot, ttft_s=self.ttft, max_wait_s=self.max_wait)


class ClassConfig(SLOConfig):
    """A latency class: targets, and who goes first.

    Attributes:
        priority: a larger one is served first, within its tenant's share.
        max_queue: requests of the class that may wait at one replica; None is the model's own.
    """

    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    max_queue: Annotated[int, Field(ge=1)] | None = None


class TenantConfig(Strict):
    """Somebody who uses the service, known by API keys.

    Attributes:
        slo_class: of its requests; None is the policy's default.
        weight: its share of a replica that several tenants want, against the others' weights.
        requests_per_minute, tokens_per_minute: its quota over all ingresses; None is no limit.
        max_queue: requests of it that may wait at one replica; None is as many as of its class.
        models: that it may use; None is all of them.
        admin: whether it sees what concerns everybody, such as metrics.
    """

    name: Name
    slo_class: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    requests_per_minute: Annotated[float, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[float, Field(ge=1)] | None = None
    max_queue: Annotated[int, Field(ge=1)] | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    admin: bool = False


class BudgetsConfig(Strict):
    """What replicas may take of a node together.

    Attributes:
        host_memory: pinned bytes on each node; None is what the node has.
    """

    host_memory: Annotated[Bytes, Field(gt=0)] | None = None


class LivePolicy(Strict):
    """Everything that may change while serving.

    Attributes:
        classes: by name. Without any, every request has its model's own targets.
        default_class: of requests whose tenant names none; None is the model's own targets.
        tenants: once there is one, a request without a known key is refused.
        keys_file: maps the hashes of API keys to tenants; every ingress reads it.
    """

    classes: dict[Name, ClassConfig] = Field(default_factory=dict)
    default_class: str | None = None
    tenants: tuple[TenantConfig, ...] = ()
    keys_file: str | None = None
    budgets: BudgetsConfig = BudgetsConfig()

    @field_validator("default_class")
    @classmethod
    def _default_exists(cls, name: str | None, info: ValidationInfo) -> str | None:
        _check_class(name, info)
        return name

    @field_validator("tenants")
    @classmethod
    def _tenants_fit(
        cls, tenants: tuple[TenantConfig, ...], info: ValidationInfo
    ) -> tuple[TenantConfig, ...]:
        names = [tenant.name for tenant in tenants]
        if len(set(names)) < len(names):
            raise ValueError(f"tenant names must differ, got {', '.join(names)}")
        for tenant in tenants:
            _check_class(tenant.slo_class, info, of=f"tenant {tenant.name}: ")
        return tenants

    @field_validator("keys_file")
    @classmethod
    def _names_one_file_everywhere(cls, path: str | None) -> str | None:
        if path is not None and not PurePosixPath(path).is_absolute():
            raise ValueError(f"must be an absolute path, the same on every node, got {path!r}")
        return path

    @model_validator(mode="after")
    def _keys_and_tenants_go_together(self) -> LivePolicy:
        if self.tenants and self.keys_file is None:
            raise ValueError("tenants need keys_file, the file with the hashes of their keys")
        if self.keys_file is not None and not self.tenants:
            raise ValueError(
                "keys_file without tenants would let everybody in; name the tenants, or remove it"
            )
        return self

    def check_models(self, models: Collection[str], *, prefix: str = "user_config") -> None:
        """Raise ConfigError, naming the field, when a tenant may use a model that is not served."""
        for index, tenant in enumerate(self.tenants):
            strange = [name for name in tenant.models or () if name not in models]
            if strange:
                raise ConfigError(
                    f"{prefix}.tenants.{index}.models: there is no model {strange[0]!r}; there is "
                    f"{', '.join(sorted(models))}",
                    field=f"{prefix}.tenants.{index}.models",
                )


def parse_policy(policy: object, *, prefix: str = "user_config") -> LivePolicy:
    """Validate a live policy; raises `ConfigError` naming the field under `prefix`."""
    try:
        return LivePolicy.model_validate(policy)
    except ValidationError as error:
        raise config_error(error, prefix=prefix) from error


def _check_class(name: str | None, info: ValidationInfo, of: str = "") -> None:
    classes = info.data.get("classes")
    if name is None or classes is None or name in classes:  # None: what they are is an error itself
        return
    known = ", ".join(classes) or "none"
    raise ValueError(f"{of}there is no class {name!r}; there is {known}")
