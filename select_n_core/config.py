"""The product's configuration: one YAML file, unchanged a Ray Serve config file.

Ours stands under `applications[name=serve].args`; everything else in the file is Ray Serve's and
is passed through. Sizes and times carry units (`256MiB`, `1GB/s`, `100ms`).
"""

from __future__ import annotations

import math
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from select_n_core.errors import ConfigError
from select_n_core.quantities import Bytes, BytesPerSecond, Seconds
from select_n_core.slo import SLO

SERVE_APPLICATION = "serve"
BUILDER = "deployments.app:build_app"

DType = Literal["bfloat16", "float16", "float32"]
UnitKind = Literal["layer", "half"]


class _Strict(BaseModel):
    """A field nobody knows is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class LinkConfig(_Strict):
    """The host-device path of a replica."""

    kind: Literal["emulated", "cuda"]
    bandwidth: Annotated[BytesPerSecond, Field(gt=0)] | None = None
    latency: Annotated[Seconds, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _bandwidth_is_set_or_measured(self) -> LinkConfig:
        if self.kind == "emulated" and self.bandwidth is None:
            raise ValueError("an emulated link needs `bandwidth`, for example 1GB/s")
        if self.kind == "cuda" and (self.bandwidth is not None or self.latency):
            raise ValueError("a cuda link is measured; remove `bandwidth` and `latency`")
        return self


class SLOConfig(_Strict):
    """The latency targets of a model."""

    tpot: Annotated[Seconds, Field(gt=0)]
    ttft: Annotated[Seconds, Field(gt=0)] = 2.0

    def targets(self) -> SLO:
        """The targets as the plain fact that decisions take."""
        return SLO(tpot_s=self.tpot, ttft_s=self.ttft)


class ReplicasConfig(_Strict):
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


class WorkloadConfig(_Strict):
    """The typical request the planner sizes for."""

    prompt_tokens: Annotated[int, Field(ge=1)] = 128
    output_tokens: Annotated[int, Field(ge=1)] = 64
    rate: Annotated[float, Field(gt=0)] | None = None


class ModelConfig(_Strict):
    """One model: where it comes from, what it may use, what it must promise."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$")]
    source: Annotated[str, Field(min_length=1)]
    dtype: DType = "bfloat16"
    device_memory: Annotated[Bytes, Field(gt=0)]
    host_memory: Annotated[Bytes, Field(ge=0)]
    host_kv: Annotated[Bytes, Field(ge=0)] = 0
    link: LinkConfig
    slo: SLOConfig
    interval: Interval = "auto"
    units: UnitKind = "layer"
    slots: Annotated[int, Field(ge=1, le=8)] = 2
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 16
    max_step_tokens: Annotated[int, Field(ge=16, le=16384)] = 256
    block_tokens: Literal[16, 32, 64, 128, 256] = 32
    max_queue: Annotated[int, Field(ge=1)] = 64
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

    @model_validator(mode="after")
    def _step_holds_batch(self) -> ModelConfig:
        if self.max_step_tokens < self.max_batch:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) is below max_batch ({self.max_batch}): "
                "a step must hold one token of every running request"
            )
        return self


class ServeArgs(_Strict):
    """The `args` of the application `serve`."""

    models: Annotated[list[ModelConfig], Field(min_length=1)]
    stream_timeout: Annotated[Seconds, Field(gt=0)] = 60.0

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
    """

    model_config = ConfigDict(frozen=True)

    document: dict[str, Any]
    http: HTTPOptions
    serve: ServeArgs


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
    applications = document["applications"]
    ours = [
        (index, app)
        for index, app in enumerate(applications)
        if isinstance(app, dict) and app.get("name") == SERVE_APPLICATION
    ]
    if len(ours) != 1:
        raise ConfigError(
            f"applications needs exactly one entry named '{SERVE_APPLICATION}', found {len(ours)}",
            field="applications",
        )
    index, application = ours[0]
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
    return DeployConfig(document=listening, http=http, serve=serve)


def parse_args(args: object, *, prefix: str = "args") -> ServeArgs:
    """Validate our `args`; raises `ConfigError` naming the field under `prefix`."""
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        raise config_error(error, prefix=prefix) from error


def config_error(error: ValidationError, *, prefix: str) -> ConfigError:
    """The first problem of a pydantic error as one line that names the field."""
    first = error.errors(include_url=False)[0]
    steps = [str(step) for step in first["loc"] if not _is_branch(step)]
    field = ".".join([prefix, *steps])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field; remove it or check its spelling"
    elif first["type"] == "model_type":
        message = f"needs its fields, as a mapping, got {reprlib.repr(first['input'])}"
    elif first["type"] not in ("value_error", "missing"):
        message = f"{message}, got {reprlib.repr(first['input'])}"
    more = error.error_count() - 1
    rest = f" (and {more} more)" if more else ""
    return ConfigError(f"{field}: {message}{rest}", field=field)


def _is_branch(step: int | str) -> bool:
    """Whether a location step is pydantic's name for a union branch, not a field."""
    return isinstance(step, str) and (
        "[" in step or "(" in step or step in {"float", "int", "str", "constrained-float"}
    )
