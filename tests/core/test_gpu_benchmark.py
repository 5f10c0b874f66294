"""Every section of the GPU benchmark runs here too, over the emulated link and a tape of graphs."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from fake_graphs import TapeGraphs

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import gpu
from benchmarks.gpu_law import ks_of

pytestmark = pytest.mark.slow


def run(out, *arguments, graphs=None):
    gpu.main(
        ["--link", "emulated", "--iterations", "2", "--out", str(out), *arguments], graphs=graphs
    )
    return json.loads(out.read_text())


def test_all_sections_are_measured_in_one_run(tmp_path):
    found = run(tmp_path / "gpu.json", "--models", "tiny", "--budget", "200s", graphs=TapeGraphs)
    assert found["skipped"] == []
    assert found["link"] == "emulated"
    assert found["floor"][0]["models"][0]["launches_per_layer"] > 10
    parity = found["parity"][0]
    assert parity["all_equal"]
    assert {run["graphs"] for run in parity["runs"]} == {"off", "all"}
    assert {point["direction"] for point in found["links"][0]["points"]} == {"h2d", "d2h"}
    assert [part["d"] for part in found["law"]] == [2, 1, 3]
    for part in found["law"]:
        assert part["skipped_k"] == []
        assert part["replays"] > 0
        assert part["capture_refused"] is None
        for mode in part["modes"]:
            assert [point["k"] for point in mode["points"]] == ks_of(6) == [1, 2, 3, 6]
            assert all(point["measured_s"] > 0 for point in mode["points"])
            assert mode["c_s"] * 6 + mode["g_s"] == pytest.approx(mode["resident_s"])
    lease = found["leases"][0]
    assert lease["mirrored"] == [1, 3]
    assert lease["host_bytes"][1] == 3 * lease["host_bytes"][0]
    assert lease["offer"]["iterations"] >= 2
    together = found["bus"][0]
    assert len(together["replicas"]) == 2
    assert all(each["iterations"] >= 2 for each in together["replicas"])
    assert all(0 < each["mean_k"] <= 6 for each in together["replicas"])
    assert 0 < together["moved_bytes_per_s"] <= 2e9 * 1.1
    assert together["share"] > 0
    peers = {part["peer"]: part for part in found["peers"]}
    assert peers["accelerate"]["cpu_offload"]["iteration_s"] > 0
    assert peers["flexgen"]["status"] == "serves OPT only"
    assert found["provenance"]["versions"]["torch"]


def test_a_budget_that_ends_names_what_it_did_not_reach(tmp_path):
    found = run(tmp_path / "gpu.json", "--models", "tiny-opt", "--budget", "0.1s")
    assert {each["section"] for each in found["skipped"]} >= {"law", "leases", "peers"}
    assert "law" not in found


def test_a_section_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    out = tmp_path / "gpu.json"
    with (
        patch.object(gpu, "law", side_effect=RuntimeError("no such luck")),
        patch.dict(sys.modules, {"accelerate": None}),
        pytest.raises(SystemExit),
    ):
        run(out, "--models", "tiny-opt", "--budget", "100s")
    found = json.loads(out.read_text())
    assert found["law"][0]["error"] == "RuntimeError: no such luck"
    assert found["leases"][0]["revoke"]["iterations"] >= 1
    assert [part["status"] for part in found["peers"]] == ["not installed", "not installed"]
