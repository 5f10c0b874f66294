"""`/cluster` and `select-n status`: what they show, with a controller and without."""

import asyncio
import io
import json
import socket

import pytest
from reports import report
from rich.console import Console
from standins import MODEL, ScriptedEngine, serving

from deployments.cli import status
from deployments.cli.status import tables
from deployments.control.cache import SnapshotCache
from deployments.control.memory import DomainFacts, HolderFacts
from deployments.control.messages import Snapshot
from deployments.control.view import cluster_document
from select_n_core.live import parse_policy

POLICY = parse_policy({"budgets": {"host_memory": "1MiB"}})


LATE = HolderFacts("a-model", ("a", "b"), 5, 1 << 20, 6 << 20, 0, 2 << 20, 8 << 20, is_late=True)
STRANGER = HolderFacts("a-stranger", (), None, 0, 3 << 20, 0, 0, None, is_late=False)
DOMAIN = DomainFacts("d", ("node-1",), 16 << 20, 9 << 20, 7 << 20, (LATE, STRANGER))


def snapshot(*reports, policy=POLICY) -> Snapshot:
    replicas = {each.replica: each for each in reports}
    return Snapshot(4, 17, 2, policy, replicas, memory=(DOMAIN,))


def document(*reports) -> dict:
    return cluster_document(snapshot(*reports), age_s=0.25, now_s=10.0)


class Told:
    """A controller that says the same to everybody."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    async def watch(self, known, timeout_s):
        from deployments.control.messages import Changes

        if known == self._snapshot.known:
            await asyncio.Event().wait()
        return Changes(
            epoch=self._snapshot.epoch,
            version=self._snapshot.version,
            whole=True,
            settled=True,
            policy_version=self._snapshot.policy_version,
            policy=self._snapshot.policy,
            memory=self._snapshot.memory,
            reports=tuple(self._snapshot.replicas.values()),
        )


@pytest.fixture
def url(text):
    """An ingress without a controller, and one replica."""
    with serving(ScriptedEngine(text, "ok"), text) as url:
        yield url


def test_the_document_tells_every_replica_with_its_age_and_latencies():
    [replica] = document(report("a", measured_at_s=9.5))["replicas"]
    assert replica["feedback_age_s"] == 0.5
    assert replica["interval"] == 30 / 8
    assert (replica["k_min"], replica["k"], replica["k_most"]) == (2, 8, 10)
    assert replica["tpot_p95_s"] == pytest.approx(0.075)
    assert replica["ttft_p95_s"] is None
    assert replica["returned"] == {"kv": 2}
    json.dumps(replica)


def test_replicas_of_a_model_share_a_nodes_mirrors_and_each_has_its_lease():
    told = document(
        report("a", lease_bytes=1000, mirrored_bytes=700),
        report("b", lease_bytes=500, mirrored_bytes=400),
        report("c", model="other", lease_bytes=50, mirrored_bytes=50),
        report("d", node="node-2", lease_bytes=9, mirrored_bytes=8),
    )
    first, second = told["nodes"]
    assert first == {
        "node": "node-1",
        "replicas": 3,
        "budget_bytes": 1 << 20,
        "lease_bytes": 1550,
        "mirrored_bytes": 750,
    }
    assert (second["node"], second["lease_bytes"]) == ("node-2", 9)


def test_the_document_tells_who_holds_host_memory_and_what_is_late():
    (domain,) = json.loads(json.dumps(document()))["domains"]
    assert domain["nodes"] == ["node-1"]
    assert (domain["capacity_bytes"], domain["free_bytes"]) == (16 << 20, 7 << 20)
    assert domain["late_revocations"] == 1
    late, stranger = domain["holders"]
    assert (late["revoked_bytes"], late["wanted_bytes"]) == (2 << 20, 8 << 20)
    assert late["replicas"] == ["a", "b"]
    assert stranger["wanted_bytes"] is None


def test_the_table_shows_every_holder_of_host_memory():
    console = Console(file=io.StringIO(), width=160)
    console.print(tables(document()))
    shown = console.file.getvalue().splitlines()
    [late] = [line for line in shown if "a-model" in line]
    assert late.split() == [
        "node-1",
        "16",
        "MiB",
        "7",
        "MiB",
        "a-model",
        "2",
        "5",
        "1",
        "MiB",
        "6",
        "MiB",
        "0",
        "B",
        "2",
        "MiB",
        "8",
        "MiB",
    ]
    [stranger] = [line for line in shown if "a-stranger" in line]
    assert stranger.split() == [
        "a-stranger",
        "0",
        "-",
        "0",
        "B",
        "3",
        "MiB",
        "0",
        "B",
        "0",
        "B",
        "-",
    ]


def test_the_document_tells_which_controller_said_so_and_when():
    assert document()["controller"] == {
        "epoch": 4,
        "version": 17,
        "policy_version": 2,
        "age_s": 0.25,
    }


async def test_the_ingress_answers_from_its_snapshot(text):
    import httpx
    from standins import LocalBackend, args, replica, soon

    from deployments.http.api import create_api

    cache = SnapshotCache(Told(snapshot(report("far", node="elsewhere"))))
    watching = asyncio.create_task(cache.run())
    backends = {MODEL: LocalBackend(replica(ScriptedEngine(text, "ok"), text))}
    api = create_api(backends, args(), cluster=cache)

    async def is_heard() -> bool:
        return cache.snapshot is not None

    await soon(is_heard)
    watching.cancel()
    transport = httpx.ASGITransport(api)
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
        told = (await client.get("/cluster")).json()
    assert told["controller"]["epoch"] == 4
    assert [each["replica"] for each in told["replicas"]] == ["far"]
    assert [each["domain"] for each in told["domains"]] == ["d"]


def test_without_a_controller_the_replicas_themselves_are_asked(cli, url):
    code, out, _ = cli("status", "--url", url, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["controller"] is None
    assert [each["replica"] for each in told["replicas"]] == ["replica-1"]
    assert told["replicas"][0]["model"] == MODEL


def test_off_a_terminal_the_status_is_shown_once(cli, url):
    code, out, _ = cli("status", "--url", url)
    assert code == 0
    assert "no controller" in out
    assert "replica-1" in out


def test_the_table_shows_what_is_promised_beside_what_was_seen():
    console = Console(file=io.StringIO(), width=160)
    console.print(tables(document(report("late", tpot_headroom=-0.5, ttft_headroom=0.5))))
    shown = console.file.getvalue()
    assert "epoch 4, policy 2, heard 0.2 s ago" in shown
    assert "1 MiB" in shown
    [line] = [line for line in shown.splitlines() if "late" in line]
    for cell in ("3.75", "8 of 2-10", "150/100", "1000/2000", "1+0", "50%"):
        assert cell in line


def test_a_model_whose_compute_is_paced_is_called_so():
    shown = io.StringIO()
    told = document(report(model="dry"), report("b", model="dry-run", compute_kind="paced"))
    Console(file=shown, width=200).print(tables(told))
    assert "dry-run (paced)" in shown.getvalue()
    assert shown.getvalue().count("paced") == 1


def test_on_a_terminal_it_is_shown_again_and_again_until_ctrl_c(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    told = [document(report("a", admitted=count)) for count in (41, 42, 43)]

    def fetch(*_):
        if not told:
            raise KeyboardInterrupt
        return told.pop(0)

    monkeypatch.setattr(status, "fetch", fetch)
    monkeypatch.setattr(status, "Console", lambda: console)
    monkeypatch.setattr(status, "_REFRESH_S", 0)
    status.watch("http://127.0.0.1:1", None)
    shown = console.file.getvalue()
    assert [count for count in ("41", "42", "43") if count in shown] == ["41", "42", "43"]


def test_where_nothing_answers_it_is_one_line_and_exit_code_2(cli):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code, out, err = cli("status", "--url", f"http://127.0.0.1:{port}", "--json")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert f"no select-n answers at http://127.0.0.1:{port}" in err
    assert "--url" in err


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1", "http://"])
def test_an_address_that_is_none_is_one_line_and_exit_code_2(cli, url):
    code, _, err = cli("status", "--url", url)
    assert code == 2
    assert len(err.splitlines()) == 1


def test_a_refusal_is_shown_with_its_reason(cli, url):
    code, _, err = cli("status", "--url", f"{url}/v1/models/nobody")
    assert code == 2
    assert "404" in err
    assert "no model" in err
