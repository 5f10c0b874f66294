"""The performance record as a file: what goes in comes out, and what is wrong is named."""

import json
from pathlib import Path

import pytest

from select_n_core.decisions.latency import StepShape
from select_n_core.errors import InputError, RecordMismatchError
from select_n_core.record import (
    ColdSample,
    ComputeSample,
    Fingerprint,
    HeldOutSample,
    ModeRecord,
    PerformanceRecord,
    TransferSample,
    load_record,
)

HERE = Fingerprint(
    device="a CPU",
    threads=2,
    torch="2.13.0",
    transformers="5.23.0",
    link_kind="emulated",
    link_bytes_per_s=1e9,
    link_latency_s=0.0,
    model="demo:tiny",
    model_hash="abc",
    dtype="float32",
)


def mode(threads: int, outside_s: float, cold: ColdSample | None) -> ModeRecord:
    sample = ComputeSample(
        decode_rows=1,
        context_tokens=64,
        prefill_tokens=0,
        prefill_pairs=0,
        chunks=0,
        rows=1,
        unit_s=0.001,
        outside_s=outside_s,
        variation=0.01,
        repeats=7,
    )
    return ModeRecord(
        threads=threads,
        samples=(sample,),
        cold=cold,
        token_grid=((1, 0.001), (256, 0.009)),
        per_context_token_s=1e-7,
        per_pair_s=1e-8,
        outside_s=outside_s,
        outside_per_row_s=1e-4,
        fit_error=0.02,
    )


HELD_OUT = HeldOutSample(
    decode_rows=4,
    context_tokens=800,
    prefill_tokens=50,
    prefill_pairs=1275,
    chunks=1,
    rows=5,
    k=2,
    slots=2,
    seconds=(0.010, 0.011, 0.012, 0.010),
    predicted_s=0.0084,
    noise=0.01,
)


def record(**changes) -> PerformanceRecord:
    facts = {
        "fingerprint": HERE,
        "static_bytes": 512,
        "unit_bytes": (1024, 2048, 1024),
        "kv_bytes_per_token": 24,
        "max_context": 512,
        "transfers": (TransferSample(direction="h2d", nbytes=2048, seconds=(0.002, 0.003)),),
        "transfer_s": 0.002,
        "streaming": mode(
            1, 0.004, ColdSample(streamed_extra_s=1e-4, stalled_extra_s=2e-4, stall_s=0.005)
        ),
        "resident": mode(2, 0.003, None),
        "held_out": (HELD_OUT,),
        "held_out_p95": HELD_OUT.error,
        "held_out_noise": HELD_OUT.noise,
        "seconds": 12.5,
    }
    return PerformanceRecord(**{**facts, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records" / "tiny.json"


def rewritten(path: Path, *steps: str | int, to: object) -> Path:
    """The saved record with one field replaced."""
    record().save(path)
    document = json.loads(path.read_text())
    inner = document
    for step in steps[:-1]:
        inner = inner[step]
    inner[steps[-1]] = to
    path.write_text(json.dumps(document))
    return path


def test_a_record_comes_back_as_it_was_saved(path):
    record().save(path)
    assert load_record(path) == record()
    assert [file.name for file in path.parent.iterdir()] == ["tiny.json"]


def test_a_model_never_measured_resident_comes_back_so(path):
    record(resident=None).save(path)
    assert load_record(path).latency_model().resident is None


def test_a_record_without_held_out_shapes_is_fine(path):
    record(held_out=(), held_out_p95=None, held_out_noise=None).save(path)
    assert load_record(path).held_out_p95 is None


def test_a_held_out_error_is_against_the_median_of_the_repeats():
    assert HELD_OUT.error == pytest.approx(0.2)
    assert HELD_OUT.shape() == StepShape(4, 800, 50, 1275, chunks=1)


def test_copies_are_predicted_as_they_are_beside_compute():
    slowed = TransferSample(
        direction="h2d", nbytes=2048, seconds=(0.002,), beside_compute_s=(0.002, 0.0022, 0.003)
    )
    assert record(transfers=(slowed,)).latency_model().transfer_s == pytest.approx(0.0022)
    assert record(transfers=(slowed,)).link_bytes_per_s == pytest.approx(2048 / 0.002)
    faster = slowed.model_copy(update={"beside_compute_s": (0.001,)})
    assert record(transfers=(faster,)).latency_model().transfer_s == 0.002


def test_units_take_their_measured_share_of_the_largest_units_time():
    large, small = (
        TransferSample(direction="h2d", nbytes=nbytes, seconds=(seconds,))
        for nbytes, seconds in ((2048, 0.002), (1024, 0.0015))
    )
    assert record(transfers=(large,)).latency_model().unit_shares == (0.5, 1.0, 0.5)
    assert record(transfers=(large, small)).latency_model().unit_shares == (0.75, 1.0, 0.75)


def test_saving_again_replaces_the_file(path):
    record().save(path)
    record(seconds=1.0).save(path)
    assert load_record(path).seconds == 1.0


def test_it_holds_the_latency_model_that_was_fitted():
    latency = record().latency_model()
    assert (latency.units, latency.transfer_s) == (3, 0.002)
    assert latency.streaming.stalled_extra_s == 2e-4
    assert latency.resident is not None
    assert latency.resident.streamed_extra_s == 0
    one = StepShape(decode_rows=1)
    assert latency.iteration_s(one, 0, 2) == pytest.approx(3 * 0.001 + 0.0031)
    assert latency.iteration_s(one, 3, 2) > latency.iteration_s(one, 0, 2)


def test_its_bandwidth_is_that_of_the_largest_unit():
    assert record().link_bytes_per_s == pytest.approx(2048 / 0.002)


def test_kv_blocks_are_whole_tokens_rounded_up_to_the_arenas_alignment():
    memory = record().memory(32)
    assert (memory.static_bytes, memory.unit_bytes) == (512, (1024, 2048, 1024))
    assert memory.kv_block_bytes == 768
    assert record(kv_bytes_per_token=25).memory(32).kv_block_bytes == 1024


def test_a_record_of_this_very_place_is_accepted():
    record().check(HERE, where="tiny.json")


@pytest.mark.parametrize("field", list(Fingerprint.model_fields))
def test_a_record_from_elsewhere_is_refused_naming_what_differs(field):
    other = getattr(HERE, field) * 2 if field != "link_latency_s" else 0.5
    there = HERE.model_copy(update={field: other})
    with pytest.raises(RecordMismatchError) as caught:
        record().check(there, where="tiny.json")
    assert caught.value.field == field
    assert str(caught.value) == (
        f"tiny.json: recorded with {field} = {getattr(HERE, field)!r}, here it is {other!r}; "
        "run `select-n profile` again on this machine"
    )


@pytest.mark.parametrize(
    ("steps", "value", "field"),
    [
        (("version",), 1, "version"),
        (("transfer_s",), "soon", "transfer_s"),
        (("transfer_s",), 0.0, "transfer_s"),
        (("transfer_s",), -0.002, "transfer_s"),
        (("transfer_s",), float("nan"), "transfer_s"),
        (("transfer_s",), float("inf"), "transfer_s"),
        (("transfers", 0, "seconds"), [], "transfers.0.seconds"),
        (("transfers", 0, "seconds"), [0.002, 0.0], "transfers.0.seconds.1"),
        (("transfers", 0, "seconds"), [float("nan")], "transfers.0.seconds.0"),
        (("transfers", 0, "beside_compute_s"), [-0.1], "transfers.0.beside_compute_s.0"),
        (("held_out", 0, "seconds"), [0.01, -0.01], "held_out.0.seconds.1"),
        (("held_out", 0, "seconds"), [0.01], "held_out.0.seconds"),
        (("held_out", 0, "predicted_s"), 0.0, "held_out.0.predicted_s"),
        (("held_out", 0, "noise"), float("nan"), "held_out.0.noise"),
        (("held_out_p95",), -0.1, "held_out_p95"),
        (("streaming", "samples", 0, "unit_s"), 0.0, "streaming.samples.0.unit_s"),
        (("streaming", "samples", 0, "unit_s"), float("nan"), "streaming.samples.0.unit_s"),
        (("streaming", "samples", 0, "outside_s"), -1.0, "streaming.samples.0.outside_s"),
        (("streaming", "per_part_s"), -1e-9, "streaming.per_part_s"),
        (("resident", "per_part_s"), float("inf"), "resident.per_part_s"),
        (("static_bytes",), -1, "static_bytes"),
        (("unit_bytes",), [], "unit_bytes"),
        (("unit_bytes",), [1024, 0], "unit_bytes.1"),
        (("kv_bytes_per_token",), 0, "kv_bytes_per_token"),
        (("max_context",), 0, "max_context"),
        (("colour",), "red", "colour"),
        (("streaming", "outside_s"), -1.0, "streaming.outside_s"),
        (("streaming", "outside_s"), float("nan"), "streaming.outside_s"),
        (("streaming", "per_pair_s"), -1e-9, "streaming.per_pair_s"),
        (("streaming", "token_grid"), [], "streaming.token_grid"),
        (("streaming", "token_grid"), [[8, 0.1], [1, 0.2]], "streaming.token_grid"),
        (("streaming", "token_grid"), [[1, 0.2], [8, 0.1]], "streaming.token_grid"),
        (("streaming", "token_grid"), [[1, -0.2], [8, 0.1]], "streaming.token_grid.0.1"),
        (("streaming", "cold", "stall_s"), 0.0, "streaming.cold.stall_s"),
        (("streaming", "cold", "streamed_extra_s"), -1.0, "streaming.cold.streamed_extra_s"),
        (("fingerprint", "threads"), None, "fingerprint.threads"),
        (("fingerprint",), None, "fingerprint"),
    ],
)
def test_a_broken_field_is_named_with_the_mend(path, steps, value, field):
    with pytest.raises(InputError, match="is not a performance record") as caught:
        load_record(rewritten(path, *steps, to=value))
    assert caught.value.field == field
    assert f": {field}: " in str(caught.value)
    assert "run `select-n profile` to make one" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(path):
    record().save(path)
    document = json.loads(path.read_text())
    del document["streaming"]["samples"]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"streaming\.samples: Field required"):
        load_record(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "not json", '"text"'])
def test_what_is_no_record_at_all_is_refused(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(InputError, match="is not a performance record: record: "):
        load_record(path)


def test_a_truncated_file_is_refused(path):
    record().save(path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(InputError, match="is not a performance record"):
        load_record(path)


def test_bytes_that_are_no_text_are_refused(path):
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InputError, match="is not a performance record"):
        load_record(path)


def test_a_file_that_is_not_there_is_said_so(path):
    with pytest.raises(InputError, match=r"cannot read the record .*tiny\.json: No such file"):
        load_record(path)
