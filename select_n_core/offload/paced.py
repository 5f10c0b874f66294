"""The executor of a paced model: the same arena, ring, blocks and mirrors; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from select_n_core.decisions.latency import StepShape
from select_n_core.kv.cache import KVCache
from select_n_core.links.base import Link
from select_n_core.links.paced import Timeline
from select_n_core.models.load import LoadedModel
from select_n_core.offload.executor import Executor
from select_n_core.offload.mirrors import HostMaps
from select_n_core.offload.placement import Placement, StepRow


class PacedExecutor(Executor):
    """Runs steps of a `paced_model`: each takes the time that its record says, on the timeline.

    Args:
        link: a `PacedLink` over the same timeline.
    """

    def __init__(
        self,
        model: LoadedModel,
        placement: Placement,
        link: Link,
        timeline: Timeline,
        maps: HostMaps | None = None,
    ) -> None:
        super().__init__(model, placement, link, torch.device("cpu"), maps)
        self._timeline = timeline

    def _make_cache(self, region: Tensor) -> KVCache:
        return _UntouchedCache(region, self.model.kv, self.placement.block_tokens, self.model.dtype)

    def _forward(self, rows: Sequence[StepRow]) -> Tensor:
        with self._timeline.step(), self._streamer.iteration(self.streamed):
            logits: Tensor = self.model.module(
                step_shape(rows), sum(row.logits for row in rows), self.k
            )
        return logits


class _UntouchedCache(KVCache):
    """Blocks that nobody reads: their pages are never written, so that they take no memory."""

    def clear(self, blocks: Tensor) -> None:
        pass

    def move(self, moves: Mapping[int, int]) -> None:
        pass


def step_shape(rows: Sequence[StepRow]) -> StepShape:
    """What the latency model looks at; a row of one new token is a decoding one."""
    decoding = [row.context for row in rows if len(row.tokens) == 1]
    shape = StepShape(len(decoding), sum(decoding))
    for row in rows:
        if len(row.tokens) > 1:
            shape = shape.with_chunk(row.context, len(row.tokens))
    return shape
