"""The product's configuration: one YAML file, unchanged a Ray Serve config file.

Ours stands under `applications[name=serve].args` and, where a controller is wanted, in the
`user_config` of `applications[name=control]`'s deployment ClusterController. Everything else in the
file is Ray Serve's and is passed through. Sizes and times carry units (`256MiB`, `1GB/s`, `100ms`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from select_n_core.decisions.policy import Policy, PolicyKind
from select_n_core.errors import ConfigError
from select_n_core.live import LivePolicy, SLOConfig, parse_policy
from select_n_core.quantities import Bytes, BytesPerSecond, Seconds
from select_n_core.strict import Strict, config_error

SERVE_APPLICATION = "serve"
BUILDER = "deployments.app:build_app"
CONTROL_APPLICATION = "control"
CONTROLLER = "ClusterController"

DType = Literal["bfloat16", "float16", "float32"]
UnitKind = Literal["layer", "half"]


def _interval(value: object) -> object:
    if value is False or value == "off":  # YAML 1.1 reads a bare `off` as False
        return "off"
    if value == "auto":
        return value
    try:
        number = math.nan if value is True else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 1 <= number < math.inf:
        raise ValueError(
            f"must be auto, off or a number N of 1 or more (one in every N layers is streamed), "
            f"got {value!r}"
        )
    return number


Interval = Annotated[
    Literal["auto", "off"] | Annotated[float, Field(ge=1)], BeforeValidator(_interval)
]


class BusConfig(Strict):
    """What the links of several replicas on a machine share, as PCIe devices share a root.

    Attributes:
        name: replicas of the same user, machine and name share the bus.
        bandwidth: of the whole bus, each direction; an emulated one's, and as much as the link's
            where it is not given.
        coordinated: whether this replica shares the bus out with the others. False leaves it to
            whoever copies most.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    bandwidth: Annotated[BytesPerSecond, Field(gt=0)] | None = None
    coordinated: bool = True


class LinkConfig(Strict):
    """The host-device path of a replica."""

    kind: Literal["emulated", "cuda"]
    bandwidth: Annotated[BytesPerSecond, Field(gt=0)] | None = None
    latency: Annotated[Seconds, Field(ge=0)] = 0.0
    bus: BusConfig | None = None

    @model_validator(mode="after")
    def _bandwidth_is_set_or_measured(self) -> LinkConfig:
        if self.kind == "emulated" and self.bandwidth is None:
            raise ValueError("an emulated link needs `bandwidth`, for example 1GB/s")
        if self.kind == "cuda" and (self.bandwidth is not None or self.latency):
            raise ValueError("a cuda link is measured; remove `bandwidth` and `latency`")
        if self.kind == "cuda" and self.bus is not None and self.bus.bandwidth is not None:
            raise ValueError("the bus of a cuda link is measured; remove `bus.bandwidth`")
        return self

    @property
    def bus_bytes_per_s(self) -> float | None:
        """The whole bus's bandwidth where it is emulated; None where it is measured or none."""
        if self.bus is None or self.kind == "cuda":
            return None
        return self.bus.bandwidth or self.bandwidth


class ReplicasConfig(Strict):
    """How many replicas a model may have; min < max turns autoscaling on."""

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    upscale_delay: Annotated[Seconds, Field(ge=0)] = 5.0
    downscale_delay: Annotated[Seconds, Field(ge=0)] = 60.0

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasConfig:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class WorkloadConfig(Strict):
    """The typical request the planner sizes for."""

    prompt_tokens: Annotated[int, Field(ge=1)] = 128
    output_tokens: Annotated[int, Field(ge=1)] = 64
    rate: Annotated[float, Field(gt=0)] | None = None


class ComputeConfig(Strict):
    """What computes in the place of the device: a record's times, without weights (paced)."""

    kind: Literal["paced"]
    record: Annotated[str, Field(min_length=1)]


def _policy(value: object) -> str:
    return str(Policy.parse(str(value)))


class ModelConfig(Strict):
    """One model: where it comes from, what it may use, what it must promise."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$")]
    source: Annotated[str, Field(min_length=1)]
    dtype: DType = "bfloat16"
    device_memory: Annotated[Bytes, Field(gt=0)]
    host_memory: Annotated[Bytes, Field(ge=0)]
    host_kv: Annotated[Bytes, Field(ge=0)] = 0
    link: LinkConfig
    slo: SLOConfig
    policy: Annotated[str, BeforeValidator(_policy)] = "select_n"
    interval: Interval = "auto"
    units: UnitKind = "layer"
    slots: Annotated[int, Field(ge=1, le=8)] = 2
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 16
    max_step_tokens: Annotated[int, Field(ge=16, le=16384)] = 256
    block_tokens: Literal[16, 32, 64, 128, 256] = 32
    prefix_caching: bool = True
    max_queue: Annotated[int, Field(ge=1)] = 64
    compute: ComputeConfig | None = None
    engine: Literal["process", "inline"] = "process"
    replicas: ReplicasConfig = ReplicasConfig()
    workload: WorkloadConfig = WorkloadConfig()

    @model_validator(mode="after")
    def _host_kv_is_a_part(self) -> ModelConfig:
        if self.host_kv > self.host_memory:
            raise ValueError(
                f"host_kv ({self.host_kv} bytes) is a part of host_memory ({self.host_memory} "
                "bytes) and cannot be more; lower it or raise host_memory"
            )
        return self

    @field_validator("interval")
    @classmethod
    def _one_decides_k(cls, interval: Interval, info: ValidationInfo) -> Interval:
        policy = info.data.get("policy", "select_n")
        if interval != "auto" and policy != "select_n":
            raise ValueError(
                f"policy {policy} decides it, so that interval {interval} has no effect; remove "
                "one of the two, or write policy: static:N"
            )
        return interval

    @model_validator(mode="after")
    def _flexgen_knows_the_load(self) -> ModelConfig:
        if self.policy == PolicyKind.FLEXGEN and self.workload.rate is None:
            raise ValueError(
                "policy flexgen is fitted to the mean load; set workload.rate (requests per second)"
            )
        return self

    @model_validator(mode="after")
    def _paced_link(self) -> ModelConfig:
        if self.compute is not None and self.link.kind != "emulated":
            raise ValueError(
                f"compute.kind paced needs an emulated link, link.kind is {self.link.kind}; "
                "set link.kind: emulated with a bandwidth, or remove compute"
            )
        return self

    @model_validator(mode="after")
    def _step_holds_batch(self) -> ModelConfig:
        if self.max_step_tokens < self.max_batch:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) is below max_batch ({self.max_batch}): "
                "a step must hold one token of every running request"
            )
        return self


class ServeArgs(Strict):
    """The `args` of the application `serve`.

    Attributes:
        stream_timeout: of silence, after which an answer counts as lost.
        routing: who chooses a request's replica: `headroom`, by the room that replicas report; or
            `power_of_two`, Ray Serve by their queues, the baseline. Replicas admit either way.
    """

    models: Annotated[list[ModelConfig], Field(min_length=1)]
    stream_timeout: Annotated[Seconds, Field(gt=0)] = 60.0
    routing: Literal["headroom", "power_of_two"] = "headroom"

    @field_validator("models")
    @classmethod
    def _names_differ(cls, models: list[ModelConfig]) -> list[ModelConfig]:
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise ValueError(f"model names must differ, got {', '.join(names)}")
        return models


class HTTPOptions(BaseModel):
    """The part of Ray Serve's http_options that we read; the rest passes through."""

    model_config = ConfigDict(extra="allow", frozen=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000


class DeployConfig(BaseModel):
    """A whole configuration file, with our part validated.

    Attributes:
        document: the file as Ray Serve gets it, `http_options` filled in with our defaults.
        http: where the ingress listens.
        serve: our `args`.
        live: what the controller is given; None where there is no controller.
    """

    model_config = ConfigDict(frozen=True)

    document: dict[str, Any]
    http: HTTPOptions
    serve: ServeArgs
    live: LivePolicy | None = None


def load_config(path: str | Path) -> DeployConfig:
    """Read and validate a configuration file; raises `ConfigError` naming field and mend."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: it is not UTF-8", field=str(path)) from error
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise ConfigError(f"{path} is not valid YAML: {where}", field=str(path)) from error
    return parse_config(document)


def parse_config(document: object) -> DeployConfig:
    """Validate a configuration that is already a mapping; see `load_config`."""
    if not isinstance(document, dict) or not isinstance(document.get("applications"), list):
        raise ConfigError("the file needs a list `applications`", field="applications")
    index, application = _one_application(document, SERVE_APPLICATION)
    if application.get("import_path") != BUILDER:
        raise ConfigError(
            f"applications.{index}.import_path must be '{BUILDER}'",
            field=f"applications.{index}.import_path",
        )
    serve = parse_args(application.get("args") or {}, prefix=f"applications.{index}.args")
    try:
        http = HTTPOptions.model_validate(document.get("http_options") or {})
    except ValidationError as error:
        raise config_error(error, prefix="http_options") from error
    listening = {"proxy_location": "HeadOnly"} | document | {"http_options": http.model_dump()}
    live = _live_policy(document, serve)
    return DeployConfig(document=listening, http=http, serve=serve, live=live)


def _one_application(document: dict[str, Any], name: str) -> tuple[int, dict[str, Any]]:
    """The application of that name and its place."""
    found = _applications(document, name)
    if len(found) != 1:
        raise ConfigError(
            f"applications needs exactly one entry named '{name}', found {len(found)}",
            field="applications",
        )
    return found[0]


def _applications(document: dict[str, Any], name: str) -> list[tuple[int, dict[str, Any]]]:
    return [
        (index, application)
        for index, application in enumerate(document["applications"])
        if isinstance(application, dict) and application.get("name") == name
    ]


def _live_policy(document: dict[str, Any], serve: ServeArgs) -> LivePolicy | None:
    """The policy in the controller's `user_config`; None where no controller is wanted."""
    if not _applications(document, CONTROL_APPLICATION):
        return None
    index, application = _one_application(document, CONTROL_APPLICATION)
    prefix = f"applications.{index}.deployments"
    deployments = application.get("deployments") or []
    if not isinstance(deployments, list):
        raise ConfigError(f"{prefix} must be a list", field=prefix)
    for place, deployment in enumerate(deployments):
        if isinstance(deployment, dict) and deployment.get("name") == CONTROLLER:
            field = f"{prefix}.{place}.user_config"
            policy = parse_policy(deployment.get("user_config") or {}, prefix=field)
            policy.check_models({model.name for model in serve.models}, prefix=field)
            return policy
    return LivePolicy()


def parse_args(args: object, *, prefix: str = "args") -> ServeArgs:
    """Validate our `args`; raises `ConfigError` naming the field under `prefix`."""
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        raise config_error(error, prefix=prefix) from error
