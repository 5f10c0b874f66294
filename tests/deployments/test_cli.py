"""The commands that plan: what they print, and what wrong input gets."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from tiny import save_tiny

from deployments.tenants.keys import KeyFile, hash_of

LINK = "emulated:2GB/s"
PLAN = ["--tpot", "1s", "--ttft", "10s", "--host-memory", "64MiB"]
KEYS = {
    "feasible",
    "interval",
    "k",
    "interval_range",
    "predicted_tpot_s",
    "predicted_ttft_s",
    "device_bytes",
    "host_bytes",
    "max_batch",
    "kv_tokens",
    "reason",
    "note",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _private_cache(cache, monkeypatch):
    monkeypatch.setenv("SELECT_N_CACHE", str(cache))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model"), max_context=1024))


@pytest.fixture(scope="module")
def profiled(model, cache, tmp_path_factory):
    """(The record's file, what was printed, what was shown meanwhile)."""
    path = tmp_path_factory.mktemp("record") / "record.json"
    arguments = ["-o", str(path), "--link", LINK, "--dtype", "float32", "--brief", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli.main", "profile", model, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "SELECT_N_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )
    return path, done.stdout, done.stderr


@pytest.fixture
def record(profiled):
    return profiled[0]


def test_a_profile_is_one_json_object_and_its_progress_stays_off_it(profiled):
    path, out, err = profiled
    summary = json.loads(out)
    assert summary["record"] == str(path)
    assert summary["held_out_p95"] is None
    assert {each["direction"] for each in summary["transfers"]} == {"h2d", "d2h"}
    for each in summary["transfers"]:
        assert 0 < each["p5_s"] <= each["p50_s"] <= each["p95_s"]
    assert "profiling" in err
    assert "100%" in err


def test_a_record_plans_as_one_json_object(cli, record, tmp_path):
    code, out, _ = cli("plan", str(record), *PLAN, "--device-memory", "64MiB", "--json")
    plan = json.loads(out)
    assert code == 0
    assert set(plan) >= KEYS
    assert (plan["interval"], plan["k"], plan["note"]) == (None, 0, "offload_not_needed")
    assert (plan["prompt_tokens"], plan["output_tokens"]) == (128, 64)

    static_and_half = _half_resident_bytes(record)
    code, out, _ = cli("plan", str(record), *PLAN, "--device-memory", static_and_half, "--json")
    plan = json.loads(out)
    assert plan["feasible"]
    assert plan["k"] > 2
    assert [each["k"] for each in plan["candidates"]] == list(range(7))
    assert plan["candidates"][plan["k"]]["tpot_s"] == plan["predicted_tpot_s"]
    assert plan["interval"] == pytest.approx(6 / plan["k"], abs=1e-3)

    code, out, _ = cli("plan", str(record), *PLAN, "--device-memory", static_and_half)
    rows = _table(out)
    assert [int(row["k"]) for row in rows.values()] == list(range(7))
    (chosen,) = [row for row in rows.values() if row["marked"]]
    assert int(chosen["k"]) == plan["k"]
    assert chosen["holds"] == ["yes", "yes", "yes"]
    assert rows["0"]["holds"] == ["yes", "yes", "no: device"]
    assert "--prompt-tokens" in out

    picture = tmp_path / "plan.png"
    cli("plan", str(record), *PLAN, "--device-memory", static_and_half, "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def _table(out: str) -> dict[str, dict]:
    """Rows of the printed table, by k."""
    rows = {}
    for line in out.splitlines():
        cells = [cell for cell in line.split("  ") if cell.strip()]
        cells = [cell.strip() for cell in cells]
        marked = cells[:1] == ["->"]
        cells = cells[marked:]
        if len(cells) == 11 and cells[1].isdigit():
            rows[cells[1]] = {"k": cells[1], "marked": marked, "holds": cells[8:]}
    return rows


def _half_resident_bytes(record) -> str:
    """Device memory for the static part, two thirds of the units and a typical request."""
    facts = json.loads(record.read_text())
    kv_bytes = facts["kv_bytes_per_token"] * 192
    return f"{facts['static_bytes'] + sum(facts['unit_bytes']) * 5 // 6 + kv_bytes} B"


def test_an_impossible_plan_is_exit_code_2_with_the_reason(cli, record):
    code, out, err = cli("plan", str(record), *PLAN, "--device-memory", "1KiB", "--json")
    assert code == 2
    assert json.loads(out)["reason"] == "device_too_small"
    assert "raise device_memory" in err
    assert len(err.strip().splitlines()) == 1


def test_a_record_of_other_hardware_is_refused_with_the_field(cli, record, tmp_path):
    facts = json.loads(record.read_text())
    facts["fingerprint"]["device"] = "Another CPU"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(facts))
    code, out, err = cli("plan", str(other), *PLAN, "--device-memory", "64MiB", "--json")
    assert (code, out) == (2, "")
    assert "device = 'Another CPU'" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "nowhere.json", *PLAN, "--device-memory", "1GiB"], "nowhere.json"),
        (["plan", "r", *PLAN, "--device-memory", "lots"], "lots"),
        (["plan", "r", *PLAN, "--device-memory=-1GiB"], "above zero"),
        (["generate", "demo:nobody", "Hi"], "smollm2-135m-instruct"),
        (["generate", "MODEL", "Hi", "--interval", "0.5"], "interval"),
        (["generate", "MODEL", "Hi", "--max-tokens", "-1"], "max_tokens"),
        (["generate", "MODEL", "Hi", "--dtype", "int3"], "dtype"),
        (["generate", "MODEL", "Hi", "--link", "usb"], "emulated:1GB/s"),
        (["generate", "MODEL", "Hi", "--link", "cuda"], "emulated"),
        (["check", "nowhere.yaml"], "nowhere.yaml"),
        (["render-k8s", "nowhere.yaml", "-o", "out"], "nowhere.yaml"),
        (["explode"], "explode"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(cli, model, arguments, said):
    code, out, err = cli(*[model if word == "MODEL" else word for word in arguments])
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()[-1:]) == 1
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert said in err


def test_generate_says_what_the_streaming_did(cli, model):
    code, out, _ = cli(
        "generate",
        model,
        "the quick",
        *("--max-tokens", "8", "--interval", "2", "--link", LINK, "--dtype", "float32"),
        "--json",
    )
    result = json.loads(out)
    assert code == 0
    assert (result["interval"], result["k"]) == (2.0, 3)
    assert 0 < result["tokens"] <= 8
    assert result["streamed_units"] % 3 == 0
    assert result["link"] == {"kind": "emulated", "bandwidth_bytes_per_s": pytest.approx(2e9, 0.2)}
    assert set(result) >= {
        "text",
        "device_bytes",
        "host_bytes",
        "iteration_s",
        "predicted_iteration_s",
    }
    resident = cli(
        "generate",
        model,
        "the quick",
        "--max-tokens",
        "8",
        "--interval",
        "off",
        "--link",
        LINK,
        "--dtype",
        "float32",
        "--json",
    )
    assert json.loads(resident[1])["text"] == result["text"]
    assert json.loads(resident[1])["streamed_units"] == 0


def test_check_prints_the_plan_that_serving_would_use(cli, model, tmp_path):
    config = {
        "http_options": {"port": 18999},
        "applications": [
            {
                "name": "serve",
                "import_path": "deployments.app:build_app",
                "args": {
                    "models": [
                        {
                            "name": "tiny",
                            "source": model,
                            "dtype": "float32",
                            "device_memory": "64MiB",
                            "host_memory": "64MiB",
                            "link": {"kind": "emulated", "bandwidth": "2GB/s"},
                            "slo": {"tpot": "1s", "ttft": "10s"},
                            "interval": 3,
                        }
                    ]
                },
            }
        ],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    code, out, _ = cli("check", str(path), "--json")
    assert code == 0
    (plan,) = json.loads(out)["models"]
    assert (plan["name"], plan["k"], plan["note"]) == ("tiny", 2, "forced_interval_gains_nothing")

    config["applications"][0]["args"]["models"][0]["slo"]["tpot"] = "1ns"
    config["applications"][0]["args"]["models"][0]["interval"] = "auto"
    path.write_text(yaml.safe_dump(config))
    code, out, err = cli("check", str(path), "--json")
    assert (code, out) == (2, "")
    assert "slo_below_compute" in err.splitlines()[-1]


class TestKey:
    @pytest.mark.parametrize("tenant", ["acme", "yes", "42"])
    def test_the_line_lets_the_key_in(self, cli, tmp_path, tenant):
        code, out, _ = cli("key", tenant)
        key, line = out.splitlines()
        assert code == 0
        assert key not in line
        path = tmp_path / "keys.yaml"
        path.write_text(f"{line}\n")
        assert KeyFile().tenant_of(key, str(path)) == tenant
        assert KeyFile().tenant_of(f"{key}x", str(path)) is None

    def test_json_has_the_same(self, cli):
        _, out, _ = cli("key", "acme", "--json")
        made = json.loads(out)
        assert made["line"] == f"{hash_of(made['key'])}: acme"

    def test_a_name_that_no_tenant_can_have_is_refused(self, cli):
        code, out, err = cli("key", "no such")
        assert (code, out) == (2, "")
        assert err.startswith("error: tenant: 'no such' is no tenant's name")
