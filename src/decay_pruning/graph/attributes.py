"""Attributes: integers on a user's own modules that carry a width, and so must follow it.

torch's own layers are known (`layers`). For others, an integer (or one in a tuple) that equals the size of an axis in
the same module is a candidate; it is set with the removal and tried, and kept where that makes the smaller model right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from decay_pruning.graph.axes import Axis, factors, layout, leaves, product, terms
from decay_pruning.graph.trace import Trace
from decay_pruning.structures import Coupling, LayerGroup, Place, Role, StructureSet


def with_candidates(trace: Trace, structures: StructureSet) -> StructureSet:
    """The layer groups that have candidates, with them. An attribute follows the first width that it equals."""
    axes: dict[Place, Axis] = {dim.place: dim.axis for dim in trace.dims.values()} | trace.attributes
    taken: dict[Place, Axis] = {}
    sizes = dict(structures.sizes)
    groups: dict[str, LayerGroup] = {}
    for name, group in structures.groups.items():
        couplings = []
        for place, axis in _candidates(trace, group, axes, structures):
            if _same(taken.setdefault(place, axis), axis):
                coupling = _coupling(place, axis, group, axes)
                if coupling is not None:
                    sizes[place] = axis.size
                    couplings.append(coupling)
        if couplings:
            groups[name] = replace(group, couplings=(*group.couplings, *couplings))
    return replace(structures, groups=groups, sizes=sizes)


def _candidates(
    trace: Trace, group: LayerGroup, axes: Mapping[Place, Axis], structures: StructureSet
) -> Iterator[tuple[Place, Axis]]:
    """Attributes of own modules, and the axis of this layer group in the same module that is as long."""
    atom = _atom(group, axes)
    for module, name in trace.modules.items():
        if type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.Unflatten):
            continue
        prefix = f"{name}." if name else ""
        lengths: dict[int, Axis] = {}
        for c in group.couplings:
            if c.tensor.startswith(prefix):
                for axis in (axes[c.place], *_parts(axes[c.place])):
                    if axis.size not in lengths and any(found is atom for found in leaves(axis)):
                        lengths[axis.size] = axis
        if lengths:
            for leaf, d, value in _integers(module):
                if value in lengths:
                    place = prefix + leaf, d
                    if place not in structures.sizes:
                        yield place, lengths[value]


def _parts(axis: Axis) -> Iterator[Axis]:
    """Parts of an axis that the code may name: what is left without its outermost or innermost factor."""
    for term in terms(axis):
        yield term
        parts = factors(term)
        for k in range(1, len(parts)):
            yield product(*parts[k:])
            yield product(*parts[:k])
        yield from parts


def _integers(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Integer attributes of a module, also those in tuples."""
    for leaf, value in vars(module).items():
        if leaf.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int) and value > 1:
            yield leaf, 0, value
        elif isinstance(value, tuple):
            for d, each in enumerate(value):
                if isinstance(each, int) and not isinstance(each, bool) and each > 1:
                    yield leaf, d, each


def _same(a: Axis, b: Axis) -> bool:
    if a is b:
        return True
    one, other = layout(a), layout(b)
    return len(one) == len(other) and all(
        x[0] is y[0] and bool((x[2] == y[2]).all()) for x, y in zip(one, other, strict=True)
    )


def _coupling(place: Place, axis: Axis, group: LayerGroup, axes: Mapping[Place, Axis]) -> Coupling | None:
    """Positions of the layer group's atom along the axis."""
    atom = _atom(group, axes)
    for found, owner, position in layout(axis):
        if found is atom:
            return Coupling(
                *place, Role.ATTRIBUTE, torch.from_numpy(owner.copy()), torch.from_numpy(position.copy())
            )
    return None


def _atom(group: LayerGroup, axes: Mapping[Place, Axis]) -> Any:
    """The atom of a layer group: the one that stands where its first coupling says."""
    first = group.couplings[0]
    for atom, owner, position in layout(axes[first.place]):
        if atom.size != len(group) or atom.reason is not None:
            continue
        mine = dict(zip(first.position.tolist(), first.owner.tolist(), strict=True))
        if all(mine.get(p) == o for p, o in zip(position.tolist(), owner.tolist(), strict=True)):
            return atom
    return None
