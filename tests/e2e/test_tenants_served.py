"""Tenants as they are used: keys from `select-n key`, a policy that is changed while it serves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import yaml
from server import Server, serving
from tiny import save_tiny

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"

pytestmark = pytest.mark.timeout(300)


class Tenants:
    """A server whose policy and keys a test changes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.keys_file = directory / "keys.yaml"
        self.keys: dict[str, str] = {}
        self.lines: dict[str, str] = {}
        self.document = yaml.safe_load((ROOT / "examples" / "cluster.yaml").read_text())
        for application in self.document["applications"]:
            if application["name"] == "serve":
                [model] = application["args"]["models"]
            else:
                [self.controller] = application["deployments"]
        model |= {
            "source": str(save_tiny(directory / "model")),
            "dtype": "float32",
            "interval": 2,
            "link": {"kind": "emulated", "bandwidth": "10GB/s"},
            "slo": {"tpot": "1s", "ttft": "10s"},
        }
        self.server: Server | None = None

    def key(self, name: str) -> None:
        """Make a key of the tenant, as an administrator does."""
        made = subprocess.run(
            [sys.executable, "-m", "deployments.cli.main", "key", name],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        self.keys[name], self.lines[name] = made.stdout.splitlines()
        self.open(*self.keys)

    def open(self, *names: str) -> None:
        """Let these in."""
        written = self.keys_file.with_suffix(".new")
        written.write_text("".join(f"{self.lines[name]}\n" for name in names))
        written.replace(self.keys_file)

    def policy(self, *tenants: dict) -> None:
        """The tenants from the next deployment on."""
        self.controller["user_config"] |= {
            "classes": {"interactive": {"tpot": "1s", "ttft": "10s"}},
            "keys_file": str(self.keys_file),
            "tenants": list(tenants),
        }

    def deploy(self) -> None:
        """Let the server take the policy of the changed file."""
        self.server.path.write_text(yaml.safe_dump(self.document))
        self.server.process.send_signal(signal.SIGUSR1)

    def client(self, name: str) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.server.url}/v1", api_key=self.keys[name], max_retries=0, timeout=60
        )

    def complete(self, name: str) -> str:
        """How a request of the tenant ends: `ok`, or the error's code."""
        try:
            self.client(name).completions.create(model=MODEL, prompt="the", max_tokens=2)
        except openai.APIStatusError as error:
            return str(error.code)
        return "ok"

    def replicas(self) -> set[int]:
        """Processes of replicas, ingresses and the controller."""
        return {
            process.pid
            for process in self.server.family()
            if "ServeReplica" in " ".join(process.cmdline())
        }


@pytest.fixture(scope="module")
def tenants(tmp_path_factory):
    made = Tenants(tmp_path_factory.mktemp("tenants"))
    for name in ("acme", "zeta"):
        made.key(name)
    made.policy({"name": "acme", "admin": True})
    cache = str(made.directory / "cache")
    with serving(made.document, made.directory, SELECT_N_CACHE=cache) as made.server:
        yield made


def changes(tenants: Tenants, name: str, before: str, after: str) -> None:
    """Wait until requests of the tenant end otherwise, and in no third way until then."""
    ends = [tenants.complete(name)]
    while ends[-1] == before and len(ends) < 500:
        ends.append(tenants.complete(name))
    assert ends[-1] == after, ends[-3:]


def test_who_has_a_key_is_served_and_nobody_else(tenants):
    assert tenants.complete("acme") == "ok"
    assert tenants.complete("zeta") == "invalid_api_key"
    assert any("Authorization: Bearer KEY" in line for line in tenants.server.lines)


def test_a_policy_that_is_changed_holds_without_a_restart(tenants):
    before = tenants.replicas()
    assert before
    tenants.policy({"name": "acme", "admin": True}, {"name": "zeta", "requests_per_minute": 3})
    tenants.deploy()
    changes(tenants, "zeta", "invalid_api_key", "ok")
    changes(tenants, "zeta", "ok", "rate_limit_exceeded")
    assert tenants.complete("acme") == "ok"
    tenants.policy({"name": "acme", "admin": True}, {"name": "zeta"})
    tenants.deploy()
    changes(tenants, "zeta", "rate_limit_exceeded", "ok")
    assert tenants.replicas() == before


def test_a_key_that_is_taken_away_opens_nothing_from_then_on(tenants):
    tenants.open("zeta")
    assert tenants.complete("acme") == "invalid_api_key"
    tenants.open("acme", "zeta")
    assert tenants.complete("acme") == "ok"


def test_status_wants_an_admins_key(tenants):
    def status(name: str) -> subprocess.CompletedProcess:
        url = ["--url", tenants.server.url, "--json"]
        return subprocess.run(
            [sys.executable, "-m", "deployments.cli.main", "status", *url],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"SELECT_N_API_KEY": tenants.keys[name]},
        )

    assert len(json.loads(status("acme").stdout)["replicas"]) == 2
    refused = status("zeta")
    assert refused.returncode == 2
    assert "admin: true" in refused.stderr
