"""The main job on the real demo model: what the README promises a new user."""

import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml
from server import STOP_S, serving, start

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
# SmolLM2-135M: 30 decoder layers of 7,080,192 bytes, each tensor on a 256-byte boundary.
UNIT_BYTES = 7_080_448

pytestmark = pytest.mark.timeout(420)


def quickstart() -> dict:
    return yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quickstart")
    with serving(quickstart(), directory, RAY_AUTH_MODE="token") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60)


def metric(server, name: str) -> float:
    """Sum of a metric's samples; replicas report every second when idle."""
    text = httpx.get(f"{server.url}/metrics").text
    samples = re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+]+)$", text, re.MULTILINE)
    assert samples, text
    return sum(float(sample) for sample in samples)


def streamed_units(server) -> int:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(
        r'^select_n_units\{[^}]*state="streamed"[^}]*\} ([0-9.]+)$', text, re.MULTILINE
    )
    assert found, text
    return int(float(found.group(1)))


def settled(server, name: str) -> float:
    """The metric once it stands still."""
    deadline, value = time.monotonic() + 20, metric(server, name)
    while time.monotonic() < deadline:
        time.sleep(1.2)
        value, before = metric(server, name), value
        if value == before:
            return value
    raise AssertionError(f"{name} never stood still")


def test_the_plan_line_says_what_was_asked_pinned_chosen_and_predicted(server):
    line = next(line for line in server.lines if "predicted TPOT" in line)
    assert "requested interval auto, tpot 100 ms, device 256 MiB" in line
    assert re.search(r"pinned [\d.]+ MiB", line)
    assert re.search(r"N = [\d.]+ \(k = \d+ of 30 layers", line)
    assert "emulated link at 1 GB/s" in line
    assert any(line.startswith("try: curl") for line in server.lines)


def test_a_chat_streams_to_the_openai_client(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=24,
        stream=True,
    )
    chunks = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "Paris" in "".join(chunks)
    assert sum(bool(chunk) for chunk in chunks) > 3


def test_64_streamed_tokens_move_64_times_k_units_over_the_link(server, client):
    k = int(re.search(r"k = (\d+) of 30", "\n".join(server.lines)).group(1))
    assert k > 0
    before = settled(server, "select_n_link_bytes_total")
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_tokens=64,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert sum(1 for chunk in stream if chunk.choices[0].finish_reason is None) >= 60
    moved = (settled(server, "select_n_link_bytes_total") - before) / UNIT_BYTES
    assert moved == int(moved)
    # One request leaves KV to spare: layers may come home meanwhile.
    assert 63 * streamed_units(server) <= moved <= 65 * k


def test_a_prompt_that_comes_again_is_not_computed_again(client):
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    first, again = (
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=2).usage for _ in range(2)
    )
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 64 <= again.prompt_tokens_details.cached_tokens < again.prompt_tokens


def test_a_wrong_request_is_a_400_and_harms_nobody(client):
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=-1
        )
    with pytest.raises(openai.BadRequestError, match=r"\d+") as refused:
        client.completions.create(model=MODEL, prompt="Hi", max_tokens=100_000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Hi"}])
    answer = client.completions.create(model=MODEL, prompt="Hi", max_tokens=2)
    assert answer.usage.completion_tokens <= 2


def test_only_ray_listens_beyond_loopback(server):
    """Ours is the HTTP port, on loopback; what else listens belongs to Ray."""
    sockets = [
        (process.name(), connection.laddr)
        for process in server.family()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert ("127.0.0.1", server.port) in [(address.ip, address.port) for _, address in sockets]
    loopback = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    open_to_all = [(name, address) for name, address in sockets if address.ip not in loopback]
    # One gRPC port per Serve replica: Ray gives no way to bind it elsewhere; the token guards it.
    assert all(name.startswith("ray::ServeReplica") for name, _ in open_to_all), open_to_all
    engines = [p for p in server.family() if "select_n_core.engine.child" in " ".join(p.cmdline())]
    assert engines
    assert not any(
        c.status == psutil.CONN_LISTEN for p in engines for c in p.net_connections("inet")
    )


def test_ray_wants_a_token(server):
    assert (Path.home() / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    raylets = [p for p in server.family() if p.name() == "raylet"]
    assert raylets
    assert all(p.environ()["RAY_AUTH_MODE"] == "token" for p in raylets)


def test_a_busy_port_is_one_line_and_exit_code_2(server, tmp_path):
    document = quickstart()
    document["http_options"]["port"] = server.port
    path = tmp_path / "busy.yaml"
    path.write_text(yaml.safe_dump(document))
    second = subprocess.run(
        [sys.executable, "-m", "deployments.cli.main", "serve", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 2
    assert second.stdout == ""
    assert len(second.stderr.strip().splitlines()) == 1
    assert f"127.0.0.1:{server.port}" in second.stderr


def test_ctrl_c_ends_streams_processes_and_ports(tmp_path):
    began = time.monotonic()
    server = start(quickstart(), tmp_path, RAY_AUTH_MODE="token")
    assert time.monotonic() - began < 60  # thirty seconds on an idle machine
    family = server.family()
    ends: list[str] = []

    def long_chat() -> None:
        with httpx.stream(
            "POST",
            f"{server.url}/v1/completions",
            json={
                "model": MODEL,
                "prompt": "Once",
                "max_tokens": 1000,
                "stream": True,
                "ignore_eos": True,
            },
            timeout=60,
        ) as answer:
            ends.extend(line for line in answer.iter_lines() if line)

    chat = threading.Thread(target=long_chat)
    chat.start()
    deadline = time.monotonic() + 20
    while not ends and time.monotonic() < deadline and chat.is_alive():
        if metric(server, "select_n_running_requests"):
            break
        time.sleep(0.1)
    assert server.stop() == 0
    chat.join(10)
    assert not chat.is_alive()
    assert server.stopped_in_s < STOP_S
    assert '"error"' in ends[-1] or "[DONE]" in ends[-1]
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", server.port))
