"""Capturing device work: the few CUDA calls it takes, behind a protocol that a fake can keep."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

_LOG = logging.getLogger(__name__)


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Enqueue it again."""
        ...


class GraphRuntime(Protocol):
    """The few calls that capturing takes."""

    def session(self) -> AbstractContextManager[None]:
        """Around one capture, with all that it runs in between."""
        ...

    def begin(self) -> None:
        """Record what compute issues from here on, instead of running it."""
        ...

    def end(self) -> Graph:
        """Stop recording."""
        ...

    def abort(self) -> None:
        """Drop what is being recorded, if anything is."""
        ...


class CudaGraphs:
    """The real runtime; all graphs share one memory pool, because no two ever run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._graph: Any = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """See `GraphRuntime`: capturing needs a stream of its own and no collector beside it."""
        compute = torch.cuda.current_stream(self._device)
        torch.cuda.synchronize(self._device)
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            if collecting:
                gc.enable()
            compute.wait_stream(self._stream)

    def begin(self) -> None:
        """See `GraphRuntime`."""
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Graph:
        """See `GraphRuntime`."""
        graph, self._graph = self._graph, None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Gg]raph is empty.*")
            graph.capture_end()  # between two neighbours that are streamed there may be nothing
        captured: Graph = graph
        return captured

    def abort(self) -> None:
        """See `GraphRuntime`."""
        if self._graph is None:
            return
        graph, self._graph = self._graph, None
        try:
            graph.capture_end()
        except RuntimeError as error:
            _LOG.debug("an aborted capture ended with: %s", error)
