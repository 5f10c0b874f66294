"""Several machines on one: Ray nodes in a network namespace of their own, each as good as a host.

Every node has a loopback address, process ids, a boot id and a runtime folder of its own. So its
ledger of host memory, its buses and its shared mirrors are its own too, and it dies whole, as a
machine does. Nothing listens outside; all of it ends with the process that made the namespaces.

    python -m benchmarks.cluster_nodes COMMAND...     (runs COMMAND inside)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent

HEAD = "head"  # a resource that only the first node has

_INSIDE = "SELECT_N_BENCHMARK_NAMESPACE"
_OWN = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_NAMESPACES = ("unshare", "--map-root-user", "--net", *_OWN)
# The shell is the first process of its namespace and reaps what loses its parent.
_SHELL = ("sh", "-c", '"$@"; exit $?', "sh")
_NODE_SHELL = (
    "sh",
    "-c",
    'mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && "$@"; exit $?',
    "sh",
)
_RAY = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
# What a Ray outside may have set, and what would keep every node on 127.0.0.1.
_NOT_OURS = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
_RAYS_FOLDER = Path("/tmp/ray")  # where it keeps sockets and logs unless told otherwise
_GCS_PORT = 6379
_OBJECT_STORE_BYTES = 80 << 20
_START_S = 60.0
_POLL_S = 0.1

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def why_not() -> str | None:
    """What keeps this user from namespaces; None where nothing does."""
    if shutil.which("unshare") is None:
        return "there is no unshare(1)"
    tried = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"namespaces are not allowed: {tried.stderr.strip()}"


def inside() -> bool:
    """Whether this process runs where nodes may be started."""
    return _INSIDE in os.environ


def command_inside(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` in namespaces of its own, and ends all of it with it."""
    here = [sys.executable, "-m", "benchmarks.cluster_nodes"]
    return [*_NAMESPACES, *_SHELL, *here, *command]


def enter(module: str, argv: Sequence[str]) -> None:
    """Go on as `python -m MODULE ARGV` inside; returns at once where this is inside already."""
    if inside():
        return
    if (reason := why_not()) is not None:
        raise SystemExit(f"{module} needs namespaces of its own; {reason}")
    command = command_inside([sys.executable, "-m", module, *argv])
    os.execvp(command[0], command)


def main() -> None:
    """Raise loopback, give Ray a folder that ends with the namespace, then become the command."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH22x", b"lo", _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
    _RAYS_FOLDER.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "ray", str(_RAYS_FOLDER)], check=True)
    for name in _NOT_OURS:
        os.environ.pop(name, None)
    os.environ.update(_RAY)
    os.environ[_INSIDE] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.execvp(sys.argv[1], sys.argv[1:])


class Engine(NamedTuple):
    """The two processes of one replica, as this process sees their ids."""

    deployment: str
    actor: int
    engine: int


class Node:
    """One Ray node as a machine of its own.

    Attributes:
        address: that others reach it at. runtime: its folder for ledgers, buses and mirrors.
        id: Ray's, once it has joined.
    """

    def __init__(self, number: int, directory: Path, ray_arguments: Sequence[str]) -> None:
        self.address = f"127.0.0.{number + 2}"
        self.runtime = directory / "run"
        self.id = ""
        self.runtime.mkdir(parents=True)
        boot = directory / "boot_id"
        boot.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
        self.log = directory / "ray.log"
        start = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            f"--node-ip-address={self.address}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            # The ranges that Ray takes by default are the same on every node.
            *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
            "--disable-usage-stats",
            *ray_arguments,
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", *_OWN, *_NODE_SHELL, str(boot), *start],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"XDG_RUNTIME_DIR": str(self.runtime)},
            )

    def check(self) -> None:
        """Raise RuntimeError when it has ended."""
        if (code := self._process.poll()) is not None:
            end = self.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the node {self.address} ended with {code}: {end}")

    def kill(self) -> None:
        """Let the machine lose its power: every process of it ends at once."""
        self._process.kill()
        self._process.wait()

    def command_on(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` as a process of this machine."""
        [first] = psutil.Process(self._process.pid).children()
        enter = ["nsenter", "--mount", "--pid", f"--target={first.pid}"]
        return [*enter, "env", f"XDG_RUNTIME_DIR={self.runtime}", *command]

    def engines(self) -> list[Engine]:
        """The replicas that run here, those of every application."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                if (actor := _engines_actor(process)) is not None:
                    found.append(Engine(actor[0], actor[1], process.pid))
        return found

    def replicas_of(self, deployment: str) -> list[Engine]:
        """Those of one deployment."""
        return [each for each in self.engines() if each.deployment == deployment]


def _engines_actor(process: psutil.Process) -> tuple[str, int] | None:
    """(deployment, pid) of the actor whose engine this is; None where it is none."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        if "select_n_core.engine.child" in process.cmdline():
            actor = process.parent()
            if actor is not None and "ServeReplica" in (title := " ".join(actor.cmdline())):
                return deployment_of(title), actor.pid
    return None


def deployment_of(title: str) -> str:
    """Of a title ray::ServeReplica:APPLICATION:DEPLOYMENT, with what it does behind a dot."""
    found = re.search(r"ServeReplica:[^:]+:([\w-]+)", title)
    return "" if found is None else found[1]


class Cluster:
    """Ray nodes that this process is connected to; see `cluster`."""

    def __init__(self, directory: Path, cpus: int = 16) -> None:
        self._directory = directory
        self._cpus = cpus
        self._made = 0
        self.nodes: list[Node] = []

    def start(self, nodes: int) -> None:
        """Start the head and connect, then the others, one after the other."""
        import ray

        head = self._add(
            "--head",
            f"--port={_GCS_PORT}",
            "--include-dashboard=false",
            f'--resources={{"{HEAD}": 1}}',
        )
        _until(lambda: _listens(head.address, _GCS_PORT), head.check)
        ray.init(
            address=f"{head.address}:{_GCS_PORT}",
            _node_ip_address=head.address,
            log_to_driver=False,
            logging_level="ERROR",
        )
        self._await(head)
        for _ in range(nodes - 1):
            self.add()

    def add(self) -> Node:
        """One more machine; returns once it has joined."""
        node = self._add(f"--address={self.nodes[0].address}:{_GCS_PORT}")
        self._await(node)
        return node

    def kill(self, node: Node) -> None:
        """Lose a machine, which must not be the head."""
        node.kill()
        self.nodes.remove(node)

    def node_of(self, node_id: str) -> Node:
        """The node with that id of Ray's."""
        [found] = [node for node in self.nodes if node.id == node_id]
        return found

    def close(self) -> None:
        """Disconnect and end every node."""
        import ray

        ray.shutdown()
        for node in reversed(self.nodes):
            node.kill()
        self.nodes.clear()

    def _add(self, *ray_arguments: str) -> Node:
        arguments = [f"--num-cpus={self._cpus}", *ray_arguments]
        node = Node(self._made, self._directory / f"node{self._made}", arguments)
        self._made += 1
        self.nodes.append(node)
        return node

    def _await(self, node: Node) -> None:
        import ray

        def is_there() -> bool:
            for each in ray.nodes():
                if each["Alive"] and each["NodeManagerAddress"] == node.address:
                    node.id = each["NodeID"]
            return bool(node.id)

        _until(is_there, node.check)


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    """A cluster of so many nodes, this process connected to it; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="select-n-", ignore_cleanup_errors=True) as directory:
        made = Cluster(Path(directory))
        try:
            made.start(nodes)
            yield made
        finally:
            made.close()


def _listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address, port)) == 0


def _until(holds: Callable[[], bool], check: Callable[[], None]) -> None:
    end_s = time.monotonic() + _START_S
    while not holds():
        check()
        if time.monotonic() > end_s:
            raise RuntimeError(f"a Ray node did not start within {_START_S:g} s")
        time.sleep(_POLL_S)


if __name__ == "__main__":
    main()
