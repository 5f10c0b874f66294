"""From decoder layers to units: runs of modules in traced call order, and the tensors of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from select_n_core.config import UnitKind
from select_n_core.errors import UnsupportedModelError
from select_n_core.models.seam import ChildCalls
from select_n_core.units import FlatUnit, Reader, named_tensors


@dataclass(frozen=True, slots=True)
class Run:
    """Modules that are called one after the other and make up a unit."""

    name: str
    modules: tuple[nn.Module, ...]

    @property
    def first(self) -> nn.Module:
        """The unit must be there before this module's forward."""
        return self.modules[0]

    @property
    def last(self) -> nn.Module:
        """The unit is not needed any more after this module's forward; may be `first`."""
        return self.modules[-1]

    def tensors(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Every (owner, attribute, tensor) of its modules."""
        return [entry for module in self.modules for entry in named_tensors(module)]


def runs_of(layers: Sequence[nn.Module], calls: Sequence[ChildCalls], kind: UnitKind) -> list[Run]:
    """The units' modules in call order.

    Args:
        layers, calls: the decoder layers in call order, and how each calls its children.

    Raises:
        UnsupportedModelError: a layer cannot be cut into halves.
    """
    if kind == "layer":
        return [Run(f"layer{index}", (layer,)) for index, layer in enumerate(layers)]
    return [
        run
        for index, (layer, made) in enumerate(zip(layers, calls, strict=True))
        for run in _halves(index, layer, made)
    ]


def _halves(index: int, layer: nn.Module, calls: ChildCalls) -> tuple[Run, Run]:
    """Up to the child that attends, and what comes behind it."""
    if calls.attends is None or calls.nested:
        raise _uncuttable(index, "does not call its parts one after the other")
    children = {name: child for name, child in layer.named_children() if named_tensors(child)}
    cut = calls.attends + 1
    halves = []
    for which, names in (("first", calls.names[:cut]), ("second", calls.names[cut:])):
        heavy = [name for name in names if name in children]
        if not heavy:
            raise _uncuttable(index, f"has no weights in its {which} half")
        halves.append(Run(f"layer{index}.{which}", tuple(children[name] for name in heavy)))
    for name in children:
        if calls.names.count(name) > 1:
            raise _uncuttable(index, f"calls its '{name}' more than once")
    first, second = halves
    inside = [{id(tensor) for _, _, tensor in half.tensors()} for half in halves]
    if inside[0] & inside[1]:
        raise _uncuttable(index, "uses one tensor in both halves")
    for owner, attribute, tensor in named_tensors(layer):
        if id(tensor) not in inside[0] | inside[1]:
            holder = "itself" if owner is layer else f"in a {type(owner).__name__} it never calls"
            raise _uncuttable(index, f"holds '{attribute}' {holder}")
    return first, second


def _uncuttable(index: int, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"its layer {index} cannot be cut into halves, because it {why}; write `units: layer`",
        field="units",
    )


def split(
    module: nn.Module, runs: Sequence[Run], readers: Mapping[int, Reader]
) -> tuple[list[FlatUnit], FlatUnit]:
    """A tensor reached from one run alone belongs to its unit; everything else is static.

    Args:
        readers: of tensors that are stand-ins, by their id.
    """
    reached: dict[int, set[int]] = {}
    owned_inside: dict[int, int] = {}
    inside = [run.tensors() for run in runs]
    for index, tensors in enumerate(inside):
        for _, _, tensor in tensors:
            reached.setdefault(id(tensor), set()).add(index)
            owned_inside[id(tensor)] = owned_inside.get(id(tensor), 0) + 1
    everything = named_tensors(module)
    holders: dict[int, int] = {}
    for _, _, tensor in everything:
        holders[id(tensor)] = holders.get(id(tensor), 0) + 1

    def in_unit(tensor: Tensor) -> bool:
        key = id(tensor)
        return len(reached.get(key, ())) == 1 and holders[key] == owned_inside[key]

    units = [
        FlatUnit(run.name, [entry for entry in tensors if in_unit(entry[2])], readers)
        for run, tensors in zip(runs, inside, strict=True)
    ]
    static = [entry for entry in everything if not in_unit(entry[2])]
    return units, FlatUnit("static", static, readers)
