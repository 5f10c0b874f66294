"""Where and when a figure was measured: command, machine, versions, commit, foreign load."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from select_n_core.profiling.fingerprint import device_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


class Provenance:
    """Taken at the start of a run, written into its result at the end."""

    def __init__(self) -> None:
        self._began = datetime.datetime.now(datetime.UTC)
        self._commit = _commit()
        self._cpu_s = _cpu_seconds()
        self._own_s = _own_seconds()

    def document(self) -> dict[str, Any]:
        """The facts to write beside the figures."""
        took_s = (datetime.datetime.now(datetime.UTC) - self._began).total_seconds()
        busy_s = _cpu_seconds() - self._cpu_s
        own_s = _own_seconds() - self._own_s
        return {
            "command": " ".join([Path(sys.executable).name, *_arguments()]),
            "began": self._began.isoformat(timespec="seconds"),
            "took_s": round(took_s, 1),
            "foreign_cores": round(max(0.0, busy_s - own_s) / took_s, 3),
            "machine": {
                "device": device_name("emulated"),
                "cores": len(os.sched_getaffinity(0)),
                "memory_bytes": psutil.virtual_memory().total,
            },
            "versions": {
                name: _version(name) for name in ("torch", "transformers", "ray", "select-n")
            },
            "python": sys.version.split()[0],
            "commit": self._commit,
        }


def publish(name: str, document: dict[str, Any], *, as_json: bool, lines: list[str]) -> None:
    """Write `document` to benchmarks/results/NAME.json and print it or `lines`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text if as_json else "\n".join(lines))


def note(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def _version(name: str) -> str | None:
    """Of an installed package; a GPU machine need not have all of them."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _arguments() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    head = ["-m", spec.name] if spec is not None else [Path(sys.argv[0]).name]
    # Where a peer's interpreter lies is nobody's business.
    return [*head, *(Path(each).name if each.startswith("/") else each for each in sys.argv[1:])]


def _cpu_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


def _own_seconds() -> float:
    """Of this process and the children it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _commit() -> str:
    if shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = [
        line
        for line in git("status", "--porcelain").splitlines()
        if "benchmarks/results" not in line
    ]
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
