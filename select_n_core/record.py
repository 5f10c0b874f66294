"""The performance record: what the offline stage measured, one versioned JSON file.

It holds the samples, the coefficients fitted to them and a fingerprint of hardware, software and
model. A record is refused where its fingerprint does not match, with the differing field named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from select_n_core.decisions.latency import ComputeModel, LatencyModel
from select_n_core.decisions.layout import ModelMemory
from select_n_core.errors import InputError, RecordMismatchError

_ALIGNMENT = 256  # of a KV block in the arena


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Fingerprint(_Frozen):
    """What a record is valid for.

    Attributes:
        device: name of the GPU, or of the CPU where the link is emulated.
        threads: CPU cores that compute may use; 0 where a GPU computes.
        model_hash: of the model's configuration.
        units: what moves, decoder layers or their halves.
    """

    device: str
    threads: int
    torch: str
    transformers: str
    link_kind: str
    link_bytes_per_s: float | None
    link_latency_s: float
    model: str
    model_hash: str
    dtype: str
    units: str = "layer"


class TransferSample(_Frozen):
    """Times of one unit's copy, alone on the link.

    Attributes:
        seconds: every repeat.
    """

    direction: Literal["h2d", "d2h"]
    nbytes: PositiveInt
    seconds: tuple[PositiveFloat, ...]


class ComputeSample(_Frozen):
    """One shape's times.

    Attributes:
        decode_rows, context_tokens, prefill_tokens, prefill_pairs: see `StepShape`.
        rows: rows of logits.
        unit_s: seconds per unit at home, lower quartile of the repeats.
        outside_s: g, lower quartile of the repeats.
        variation: coefficient of variation of the whole pass over the repeats.
        repeats: passes measured.
    """

    decode_rows: NonNegativeInt
    context_tokens: NonNegativeInt
    prefill_tokens: NonNegativeInt
    prefill_pairs: NonNegativeInt
    rows: PositiveInt
    unit_s: PositiveFloat
    outside_s: NonNegativeFloat
    variation: NonNegativeFloat
    repeats: PositiveInt


class ColdSample(_Frozen):
    """How much slower units compute because of streaming.

    Attributes:
        streamed_extra_s: a unit in a slot against one at home, its copy there in time.
        stalled_extra_s: the same after waiting `stall_s` for its copy.
        copy_slowdown: share by which every unit grows while the link is always busy.
    """

    streamed_extra_s: NonNegativeFloat
    stalled_extra_s: NonNegativeFloat
    stall_s: PositiveFloat
    copy_slowdown: NonNegativeFloat = 0.0


class ModeRecord(_Frozen):
    """One thread mode: `streaming` beside a link worker, or `resident`.

    Attributes:
        fit_error: largest relative error of the fitted model on its own samples.
        noise: how much longer the median sweep over all shapes took than the fastest one.
    """

    threads: PositiveInt
    samples: tuple[ComputeSample, ...]
    cold: ColdSample | None
    token_grid: Annotated[tuple[tuple[PositiveInt, PositiveFloat], ...], Field(min_length=1)]
    per_context_token_s: NonNegativeFloat
    per_pair_s: NonNegativeFloat
    outside_s: NonNegativeFloat
    outside_per_row_s: NonNegativeFloat
    fit_error: NonNegativeFloat
    noise: NonNegativeFloat = 0.0

    @field_validator("token_grid")
    @classmethod
    def _ascends(cls, grid: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        tokens, seconds = [point[0] for point in grid], [point[1] for point in grid]
        if tokens != sorted(set(tokens)) or seconds != sorted(seconds):
            raise ValueError("must ascend in tokens and not descend in seconds")
        return grid

    def compute_model(self) -> ComputeModel:
        """The coefficients as the plain fact that decisions take."""
        cold = self.cold or ColdSample(streamed_extra_s=0, stalled_extra_s=0, stall_s=1)
        return ComputeModel(
            token_grid=self.token_grid,
            per_context_token_s=self.per_context_token_s,
            per_pair_s=self.per_pair_s,
            outside_s=self.outside_s,
            outside_per_row_s=self.outside_per_row_s,
            streamed_extra_s=cold.streamed_extra_s,
            stalled_extra_s=cold.stalled_extra_s,
            stall_s=cold.stall_s,
            copy_slowdown=cold.copy_slowdown,
        )


class PerformanceRecord(_Frozen):
    """Everything the planner needs to know about a model on a machine.

    Attributes:
        static_bytes, unit_bytes: device and mirror sizes.
        kv_bytes_per_token: all layers, K and V.
        max_context: positions the model was made for.
        transfer_s: t, median copy of the largest unit to the device.
        seconds: what measuring took.
    """

    version: Literal[1] = 1
    fingerprint: Fingerprint
    static_bytes: NonNegativeInt
    unit_bytes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    kv_bytes_per_token: PositiveInt
    max_context: PositiveInt
    transfers: tuple[TransferSample, ...]
    transfer_s: PositiveFloat
    streaming: ModeRecord
    resident: ModeRecord | None
    seconds: PositiveFloat

    @property
    def link_bytes_per_s(self) -> float:
        """Measured host-to-device bandwidth for the largest unit."""
        return max(self.unit_bytes) / self.transfer_s

    def latency_model(self) -> LatencyModel:
        """The latency model fitted to the samples."""
        return LatencyModel(
            units=len(self.unit_bytes),
            transfer_s=self.transfer_s,
            streaming=self.streaming.compute_model(),
            resident=None if self.resident is None else self.resident.compute_model(),
            unit_shares=self._unit_shares(),
        )

    def _unit_shares(self) -> tuple[float, ...]:
        largest = max(self.unit_bytes)
        if min(self.unit_bytes) == largest:
            return ()
        return tuple(nbytes / largest for nbytes in self.unit_bytes)

    def memory(self, block_tokens: int) -> ModelMemory:
        """The sizes that layouts are made from."""
        block = self.kv_bytes_per_token * block_tokens
        return ModelMemory(
            static_bytes=self.static_bytes,
            unit_bytes=self.unit_bytes,
            kv_block_bytes=-(-block // _ALIGNMENT) * _ALIGNMENT,
            block_tokens=block_tokens,
        )

    def check(self, here: Fingerprint, *, where: str) -> None:
        """Raise RecordMismatchError naming the first field in which `here` differs."""
        for name in Fingerprint.model_fields:
            recorded, actual = getattr(self.fingerprint, name), getattr(here, name)
            if recorded != actual:
                raise RecordMismatchError(
                    f"{where}: recorded with {name} = {recorded!r}, here it is {actual!r}; "
                    "run `select-n profile` again on this machine",
                    field=name,
                )

    def save(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(path.suffix + ".part")
        part.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def load_record(path: Path) -> PerformanceRecord:
    """Read a record; raises InputError naming the field that is wrong."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the record {path}: {error.strerror}") from error
    try:
        return PerformanceRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(step) for step in first["loc"]) or "record"
        what = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{path} is not a performance record: {field}: {what}; "
            "run `select-n profile` to make one",
            field=field,
        ) from error
