"""The promise, through HTTP: TPOT of concurrent chats on the quickstart against its target.

    python -m benchmarks.serve --json

Starts `select-n serve` on the configuration, streams chats with the `openai` client, stops it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from openai import AsyncOpenAI

from benchmarks.environment import ROOT, Provenance, note, publish
from select_n_core.config import DeployConfig, load_config

TOPICS = (
    "why the sky is blue",
    "how a bicycle stays upright",
    "what makes bread rise",
    "how tides work",
    "why leaves turn red",
    "how a steam engine works",
    "what a rainbow is",
    "how birds find their way",
)
START_S = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "quickstart.yaml")
    parser.add_argument("--chats", type=int, default=8, help="concurrent")
    parser.add_argument("--rounds", type=int, default=4, help="of concurrent chats, one after one")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    provenance = Provenance()
    with tempfile.TemporaryDirectory() as scratch:
        config = _on_free_port(arguments.config, Path(scratch))
        model = config.serve.models[0]
        with _server(Path(scratch) / "config.yaml", config) as plan_line:
            url = f"http://127.0.0.1:{config.http.port}/v1"
            requests = asyncio.run(_load(url, model.name, arguments))
            moved = _units_moved(config.http.port)
    target_s = model.slo.tpot
    predicted_s = _predicted_tpot_s(plan_line)
    tpots = [request["tpot_s"] for request in requests]
    document = {
        "config": str(arguments.config.relative_to(ROOT)),
        "plan": plan_line,
        "chats": arguments.chats,
        "rounds": arguments.rounds,
        "tokens_each": arguments.tokens,
        "target_tpot_s": target_s,
        "target_ttft_s": model.slo.ttft,
        "predicted_tpot_s": predicted_s,
        "within_target": sum(tpot <= target_s for tpot in tpots) / len(tpots),
        "median_tpot_s": statistics.median(tpots),
        "median_over_predicted": statistics.median(tpots) / predicted_s,
        "ttft_within_target": sum(r["ttft_s"] <= model.slo.ttft for r in requests) / len(requests),
        "median_ttft_s": statistics.median(request["ttft_s"] for request in requests),
        "link": moved,
        "requests": requests,
        "provenance": provenance.document(),
    }
    lines = [
        plan_line,
        *(f"TPOT {r['tpot_s'] * 1e3:6.1f} ms  TTFT {r['ttft_s'] * 1e3:6.0f} ms" for r in requests),
        f"{document['within_target']:.1%} of {len(tpots)} requests within {target_s * 1e3:g} ms; "
        f"median {document['median_tpot_s'] * 1e3:.1f} ms, "
        f"{document['median_over_predicted']:.3f} of the prediction",
    ]
    publish("serve", document, as_json=arguments.json, lines=lines)


async def _load(url: str, model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    client = AsyncOpenAI(base_url=url, api_key="none", timeout=120)
    await _chat(client, model, TOPICS[0], arguments.tokens)  # warm
    found: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        note(f"round {number + 1} of {arguments.rounds}")
        topics = [TOPICS[index % len(TOPICS)] for index in range(arguments.chats)]
        found += await asyncio.gather(
            *(_chat(client, model, topic, arguments.tokens) for topic in topics)
        )
    await client.close()
    return found


async def _chat(client: AsyncOpenAI, model: str, topic: str, tokens: int) -> dict[str, Any]:
    begun_s = time.perf_counter()
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"Explain {topic}."}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    first_s = last_s = begun_s
    usage = None
    async for chunk in stream:
        if chunk.usage is not None:
            usage = chunk.usage
        if not chunk.choices or chunk.choices[0].delta.content is None:
            continue
        last_s = time.perf_counter()
        if first_s == begun_s and chunk.choices[0].delta.content:
            first_s = last_s
    assert usage is not None
    assert usage.completion_tokens == tokens, usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "tokens": usage.completion_tokens,
        "ttft_s": first_s - begun_s,
        "tpot_s": (last_s - first_s) / (tokens - 1),
    }


def _on_free_port(path: Path, scratch: Path) -> DeployConfig:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        document.setdefault("http_options", {})["port"] = probe.getsockname()[1]
    (scratch / "config.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_config(scratch / "config.yaml")


@contextlib.contextmanager
def _server(path: Path, config: DeployConfig) -> Iterator[str]:
    """A served configuration; yields the plan line it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deployments.cli.main", "serve", str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        plan_line = ""
        for line in process.stdout:
            if "predicted TPOT" in line:
                plan_line = line.strip()
            if line.startswith("serving on"):
                break
        else:
            raise SystemExit("the server ended before it served")
        yield plan_line
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def _predicted_tpot_s(plan_line: str) -> float:
    found = re.search(r"predicted TPOT ([\d.]+) (ms|s)\b", plan_line)
    assert found is not None, plan_line
    return float(found.group(1)) * (1e-3 if found.group(2) == "ms" else 1.0)


def _units_moved(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        line.split(" ")[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(("select_n_link", "select_n_copy_stall"))
    }


if __name__ == "__main__":
    main()
