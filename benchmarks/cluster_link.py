"""A node's emulated bus from outside: what it carries is changed while its replicas use it.

python -m benchmarks.cluster_link BUS BYTES_PER_S     (on the node; shares come on stdin)
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.cluster_nodes import Node
from select_n_core.links.pacer import Pacer


class NodeLink:
    """Holds a bus of a node while it is entered; its bandwidth is whole before and after.

    Args:
        bus: its name. bytes_per_s: of the whole bus, as its replicas have it.
    """

    def __init__(self, node: Node, bus: str, bytes_per_s: float) -> None:
        hold = [sys.executable, "-m", "benchmarks.cluster_link", bus, str(bytes_per_s)]
        self._command = node.command_on(hold)
        self._holder: subprocess.Popen[str] | None = None

    def __enter__(self) -> NodeLink:
        self._holder = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.carry(1.0)  # it has begun
        return self

    def __exit__(self, *_: object) -> None:
        assert self._holder is not None
        self._holder.communicate()
        self._holder = None

    def carry(self, share: float) -> None:
        """Let the bus carry this share of its bandwidth from now on."""
        holder = self._holder
        assert holder is not None
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(f"{share}\n")
        holder.stdin.flush()
        if holder.stdout.readline().strip() != "done":
            raise RuntimeError(f"the bus is not held any more: {holder.wait()}")


def main() -> None:
    """Hold the bus until stdin ends."""
    name, bytes_per_s = sys.argv[1], float(sys.argv[2])
    pacer = Pacer(name, bytes_per_s)
    try:
        for line in sys.stdin:
            pacer.set_bandwidth(float(line) * bytes_per_s)
            print("done", flush=True)
    finally:
        pacer.set_bandwidth(bytes_per_s)
        pacer.close()


if __name__ == "__main__":
    main()
