"""Two models on one node whose load moves: mirrors, leases and mapped bytes move after it."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from recorded import record
from server import Server, serving
from tiny import save_tiny

from select_n_core.memory.audit import mapped_files
from select_n_core.memory.domain import find_domain
from select_n_core.memory.ledger import Ledger
from select_n_core.memory.ledger_file import read_ledger

pytestmark = pytest.mark.timeout(300)

UNIT_BYTES = 1 << 16
FLOOR, WANTED = 4, 12  # mirrors that one cannot serve without, and that it gains by
BUDGET = 6 * 2 * WANTED // 10 * UNIT_BYTES  # 60% of what both want
LENT = BUDGET // UNIT_BYTES - FLOOR  # to the one that is loaded, while the other is idle
CLIENTS = 8
DEADLINE_S = 60.0


def document(directory) -> dict:
    """Paced: twelve units of which eight have homes; each one more that is streamed frees KV."""
    source = save_tiny(directory / "model")
    models = []
    for name in ("one", "other"):
        path = directory / f"{name}.json"
        made = record(12, unit_s=8e-3, outside_s=4e-3, transfer_s=4e-3, unit_bytes=UNIT_BYTES)
        fingerprint = made.fingerprint.model_copy(update={"model": name})
        made.model_copy(update={"fingerprint": fingerprint}).save(path)
        models.append(
            {
                "name": name,
                "source": str(source),
                "device_memory": "768KiB",
                "host_memory": "1MiB",
                "link": {"kind": "emulated", "bandwidth": UNIT_BYTES / 4e-3},
                "slo": {"tpot": "150ms", "ttft": "2s"},
                "compute": {"kind": "paced", "record": str(path)},
                "max_step_tokens": 256,
                "workload": {"prompt_tokens": 184, "output_tokens": 8},
            }
        )
    policy = {"budgets": {"host_memory": f"{BUDGET}B"}}
    return {
        "proxy_location": "HeadOnly",
        "applications": [
            {
                "name": "control",
                "route_prefix": None,
                "import_path": "deployments.control.app:build_app",
                "deployments": [{"name": "ClusterController", "user_config": policy}],
            },
            {
                "name": "serve",
                "route_prefix": "/",
                "import_path": "deployments.app:build_app",
                "args": {"models": models},
            },
        ],
    }


class Node:
    """What the server does, as its ingress, its ledger and the kernel say."""

    def __init__(self, server: Server, directory) -> None:
        self._server = server
        self._runtime = directory / "run" / f"select-n-{os.geteuid()}"

    def ledger(self) -> Ledger:
        return read_ledger(find_domain(), self._runtime)

    def mapped(self) -> dict[str, int]:
        """Bytes of mirrors that the kernel maps, by model."""
        return {
            each.name: sum(found.nbytes for found in mapped_files(each.pid).values())
            for each in self.ledger().holders
            if each.floor_bytes
        }

    def cluster(self) -> dict:
        return httpx.get(f"{self._server.url}/cluster", timeout=30).json()

    @contextlib.contextmanager
    def loaded(self, model: str) -> Iterator[None]:
        """Clients that send one request after the other."""
        ended = threading.Event()
        body = {"model": model, "prompt": [7] * 184, "max_tokens": 8, "ignore_eos": True}

        def client() -> None:
            with httpx.Client(base_url=self._server.url, timeout=60) as http:
                while not ended.is_set():
                    answer = http.post("/v1/completions", json=body)
                    assert answer.status_code in (200, 429), answer.text

        clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for each in clients:
            each.start()
        try:
            yield
        finally:
            ended.set()
            for each in clients:
                each.join()


class Watch(threading.Thread):
    """Looks again and again whether more is held or mapped than there may be."""

    def __init__(self, node: Node) -> None:
        super().__init__(daemon=True)
        self._node = node
        self._ended = threading.Event()
        self.looks = self.most_used = self.most_mapped = 0

    def run(self) -> None:
        while not self._ended.wait(0.05):
            self.most_used = max(self.most_used, self._node.ledger().used_bytes)
            self.most_mapped = max(self.most_mapped, sum(self._node.mapped().values()))
            self.looks += 1

    def end(self) -> None:
        self._ended.set()
        self.join()


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lending")
    (directory / "run").mkdir()
    environment = {
        "SELECT_N_CACHE": str(directory / "cache"),
        "XDG_RUNTIME_DIR": str(directory / "run"),
    }
    with serving(document(directory), directory, **environment) as server:
        yield Node(server, directory)


def eventually(holds, what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline_s, what


def moved_in_s(node: Node, to: str, off: str) -> float:
    """Until k, leases and mapped bytes are as the load wants them; seconds."""
    began_s = time.monotonic()
    while True:
        replicas = {each["model"]: each for each in node.cluster()["replicas"]}
        has = (
            replicas[to]["mirrored"] == replicas[to]["k_most"] == LENT
            and replicas[to]["k"] > FLOOR
            and replicas[to]["lease_bytes"] == LENT * UNIT_BYTES
            and replicas[off]["lease_bytes"] == FLOOR * UNIT_BYTES
            and node.mapped() == {to: LENT * UNIT_BYTES, off: FLOOR * UNIT_BYTES}
        )
        took_s = time.monotonic() - began_s
        if has:
            return took_s
        assert took_s < DEADLINE_S, (replicas, node.mapped(), node.cluster()["domains"])


def test_memory_follows_the_load_and_is_never_above_the_budget(node, record_property):
    eventually(lambda: sum(node.mapped().values()) == BUDGET, "what nobody needs is lent too")
    watch = Watch(node)
    watch.start()
    with node.loaded("one"):
        first_s = moved_in_s(node, "one", "other")
    with node.loaded("other"):
        then_s = moved_in_s(node, "other", "one")
        (domain,) = node.cluster()["domains"]
    watch.end()
    record_property("first_s", first_s)
    record_property("then_s", then_s)
    print(f"lent in {first_s:.2f} s, moved in {then_s:.2f} s, {watch.looks} looks")
    assert watch.looks > 10
    assert max(watch.most_used, watch.most_mapped) <= BUDGET
    assert domain["capacity_bytes"] == BUDGET
    assert domain["late_revocations"] == 0
    held = {each["name"]: each["held_bytes"] for each in domain["holders"]}
    assert held == {"other": LENT * UNIT_BYTES, "one": FLOOR * UNIT_BYTES}


def test_the_audit_finds_every_byte_of_every_process(node, tmp_path_factory):
    shown = subprocess.run(
        [sys.executable, "-m", "deployments.cli.main", "audit", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"XDG_RUNTIME_DIR": str(node._runtime.parent)},
    )
    told = json.loads(shown.stdout)
    assert told["agrees"]
    (domain,) = told["domains"]
    by_name = {each["name"]: each for each in domain["processes"]}
    assert set(by_name) == {"one", "other"}
    for each in by_name.values():
        assert each["reserved_bytes"] == each["mapped_bytes"] > 0
