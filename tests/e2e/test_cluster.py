"""examples/cluster.yaml as a user runs it, with a tiny model: one controller, two replicas."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from server import serving
from tiny import save_tiny

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cluster")
    document = yaml.safe_load((ROOT / "examples" / "cluster.yaml").read_text())
    [serve] = [each for each in document["applications"] if each["name"] == "serve"]
    [model] = serve["args"]["models"]
    model |= {
        "source": str(save_tiny(directory / "model")),
        "dtype": "float32",
        "interval": 2,
        "link": {"kind": "emulated", "bandwidth": "10GB/s", "bus": {"name": "shared"}},
    }
    (directory / "run").mkdir()  # of a ledger that no other server on this machine shares
    environment = {
        "SELECT_N_CACHE": str(directory / "cache"),
        "XDG_RUNTIME_DIR": str(directory / "run"),
    }
    with serving(document, directory, **environment) as running:
        yield running


def status(server) -> dict:
    shown = subprocess.run(
        [sys.executable, "-m", "deployments.cli.main", "status", "--url", server.url, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(shown.stdout)


def eventually(server, holds) -> dict:
    deadline = time.monotonic() + 30
    while not holds(told := status(server)):
        assert time.monotonic() < deadline, told
    return told


def test_the_controller_knows_both_replicas_and_what_they_hold(server):
    told = eventually(server, lambda told: told["controller"] and len(told["replicas"]) == 2)
    assert told["controller"]["policy_version"] == 1
    [node] = told["nodes"]
    assert node["budget_bytes"] == 1 << 30
    first, second = told["replicas"]
    for replica in (first, second):
        assert (replica["interval"], replica["bus"]) == (2.0, "shared")
        assert 0 < replica["mirrored_bytes"] <= replica["lease_bytes"]
        assert replica["k_min"] <= replica["k"] <= replica["k_most"] <= replica["mirrored"]
    # Both hold the same mirrors: they are charged once.
    assert node["mirrored_bytes"] == first["mirrored_bytes"]
    assert node["lease_bytes"] == first["lease_bytes"] + second["lease_bytes"]


def test_both_are_one_holder_of_the_host_memory_that_they_share(server):
    def is_shared(told: dict) -> bool:
        holders = [each for domain in told["domains"] for each in domain["holders"]]
        return [len(each["replicas"]) for each in holders] == [2]

    told = eventually(server, is_shared)
    [domain] = told["domains"]
    [holder] = domain["holders"]
    assert domain["capacity_bytes"] == 1 << 30
    assert domain["held_bytes"] == holder["held_bytes"] == holder["floor_bytes"] > 0
    assert domain["free_bytes"] == (1 << 30) - holder["held_bytes"]
    assert {each["reserved_bytes"] for each in told["replicas"]} == {holder["held_bytes"]}


def test_what_was_served_is_counted_and_timed_against_its_targets(server):
    body = {"model": "smollm2-135m-instruct", "prompt": "the", "max_tokens": 8, "ignore_eos": True}
    for _ in range(3):
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).is_success
    told = eventually(server, lambda told: sum(each["admitted"] for each in told["replicas"]) == 3)
    served = [each for each in told["replicas"] if each["admitted"]]
    for replica in served:
        assert replica["tpot_p95_s"] > 0
        assert replica["ttft_p95_s"] > 0
        assert (replica["tpot_target_s"], replica["ttft_target_s"]) == (0.1, 2.0)


def test_a_policy_is_taken_while_it_serves_and_restarts_nothing(server):
    before = status(server)
    document = yaml.safe_load(server.path.read_text())
    [control] = [each for each in document["applications"] if each["name"] == "control"]
    control["deployments"][0]["user_config"]["budgets"] = {"host_memory": "2GiB"}
    server.path.write_text(yaml.safe_dump(document))
    server.process.send_signal(signal.SIGUSR1)
    told = eventually(server, lambda told: told["nodes"][0]["budget_bytes"] == 2 << 30)
    assert told["controller"]["policy_version"] == before["controller"]["policy_version"] + 1
    assert told["controller"]["epoch"] == before["controller"]["epoch"]
    assert {each["replica"] for each in told["replicas"]} == {
        each["replica"] for each in before["replicas"]
    }


def test_ctrl_c_ends_the_controller_too(server):
    assert server.stop() == 0
