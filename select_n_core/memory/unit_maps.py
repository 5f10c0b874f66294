"""The shared maps of one model, by unit."""

from __future__ import annotations

from collections.abc import Mapping

from select_n_core.memory.host import HostBytes
from select_n_core.memory.sealed import Fill
from select_n_core.memory.shared import SharedMap, SharedMaps


class UnitMaps:
    """The shared maps of one model, by unit.

    Args:
        model: names weights and layout: model hash, dtype, and what a unit is.
    """

    def __init__(self, maps: SharedMaps, model: str) -> None:
        self._maps = maps
        self._model = model

    def attach(self, unit: int, nbytes: int, fill: Fill) -> SharedMap:
        """See `SharedMaps.attach`."""
        return self._maps.attach(self.key(unit), nbytes, fill)

    def find(self, unit: int, nbytes: int) -> SharedMap | None:
        """See `SharedMaps.find`."""
        return self._maps.find(self.key(unit), nbytes)

    def begin(self, unit: int, nbytes: int) -> SharedMap:
        """See `SharedMaps.begin`."""
        return self._maps.begin(self.key(unit), nbytes)

    def publish(self, unit: int, host: HostBytes) -> None:
        """See `SharedMaps.publish`."""
        assert isinstance(host, SharedMap)
        self._maps.publish(self.key(unit), host)

    def set_aside(self, sizes: Mapping[int, int]) -> None:
        """See `SharedMaps.set_aside`; unit -> bytes."""
        self._maps.set_aside({self.key(unit): size for unit, size in sizes.items()})

    def missing_bytes(self, sizes: Mapping[int, int]) -> int:
        """See `SharedMaps.missing_bytes`; unit -> bytes."""
        return self._maps.missing_bytes({self.key(unit): size for unit, size in sizes.items()})

    def key(self, unit: int) -> str:
        """The unit's key on this node."""
        return f"{self._model} unit {unit}"
