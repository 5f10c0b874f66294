"""The engine's own process: `python -m select_n_core.engine.child FD`.

The client's end of standard input is its lifeline: when the client dies, however it dies, the
read ends and so does this process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

from select_n_core.engine.loop import run_engine
from select_n_core.engine.messages import Start


def _follow_the_client() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the client's to handle
    threading.Thread(target=_follow_the_client, name="lifeline", daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    try:
        start: Start = connection.recv()
    except EOFError:
        return  # closed before it was told what to be
    run_engine(start, connection)


if __name__ == "__main__":
    main()
