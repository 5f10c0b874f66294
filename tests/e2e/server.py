"""`select-n serve` as a user starts it: a process of its own, its output, its end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

START_S = 240.0  # the first start measures the model
STOP_S = 10.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    process: subprocess.Popen
    port: int
    path: Path
    lines: list[str] = field(default_factory=list)
    stopped_in_s: float | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def family(self) -> list[psutil.Process]:
        """The server's process and everything it started."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def stop(self) -> int:
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(3 * STOP_S)
        self.stopped_in_s = time.monotonic() - began
        return code


def start(document: dict, directory: Path, **environment: str) -> Server:
    """Start serving `document` on a free port and wait until it says that it serves."""
    port = free_port()
    document["http_options"] = {"host": "127.0.0.1", "port": port}
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    process = subprocess.Popen(
        [sys.executable, "-m", "deployments.cli.main", "serve", str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    server = Server(process, port, path)
    assert process.stdout is not None
    for line in process.stdout:
        server.lines.append(line.rstrip())
        if line.startswith("try:"):
            return server
    raise AssertionError(f"the server ended with {process.wait()} before it served")


@contextlib.contextmanager
def serving(document: dict, directory: Path, **environment: str) -> Iterator[Server]:
    server = start(document, directory, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
