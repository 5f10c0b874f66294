"""Captured decode steps: the host launches one graph instead of every kernel of a forward.

With nothing streamed a step is one graph over the unhooked model. With units streamed the graph
is cut around each of them: what the streamer does there (waits, events, copies) stays outside,
because a captured copy would freeze which unit comes from where. A graph bakes in addresses, so
there is one program per batch size, table width, set of streamed units and place in the ring;
inputs lie in static tensors. Steps that fit no program run as usual.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from select_n_core.errors import StreamingError
from select_n_core.kv.attention import Row
from select_n_core.kv.attention_cuda import StaticDecode
from select_n_core.kv.pick import Attention, padded_width
from select_n_core.kv.upload import upload
from select_n_core.offload.capture import CudaGraphs, GraphRuntime
from select_n_core.offload.streamer import WeightStreamer

_LOG = logging.getLogger(__name__)
_MOST_PROGRAMS = 32
_MOST_SIZES = 32

Key = tuple[int, int, tuple[int, ...], int]


class Graphs(StrEnum):
    """When decode steps are captured."""

    OFF = "off"
    RESIDENT = "resident"  # while nothing is streamed
    ALL = "all"  # also around streamed units


@dataclass(slots=True)
class _Program:
    """One captured step: graph replays and the streamer's turns, in order."""

    steps: list[Callable[[], object]]
    logits: Tensor  # [padded rows, vocab], where every replay leaves them


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A row with one new token. `logits`: whether the logits after it are wanted."""

    row: Row
    token: int
    logits: bool


class DecodeGraphs:
    """Captures decode steps of a placed model and replays them.

    A shape's first step runs uncaptured over the static inputs, which warms every kernel up; its
    second is captured.

    Args:
        runs: of each unit in call order, the modules before which and after which it has its turn.

    Attributes:
        enabled: False lets every step run as usual, to compare.
        replays: steps that were replayed. refused: why this model cannot be captured, if so.
    """

    def __init__(
        self,
        module: nn.Module,
        runs: Sequence[tuple[nn.Module, nn.Module]],
        streamer: WeightStreamer,
        attention: Attention,
        runtime: GraphRuntime,
        mode: Graphs,
    ) -> None:
        self._module = module
        self._runs = list(runs)
        self._streamer = streamer
        self._attention = attention
        self._runtime = runtime
        self._mode = mode
        self._statics: OrderedDict[tuple[int, int], StaticDecode] = OrderedDict()
        self._seen: set[Key] = set()
        self._programs: OrderedDict[Key, _Program] = OrderedDict()
        self.enabled = True
        self.replays = 0
        self.refused: str | None = None

    @property
    def captured(self) -> int:
        """Programs that can be replayed now."""
        return len(self._programs)

    def step(self, rows: Sequence[DecodeRow], streamed: tuple[int, ...]) -> Tensor | None:
        """The wanted logits of a decode step, or None where the step has to run as usual.

        Call it in inference mode. A model that cannot be captured is told once, in `refused`.
        """
        if not self.enabled or self.refused is not None:
            return None
        if streamed and self._mode is not Graphs.ALL:
            return None
        phase = self._streamer.phase(streamed)
        if phase is None:
            return None
        count = padded_rows(len(rows))
        width = padded_width(max(len(row.row.blocks) for row in rows))
        key = (count, width, streamed, phase)
        static = self._static(count, width)
        static.load([row.token for row in rows], [row.row for row in rows])
        logits = self._logits(key, static, streamed)
        if logits is None:
            return None
        wanted = [index for index, row in enumerate(rows) if row.logits]
        if len(wanted) == len(rows):
            return logits[: len(rows)].clone()
        return logits[upload([wanted], logits.device)[0]]

    def _static(self, count: int, width: int) -> StaticDecode:
        """The inputs of that size; the size that was not used for longest makes room."""
        static = self._statics.get((count, width))
        if static is None:
            if len(self._statics) == _MOST_SIZES:
                size, _ = self._statics.popitem(last=False)
                self._seen = {key for key in self._seen if key[:2] != size}
                for key in [key for key in self._programs if key[:2] == size]:
                    del self._programs[key]
            static = self._statics[count, width] = self._attention.static(count, width)
        self._statics.move_to_end((count, width))
        return static

    def _logits(self, key: Key, static: StaticDecode, streamed: tuple[int, ...]) -> Tensor | None:
        program = self._programs.get(key)
        if program is None and key not in self._seen:
            self._seen.add(key)
            with self._iteration(streamed):
                return self._forward(static)
        if program is None:
            try:
                program = self._capture(static, streamed)
            except RuntimeError as error:
                self.refused = str(error).splitlines()[0]
                self._programs.clear()
                _LOG.warning("decode steps are not captured in graphs: %s", self.refused)
                return None
            self._programs[key] = program
            if len(self._programs) > _MOST_PROGRAMS:
                self._programs.popitem(last=False)
            return program.logits
        self._programs.move_to_end(key)
        with self._iteration(streamed):
            for step in program.steps:
                step()
        self.replays += 1
        return program.logits

    def _iteration(self, streamed: tuple[int, ...]) -> AbstractContextManager[None]:
        """With every unit at home there are no turns to keep: the streamer is left out."""
        return self._streamer.iteration(streamed) if streamed else nullcontext()

    def _forward(self, static: StaticDecode) -> Tensor:
        static.begin()
        logits: Tensor = self._module(
            input_ids=static.tokens[None],
            position_ids=static.positions[None],
            use_cache=False,
            select_n=static,
        ).logits[0]
        return logits

    def _capture(self, static: StaticDecode, streamed: tuple[int, ...]) -> _Program:
        """Capture one step; what was captured is replayed at once, so the step is also done."""
        runtime = self._runtime
        steps: list[Callable[[], object]] = []

        def cut(*_: Any) -> None:
            steps.append(runtime.end().replay)
            steps[-1]()

        def resume(*_: Any) -> None:
            runtime.begin()

        def note(turn: Callable[[int], None], unit: int) -> Callable[..., None]:
            return lambda *_: steps.append(partial(turn, unit))

        handles = []
        acquire, release = self._streamer.acquire, self._streamer.release
        for unit, (first, last) in enumerate(self._runs if streamed else ()):
            # The streamer's own hooks stand between `cut` and `resume`.
            handles.append(first.register_forward_pre_hook(note(acquire, unit)))
            handles.append(last.register_forward_hook(note(release, unit)))
            if unit in streamed:
                handles.append(first.register_forward_pre_hook(cut, prepend=True))
                handles.append(first.register_forward_pre_hook(resume))
                handles.append(last.register_forward_hook(cut, prepend=True))
                handles.append(last.register_forward_hook(resume))
        try:
            with runtime.session(), self._iteration(streamed):
                try:
                    runtime.begin()
                    logits = self._forward(static)
                    cut()
                except BaseException:
                    runtime.abort()
                    raise
        finally:
            for handle in handles:
                handle.remove()
        return _Program(steps, logits)


def padded_rows(rows: int) -> int:
    """The batch size of a captured graph: few sizes, never more than a third of it idle work."""
    if rows <= 4:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


def graph_runtime(mode: Graphs, device: torch.device) -> GraphRuntime | None:
    """The runtime for `mode`, None where nothing is captured.

    Raises:
        StreamingError: graphs are wanted on a device that has none.
    """
    if mode is Graphs.OFF:
        return None
    if device.type != "cuda":
        raise StreamingError(f"graphs '{mode}' need a CUDA device; say 'off' on {device}")
    return CudaGraphs(device)
