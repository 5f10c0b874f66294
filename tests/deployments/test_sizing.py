"""What a replica claims of its node's memory: the least that any plan takes."""

import json
from pathlib import Path

import pytest
from recorded import record
from standins import args

from deployments.sizing import actor_options, least_host_bytes
from select_n_core.models import demo

MIB = 1 << 20


def weights(directory: Path, *shapes: tuple[int, ...], broken: bool = False) -> str:
    """A checkpoint of float32 tensors, of which only the header is there."""
    header = {f"t{at}": {"dtype": "F32", "shape": shape} for at, shape in enumerate(shapes)}
    said = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    directory.mkdir(parents=True)
    length = len(said) + (1 << 30 if broken else 0)
    (directory / "model.safetensors").write_bytes(length.to_bytes(8, "little") + said)
    return str(directory)


def least(source: str, link: str = "cuda", **facts: object) -> int:
    links = {"cuda": {"kind": "cuda"}, "emulated": {"kind": "emulated", "bandwidth": "1GB/s"}}
    common = {"device_memory": "8MiB", "host_memory": "64MiB", "dtype": "float32"}
    [model] = args(source=source, link=links[link], **common | facts).models
    return least_host_bytes(model)


@pytest.fixture
def source(tmp_path) -> str:
    """20 MiB in float32."""
    return weights(tmp_path / "model", (1024, 1024), (4, 1024, 1024))


def test_what_the_device_has_no_place_for_is_claimed(source):
    assert least(source) == 12 * MIB
    assert least(source, dtype="bfloat16") == 2 * MIB
    assert least(source, device_memory="32MiB") == 0


def test_host_kv_and_an_emulated_device_are_claimed_too(source):
    assert least(source, host_kv="5MiB") == 17 * MIB
    assert least(source, link="emulated") == 20 * MIB


def test_no_more_is_claimed_than_the_replica_may_have(source):
    assert least(source, host_memory="6MiB", host_kv="1MiB") == 6 * MIB


@pytest.mark.parametrize("there", ["owner/name", "broken", "demo:nothing"])
def test_of_weights_that_are_not_known_here_nothing_is_claimed(tmp_path, there):
    source = weights(tmp_path / "m", (1 << 30,), broken=True) if there == "broken" else there
    assert least(source) == 0


def test_a_demo_that_is_converted_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "cache_directory", lambda name: tmp_path / name)
    directory = demo.directory_of("smollm2-135m-instruct")
    assert least("demo:smollm2-135m-instruct") == 0
    weights(directory, (5, 1024, 1024))
    assert least("demo:smollm2-135m-instruct") == 12 * MIB


def test_paced_compute_takes_its_records_weights_and_no_arena(tmp_path):
    path = tmp_path / "record.json"
    record(units=10, unit_bytes=2 * MIB).save(path)
    paced = {"kind": "paced", "record": str(path)}
    assert least("nobody/nothing", link="emulated", compute=paced) == 12 * MIB + 1024


def test_it_is_claimed_as_rays_own_memory(source):
    common = {"device_memory": "8MiB", "host_memory": "64MiB", "dtype": "float32"}
    [model] = args(source=source, link={"kind": "cuda"}, **common).models
    assert actor_options(model) == {"num_cpus": 1.0, "num_gpus": 1.0, "memory": 12 * MIB}
