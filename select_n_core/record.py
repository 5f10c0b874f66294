"""The performance record: what the offline stage measured, one versioned JSON file.

It holds the samples, the coefficients fitted to them and a fingerprint of hardware, software and
model. A record is refused where its fingerprint does not match, with the differing field named.
"""

from __future__ import annotations

import statistics
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

from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
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
    """Times of copies of one size in one direction.

    Attributes:
        seconds: every repeat, alone on an idle machine.
        beside_compute_s: the same copies while units compute; empty where that was not measured.
    """

    direction: Literal["h2d", "d2h"]
    nbytes: PositiveInt
    seconds: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    beside_compute_s: tuple[PositiveFloat, ...] = ()

    @property
    def alone_s(self) -> float:
        """Median copy of an idle machine."""
        return statistics.median(self.seconds)

    @property
    def compute_slowdown(self) -> float:
        """Share by which compute lengthens a copy."""
        if not self.beside_compute_s:
            return 0.0
        return max(0.0, statistics.median(self.beside_compute_s) / self.alone_s - 1)


class _ShapeSample(_Frozen):
    decode_rows: NonNegativeInt
    context_tokens: NonNegativeInt
    prefill_tokens: NonNegativeInt
    prefill_pairs: NonNegativeInt
    chunks: NonNegativeInt = 0
    rows: PositiveInt

    def shape(self) -> StepShape:
        """What was computed."""
        return StepShape(
            decode_rows=self.decode_rows,
            context_tokens=self.context_tokens,
            prefill_tokens=self.prefill_tokens,
            prefill_pairs=self.prefill_pairs,
            chunks=self.chunks,
        )


class ComputeSample(_ShapeSample):
    """One shape's times.

    Attributes:
        decode_rows, context_tokens, prefill_tokens, prefill_pairs, chunks: see `StepShape`.
        rows: rows of logits.
        unit_s: seconds per unit at home, mean of the middle half of the repeats.
        outside_s: g, mean of the same.
        variation: coefficient of variation of the whole pass over the repeats.
        repeats: passes measured.
    """

    unit_s: PositiveFloat
    outside_s: NonNegativeFloat
    variation: NonNegativeFloat
    repeats: PositiveInt


class StreamedSample(_ShapeSample):
    """A shape measured with `k` units streamed.

    Attributes:
        decode_rows, context_tokens, prefill_tokens, prefill_pairs, chunks: see `StepShape`.
        rows: rows of logits.
        seconds: of every repeat, a whole step.
    """

    k: NonNegativeInt
    slots: PositiveInt
    seconds: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]

    @property
    def typical_s(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.seconds)


class HeldOutSample(StreamedSample):
    """A shape that the fit never saw, at some `k`, and its prediction.

    Attributes:
        decode_rows, context_tokens, prefill_tokens, prefill_pairs, chunks: see `StepShape`.
        rows, seconds: see `StreamedSample`.
        predicted_s: by the fitted model.
        noise: split-half: by how much medians of two halves of the repeats differ.
    """

    seconds: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)]
    predicted_s: PositiveFloat
    noise: NonNegativeFloat

    @property
    def error(self) -> float:
        """Of the prediction against the median."""
        return abs(self.predicted_s / self.typical_s - 1)


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
    per_part_s: NonNegativeFloat = 0.0
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
            per_part_s=self.per_part_s,
        )


class PerformanceRecord(_Frozen):
    """Everything the planner needs to know about a model on a machine.

    Attributes:
        static_bytes, unit_bytes: device and mirror sizes.
        kv_bytes_per_token: all layers, K and V.
        max_context: positions the model was made for.
        transfers: of every size of unit, both directions.
        transfer_s: t, median copy of the largest unit to the device, alone.
        streamed: steps of the grid with units streamed; `streaming.cold` is fitted to them.
        held_out: shapes kept from the fit, to judge it; none after a brief measurement.
        held_out_p95: of their errors. held_out_noise: P95 of their split-half noise.
        seconds: what measuring took.
    """

    version: Literal[2] = 2
    fingerprint: Fingerprint
    static_bytes: NonNegativeInt
    unit_bytes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    kv_bytes_per_token: PositiveInt
    max_context: PositiveInt
    transfers: tuple[TransferSample, ...]
    transfer_s: PositiveFloat
    streaming: ModeRecord
    resident: ModeRecord | None
    streamed: tuple[StreamedSample, ...] = ()
    held_out: tuple[HeldOutSample, ...] = ()
    held_out_p95: NonNegativeFloat | None = None
    held_out_noise: NonNegativeFloat | None = None
    seconds: PositiveFloat

    @property
    def link_bytes_per_s(self) -> float:
        """Measured host-to-device bandwidth for the largest unit."""
        return max(self.unit_bytes) / self.transfer_s

    def latency_model(self) -> LatencyModel:
        """The latency model fitted to the samples; its copies run beside compute."""
        largest = self._to_device(max(self.unit_bytes))
        slowdown = 0.0 if largest is None else largest.compute_slowdown
        return LatencyModel(
            units=len(self.unit_bytes),
            transfer_s=self.transfer_s * (1 + slowdown),
            streaming=self.streaming.compute_model(),
            resident=None if self.resident is None else self.resident.compute_model(),
            unit_shares=self._unit_shares(),
        )

    def _to_device(self, nbytes: int) -> TransferSample | None:
        copies = (each for each in self.transfers if each.direction == "h2d")
        return next((each for each in copies if each.nbytes == nbytes), None)

    def _unit_shares(self) -> tuple[float, ...]:
        """Time of every unit against the largest: as measured, else by bytes."""
        largest = max(self.unit_bytes)
        if min(self.unit_bytes) == largest:
            return ()
        measured = {nbytes: self._to_device(nbytes) for nbytes in set(self.unit_bytes)}
        shares = {
            nbytes: nbytes / largest if sample is None else sample.alone_s / self.transfer_s
            for nbytes, sample in measured.items()
        }
        return tuple(min(1.0, shares[nbytes]) for nbytes in self.unit_bytes)

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
