"""Attributes: integers on a user's own modules that carry a width, and so must follow it.

torch's own layers are known (`layers`). For others, an integer (or one in a tuple) that the code has read and that
equals the size of an axis in the same module is a candidate; it is set with the removal and tried, and kept where the
smaller model is right with it and not without.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from decay_pruning.graph.axes import Atom, Axis, factors, leaves, product, terms
from decay_pruning.graph.positions import layout
from decay_pruning.structures import Coupling, LayerGroup, Place, Role

if TYPE_CHECKING:
    from decay_pruning.graph.trace import Trace

#: What hangs on a module and holds no numbers of the user's own.
_NUMBERLESS = nn.Module | torch.Tensor | type


@contextmanager
def reads(trace: Trace) -> Iterator[None]:
    """Note which numbers (and tuples and lists) on a user's own modules the code reads.

    For that they are not where Python looks first, so that it asks `nn.Module.__getattr__` for them.
    """
    hidden: dict[int, dict[str, Any]] = {}
    original = nn.Module.__getattr__

    def look(module: nn.Module, leaf: str) -> Any:
        mine = hidden.get(id(module), {})
        if leaf not in mine:
            return original(module, leaf)
        trace.integers.setdefault(trace.modules[module], {})[leaf] = mine[leaf]
        return mine[leaf]

    for module in trace.modules:
        if not _of_torch(module):
            own = vars(module)
            mine = {
                k: v
                for k, v in own.items()
                if type(v) in (int, float, tuple, list) and not hasattr(type(module), k)
            }
            hidden[id(module)] = mine
            for leaf in mine:
                del own[leaf]
    nn.Module.__getattr__ = look  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
        for module in trace.modules:
            for leaf, value in hidden.get(id(module), {}).items():
                vars(module).setdefault(leaf, value)


def _of_torch(module: nn.Module) -> bool:
    """Layers of torch, whose attributes are known; but not those that only carry a user's numbers."""
    known = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.Unflatten)
    return known or isinstance(module, torch.jit.ScriptModule)


@dataclass(frozen=True, eq=False)
class Candidate:
    """An attribute that may follow a layer group.

    Attributes:
        coupling: the positions of the layer group along the axis that is as long as the attribute says.
        near: the code of its own module splits the width.
        sure: nothing else in the module is as long.
    """

    coupling: Coupling
    axis: Axis
    near: bool
    sure: bool


class Attributes:
    """The integers on a user's own modules."""

    def __init__(self, trace: Trace) -> None:
        self._model = trace.model
        self._axes: dict[Place, Axis] = {d.place: d.axis for d in trace.dims.values()} | trace.attributes
        self._integers = {
            name: found for name, read in trace.integers.items() if (found := list(_integers(read)))
        }

    def of(self, group: LayerGroup, atom: Atom) -> list[Candidate]:
        """What may follow this layer group, whose positions are those of the atom."""
        inside: dict[str, list[Axis]] = {}
        for c in group.couplings:
            for name in _above(c.tensor):
                if name in self._integers:
                    inside.setdefault(name, []).append(self._axes[c.place])
        return [each for name, axes in inside.items() for each in self._in_module(name, axes, atom)]

    def elsewhere(self, group: LayerGroup, atom: Atom) -> str:
        """Numbers that cannot follow, in words: they stand on an object that is no module, such as a config."""
        lengths = _lengths([self._axes[c.place] for c in group.couplings], atom)
        for name in sorted(atom.users):
            module = self._model.get_submodule(name)
            code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
            said = code.co_names if code is not None else ()
            for thing in vars(module).values():
                if isinstance(thing, _NUMBERLESS) or not hasattr(thing, "__dict__"):
                    continue
                mine = [k for k, v in vars(thing).items() if k in said and type(v) is int and v in lengths]
                if mine:
                    owners = [m for m in self._model.modules() if any(v is thing for v in vars(m).values())]
                    shared = f", which {len(owners)} modules share" if len(owners) > 1 else ""
                    words = " and ".join(f"{type(thing).__name__}.{key}" for key in mine)
                    return f"; {words} cannot follow: no module's own{shared}"
        return ""

    def _in_module(self, name: str, axes: list[Axis], atom: Atom) -> Iterator[Candidate]:
        lengths = _lengths(axes, atom)
        prefix = f"{name}." if name else ""
        for leaf, d, value in self._integers[name]:
            place = prefix + leaf, d
            if value in lengths and place not in self._axes:
                others = (a for (n, _), a in self._axes.items() if n.startswith(prefix) and a.size == value)
                sure = all(any(found is atom for found in leaves(axis)) for axis in others)
                coupling = _coupling(place, lengths[value], atom)
                yield Candidate(coupling, lengths[value], name in atom.users, sure)


def _lengths(axes: list[Axis], atom: Atom) -> dict[int, Axis]:
    """Sizes that the code may name where a width stands: of axes with the atom in them, and of their parts."""
    lengths: dict[int, Axis] = {}
    for axis in axes:
        for part in (axis, *_parts(axis)):
            if part.size not in lengths and any(found is atom for found in leaves(part)):
                lengths[part.size] = part
    return lengths


def _above(name: str) -> Iterator[str]:
    """The modules that a parameter is in, the inner one first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _parts(axis: Axis) -> Iterator[Axis]:
    """Parts of an axis that the code may name: what is left without its outermost or innermost factor."""
    for term in terms(axis):
        yield term
        parts = factors(term)
        for k in range(1, len(parts)):
            yield product(*parts[k:])
            yield product(*parts[:k])
        yield from parts


def _integers(values: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Integers that can be a width, also those in tuples and lists."""
    for leaf, value in values.items():
        for d, each in enumerate(value if isinstance(value, tuple | list) else (value,)):
            if isinstance(each, int) and not isinstance(each, bool) and each > 1:
                yield leaf, d, each


def same(a: Axis, b: Axis) -> bool:
    """Whether two axes are made of the same atoms in the same way."""
    if a is b:
        return True
    one, other = layout(a), layout(b)
    return len(one) == len(other) and all(
        x[0] is y[0] and bool((x[2] == y[2]).all()) for x, y in zip(one, other, strict=True)
    )


def _coupling(place: Place, axis: Axis, atom: Atom) -> Coupling:
    found = [(owner, position) for each, owner, position in layout(axis) if each is atom]
    owner, position = (torch.cat([torch.from_numpy(pair[k].copy()) for pair in found]) for k in (0, 1))
    return Coupling(*place, Role.ATTRIBUTE, owner, position)
