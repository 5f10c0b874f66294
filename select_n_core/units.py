"""A unit: the smallest thing that moves, one flat buffer with every tensor a view of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from select_n_core.errors import StreamingError
from select_n_core.packed import PackedWeight, layout_of, pack, packed_view

Reader = Callable[[Tensor], None]
"""Writes a tensor's elements into a contiguous view of its shape and type, on any device."""

ALIGNMENT = 256  # bytes; of every tensor in a flat buffer and of every region in the arena


def align(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(slots=True)
class _Place:
    """One tensor's place in the flat buffer, everyone who holds it, and how it is packed."""

    owners: list[tuple[nn.Module, str]]
    source: Tensor | Reader | None
    parameter: nn.Parameter | None
    offset: int
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype
    empty: Tensor
    layout: bytes | None = None


class FlatUnit:
    """The tensors of a run of modules, parameters and buffers alike, laid out back to back.

    The unit starts bound to the tensors it was made of. `fill` writes them into a buffer, `bind`
    points the modules at a buffer's views, `unbind` leaves zero-size tensors behind, so that a
    use out of turn raises instead of reading somebody else's bytes.

    Args:
        readers: by the id of a tensor that is only a stand-in, what brings its elements.
    """

    def __init__(
        self,
        name: str,
        tensors: Iterable[tuple[nn.Module, str, Tensor]],
        readers: Mapping[int, Reader] | None = None,
    ) -> None:
        self.name = name
        self._places: list[_Place] = []
        self._views: dict[int, list[Tensor]] = {}
        seen: dict[int, _Place] = {}
        offset = 0
        for owner, attribute, tensor in tensors:
            if (place := seen.get(id(tensor))) is not None:
                place.owners.append((owner, attribute))
                continue
            nbytes = tensor.numel() * tensor.element_size()
            parameter = tensor if isinstance(tensor, nn.Parameter) else None
            place = _Place(
                owners=[(owner, attribute)],
                source=(readers or {}).get(id(tensor)) or tensor.detach(),
                parameter=parameter,
                offset=offset,
                nbytes=nbytes,
                shape=tensor.shape,
                dtype=tensor.dtype,
                empty=torch.empty(0, dtype=tensor.dtype),
            )
            seen[id(tensor)] = place
            self._places.append(place)
            offset += align(nbytes)
        self.nbytes = offset

    def pack(self, device: torch.device) -> None:
        """Let buffers that are filled from now on hold linear weights as `device` reads them best.

        Every buffer of a unit must be filled after the same choice. On a CPU, a weight that one
        linear layer holds and nobody else is packed where that is possible; see `packed`.
        """
        for place in self._places:
            held_by_one = len(place.owners) == 1 and place.parameter is not None
            owner, attribute = place.owners[0]
            packs = held_by_one and type(owner) is nn.Linear and attribute == "weight"
            on_cpu = packs and device.type == "cpu"
            place.layout = layout_of(place.shape, place.dtype) if on_cpu else None
        self._views.clear()

    def fill(self, buffer: Tensor) -> None:
        """Write the source tensors into `buffer` (uint8, `nbytes` long, any device)."""
        for place, view in zip(self._places, self._plain_views(buffer), strict=True):
            if place.source is None:
                raise StreamingError(f"unit {self.name}: its source was released; load it again")
            if isinstance(place.source, Tensor):
                view.copy_(place.source)
            else:
                place.source(view)
            if place.layout is not None:
                pack(view)

    def release_source(self) -> None:
        """Forget the source; from here on the unit lives in the buffers it filled."""
        for place in self._places:
            place.source = None

    def bind(self, buffer: Tensor) -> None:
        """Point every owner at the views of `buffer`."""
        self._point(self._views_of(buffer))

    def unbind(self) -> None:
        """Leave zero-size tensors behind."""
        self._point([place.empty for place in self._places])

    def restore(self) -> None:
        """Point every owner back at the source tensors, all of which must be in memory."""
        sources = [place.source for place in self._places if isinstance(place.source, Tensor)]
        if len(sources) < len(self._places):
            raise StreamingError(
                f"unit {self.name}: its source was released, or is not in memory; load it again"
            )
        self._point(sources)

    def forget_views(self) -> None:
        """Drop cached views of buffers that are about to be freed."""
        self._views.clear()

    def tensors(self) -> list[Tensor]:
        """The tensors the modules hold right now."""
        found: list[Tensor] = []
        for place in self._places:
            owner, attribute = place.owners[0]
            found.append(getattr(owner, attribute))
        return found

    def _point(self, views: Sequence[Tensor]) -> None:
        for place, view in zip(self._places, views, strict=True):
            if isinstance(view, PackedWeight):
                owner, attribute = place.owners[0]
                owner._parameters[attribute] = view
            elif place.parameter is not None:
                place.parameter.data = view
                if place.layout is not None:
                    owner, attribute = place.owners[0]
                    owner._parameters[attribute] = place.parameter
            else:
                for owner, attribute in place.owners:
                    owner._buffers[attribute] = view

    def _views_of(self, buffer: Tensor) -> list[Tensor]:
        views = self._views.get(buffer.data_ptr())
        if views is None:
            views = [
                view if place.layout is None else packed_view(view, place.layout)
                for place, view in zip(self._places, self._plain_views(buffer), strict=True)
            ]
            self._views[buffer.data_ptr()] = views
        return views

    def _plain_views(self, buffer: Tensor) -> list[Tensor]:
        if buffer.dtype != torch.uint8 or buffer.numel() < self.nbytes:
            raise StreamingError(
                f"unit {self.name}: needs {self.nbytes} bytes of uint8, "
                f"got {buffer.numel()} of {buffer.dtype}"
            )
        return [
            buffer[place.offset : place.offset + place.nbytes].view(place.dtype).view(place.shape)
            for place in self._places
        ]


def named_tensors(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Every (owner, attribute, tensor) below `module`, in module order, parameters first."""
    found: list[tuple[nn.Module, str, Tensor]] = []
    for owner in module.modules():
        found += [(owner, name, p) for name, p in owner._parameters.items() if p is not None]
        found += [(owner, name, b) for name, b in owner._buffers.items() if b is not None]
    return found
