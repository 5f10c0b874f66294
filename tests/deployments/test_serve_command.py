"""`select-n serve` around a scripted engine: what it refuses, how it runs, how it ends."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest
import served
from collector import collecting
from standins import MODEL, args, events, eventually

from deployments.cli.serve import (
    but_policy,
    check_capacity,
    check_keys,
    check_port,
    find_cause,
    take_policy,
)
from deployments.ray_compat import check_document
from select_n_core.config import DeployConfig, HTTPOptions
from select_n_core.errors import ConfigError, InfeasibleError
from select_n_core.live import parse_policy

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def cuda(replicas: int):
    return args("big", link={"kind": "cuda"}, replicas={"min": 1, "max": replicas})


def test_a_busy_port_is_one_clear_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*in use") as caught:
            check_port(HTTPOptions(port=port))
    assert caught.value.field == "http_options.port"
    assert "\n" not in str(caught.value)
    check_port(HTTPOptions(port=port))


def test_a_host_that_is_not_ours_is_one_clear_line():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        check_port(HTTPOptions(host="192.0.2.1", port=8000))


def test_keys_that_cannot_be_read_are_one_clear_line(tmp_path):
    path = tmp_path / "keys.yaml"
    policy = parse_policy({"tenants": [{"name": "acme"}], "keys_file": str(path)})
    with pytest.raises(ConfigError, match=r"keys_file: cannot read .*: No such file"):
        check_keys(policy)
    path.write_text("{}")
    check_keys(policy)
    check_keys(None)


def test_a_broken_part_of_ray_serves_own_is_one_clear_line():
    document = served.config(8000, "endless").document
    check_document(document)
    with pytest.raises(ConfigError, match="proxy_location") as caught:
        check_document(document | {"proxy_location": "Nowhere"})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"applications\.0\.deployments"):
        check_document(
            document | {"applications": [document["applications"][0] | {"deployments": [{}]}]}
        )


def test_cuda_replicas_fit_the_gpus_there_are():
    check_capacity(cuda(2), {"CPU": 2, "GPU": 2})
    check_capacity(args(), {"CPU": 2})


def test_more_cuda_replicas_than_gpus_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"3 in all \(big 3\).*has 2; lower replicas.max"):
        check_capacity(cuda(3), {"GPU": 2.0})


def test_cuda_without_a_gpu_is_refused_and_names_emulated():
    with pytest.raises(ConfigError, match=r"has 0; set link.kind to 'emulated'"):
        check_capacity(cuda(1), {"CPU": 8})


def with_control(policy: dict | None = None, **changes) -> DeployConfig:
    document = served.config(8000, "endless").document | changes
    control = {
        "name": "control",
        "route_prefix": None,
        "import_path": "deployments.control.app:build_app",
    }
    if policy is not None:
        control["deployments"] = [{"name": "ClusterController", "user_config": policy}]
    document["applications"] = [control, *document["applications"]]
    live = parse_policy(policy or {})
    return DeployConfig(document=document, http=HTTPOptions(), serve=args(), live=live)


def test_only_the_live_policy_may_change_while_it_serves():
    before = but_policy(with_control())
    assert but_policy(with_control({"classes": {}})) == before
    assert but_policy(with_control({"classes": {"chat": {"tpot": "50ms"}}})) == before
    assert but_policy(with_control(proxy_location="EveryNode")) != before
    assert but_policy(served.config(8000, "endless")) != before
    other = with_control({})
    other.document["applications"][0]["deployments"][0]["num_replicas"] = 2
    assert but_policy(other) != before


def broken() -> DeployConfig:
    raise ConfigError("applications.0.deployments.0.user_config.classes: is wrong")


@pytest.mark.parametrize(
    ("read_again", "why"),
    [
        (broken, "user_config.classes: is wrong"),
        (lambda: with_control(proxy_location="EveryNode"), "only the user_config of Cluster"),
        (lambda: with_control(proxy_location="Nowhere"), "proxy_location"),
        (lambda: with_control({"tenants": [{"name": "a"}], "keys_file": "/none"}), "keys_file"),
    ],
)
def test_a_policy_that_cannot_be_taken_leaves_all_as_it_was(read_again, why, capsys):
    config = with_control()
    assert take_policy(config, read_again) is config
    said = capsys.readouterr().err
    assert "was not taken" in said
    assert why in said


def test_the_cause_of_a_failed_start_is_our_own_error():
    message = """A replica failed to start with exception. Retrying 2 more time(s). Error:
ray::ServeReplica:serve:model-x.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "replica.py", line 1, in start
    raise ValueError("inner: thing")
ValueError: inner: thing

The above exception was the direct cause of the following exception:

select_n_core.errors.InfeasibleError: no N meets 100 ms: give more device_memory
RuntimeError: Traceback of it all"""
    cause = find_cause(message)
    assert cause.kind is InfeasibleError
    assert cause.line == "no N meets 100 ms: give more device_memory"


def test_the_cause_of_another_failure_is_the_last_error_named():
    assert find_cause("Error:\nTraceback\nOSError: no space left").line == "OSError: no space left"
    assert find_cause("Deploying 1 replica") is None


def serve(tmp_path: Path, port: int, source: str = "endless", **variables: str) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "token",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, str(HERE / "served.py"), str(port), source],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(process: subprocess.Popen) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def listening(processes: list[psutil.Process]) -> dict[str, list[str]]:
    """The addresses every process listens on, by its command."""
    return {
        " ".join(each.cmdline()): [
            connection.laddr.ip.removeprefix("::ffff:")
            for connection in each.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        for each in processes
    }


@pytest.mark.slow
def test_it_serves_and_ends_within_ten_seconds_with_nothing_left(tmp_path, port):
    process = serve(tmp_path, port)
    said = [process.stdout.readline() for _ in range(3)]
    assert said[0] == "N = 3 was chosen\n"
    assert f"http://127.0.0.1:{port}" in said[1]
    assert "curl" in said[2]

    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    processes = family(process)
    for command, addresses in listening(processes).items():
        # One port per Serve replica, which Ray binds everywhere; it asks for the token.
        most = 1 if "ServeReplica" in command else 0
        assert len([each for each in addresses if each != "127.0.0.1"]) <= most, command

    url = f"http://127.0.0.1:{port}"
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 900, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
        assert "text" in next(response.iter_lines())
    # The stand-in counts its cancelled requests as waiting.
    eventually(lambda: 'replica="' in httpx.get(f"{url}/metrics").text)
    eventually(lambda: _metric(url, "select_n_waiting_requests") == 1)

    got: list[str] = []

    def listen() -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            got.extend(events(list(response.iter_lines())))

    listener = threading.Thread(target=listen)
    listener.start()
    eventually(lambda: _metric(url, "select_n_running_requests") == 1)
    process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    listener.join()
    assert json.loads(got[-1])["error"]["code"] == "engine_error"
    assert process.wait() == 0
    check_port(HTTPOptions(port=port))


def _metric(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics", timeout=5).text.splitlines():
        if line.startswith(name + "{"):
            return float(line.split()[-1])
    return -1


@pytest.mark.slow
def test_its_last_metrics_leave_over_otlp(tmp_path, port):
    with collecting() as collector:
        never = str(3600 * 1000)  # but at the end
        process = serve(
            tmp_path,
            port,
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
            OTEL_METRIC_EXPORT_INTERVAL=never,
        )
        assert f"http://127.0.0.1:{port}" in [process.stdout.readline() for _ in range(2)][1]
        body = {"model": MODEL, "prompt": "Hi", "max_tokens": 3}
        httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=20)
        assert not collector.exports
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 0
    ingress, replica = sorted(
        collector.exports, key=lambda each: each.resource["select_n.component"]
    )
    assert ingress.resource["select_n.component"] == "ingress"
    assert ingress.metrics["gen_ai.server.request.duration"].histogram.data_points[0].count == 1
    assert replica.resource["select_n.model"] == MODEL
    assert replica.metrics["select_n.running_requests"].gauge.data_points[0].as_int >= 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("infeasible", "ConfigError: no N meets 100 ms; give more device_memory"),
        ("broken", "EngineError: the deployment failed: RuntimeError: it fell over"),
    ],
)
def test_a_model_that_cannot_start_ends_it_with_the_replicas_own_line(tmp_path, port, source, line):
    process = serve(tmp_path, port, source)
    _, progress = process.communicate(timeout=90)
    assert process.returncode == 2
    assert progress.splitlines()[-1] == line
    assert "Traceback" not in progress


@pytest.mark.slow
def test_a_signal_while_starting_ends_it_too(tmp_path, port):
    process = serve(tmp_path, port)
    assert "starting Ray" in process.stderr.readline()
    assert "starting Ray Serve" in process.stderr.readline()
    processes = family(process)
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not alive
    assert process.wait() == 0
