"""Families: from axes to layer groups, with every tensor and attribute that goes with the positions of an atom."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from decay_pruning.graph import _reasons
from decay_pruning.graph.axes import Atom, Axis
from decay_pruning.graph.names import owner_of
from decay_pruning.graph.positions import Indices, layout
from decay_pruning.graph.trace import Dim, Trace
from decay_pruning.structures import Coupling, LayerGroup, Place, Role, StructureSet

_PRODUCES = (Role.ROW, Role.SCALE, Role.BIAS, Role.OTHER)


@dataclass
class _Family:
    """One atom and where it stands."""

    atom: Atom
    places: dict[Place, tuple[Role, list[Indices], list[Indices]]] = field(default_factory=dict)

    def add(self, place: Place, role: Role, owner: Indices, position: Indices) -> None:
        _, owners, positions = self.places.setdefault(place, (role, [], []))
        owners.append(owner)
        positions.append(position)

    def group(self, name: str) -> LayerGroup:
        found = []
        for (tensor, d), (role, owners, positions) in self.places.items():
            position, owner = positions[0], owners[0]
            if len(positions) > 1:
                position, owner = np.concatenate(positions), np.concatenate(owners)
            if bool((position[1:] < position[:-1]).any()):
                order = np.argsort(position, kind="stable")
                position, owner = position[order], owner[order]
            found.append(Coupling(tensor, d, role, torch.tensor(owner), torch.tensor(position)))
        return LayerGroup(name, torch.arange(self.atom.size), tuple(found), self.atom.mixed)

    def producers(self, aliases: Mapping[str, Sequence[str]]) -> list[str]:
        """Layers that produce this width, in the order of the model."""
        for role in _PRODUCES:
            found = self.members(aliases, (role,))
            if found:
                return found
        return [owner_of(tensor) for tensor, _ in self.places]

    def members(self, aliases: Mapping[str, Sequence[str]], roles: Collection[Role] = _PRODUCES) -> list[str]:
        """Layers in whose parameters this width stands in one of these roles."""
        tensors = [tensor for (tensor, _), (mine, _, _) in self.places.items() if mine in roles]
        return list(dict.fromkeys(owner_of(name) for t in tensors for name in aliases.get(t, [t])))

    def name(self, producers: Sequence[str], taken: Collection[str]) -> str:
        """The first layer that produces this width and names no other one; or a layer and where it starts there."""
        free = next((name for name in producers if name not in taken), None)
        if free is not None:
            return free
        starts = [
            (role not in _PRODUCES or owner_of(tensor) != producers[0], int(position.min()))
            for (tensor, _), (role, _, positions) in self.places.items()
            for position in positions
        ]
        _, first = min(starts)
        return f"{producers[0]}[{first}:]"

    @property
    def produced(self) -> list[Place]:
        return [place for place, (role, _, _) in self.places.items() if role is Role.ROW]

    def claim(self, parameters: Mapping[str, Tensor]) -> None:
        """A width that no layer makes is made by the first tensor whose use says nothing else."""
        if self.atom.reason is None and not self.produced:
            for place, (role, owners, positions) in self.places.items():
                if role is Role.OTHER and place[0] in parameters and parameters[place[0]].ndim > 1:
                    self.places[place] = Role.ROW, owners, positions
                    break


@dataclass
class Assembly:
    """What the axes of a trace come to.

    Attributes:
        structures: layer groups, and what is unprunable.
        atoms: layer group → its atom.
        sites: layer group → where the user's code splits its width.
        shared: layer → the first layer that its width is known by.
    """

    structures: StructureSet
    atoms: dict[str, Atom]
    sites: dict[str, str]
    shared: dict[str, str]


def assemble(trace: Trace, names: Mapping[int, str] = {}) -> Assembly:
    """Layer groups of all atoms that are free. `names` are those that atoms (by identity) have had before."""
    families, sizes = _families(trace)
    aliases = _aliases(trace.model)
    found = Assembly(StructureSet({}, sizes), {}, {}, {})
    groups: dict[str, LayerGroup] = {}
    refused: list[tuple[list[str], str, list[Place]]] = []
    for family in families:
        family.claim(trace.parameters)
        producers = family.producers(aliases)
        why = _refusal(trace, family)
        if not family.produced:  # what no layer makes is no width of the model's own
            continue
        if why is not None:
            name = producers[0]
            refused.append((producers, why, family.produced))
        else:
            name = names.get(id(family.atom)) or family.name(producers, {*groups, *names.values()})
            groups[name] = family.group(name)
            found.atoms[name] = family.atom
            if family.atom.site:
                found.sites[name] = family.atom.site
        found.shared |= {n: name for n in family.members(aliases) if n not in found.shared}
    order = {name: k for k, name in enumerate(dict.fromkeys([*trace.modules.values(), *groups]))}
    groups = {name: groups[name] for name in sorted(groups, key=order.__getitem__)}
    found.structures = StructureSet(
        groups, sizes, _unprunable(groups, refused), frozenset(trace.standardised)
    )
    return found


def _families(trace: Trace) -> tuple[list[_Family], dict[Place, int]]:
    """All atoms that stand in a parameter, in the order of the model, and the size of every place."""
    spots: list[tuple[Place, Axis, Role]] = [
        (dim.place, dim.axis, _role(trace, dim)) for dim in trace.dims.values()
    ]
    spots += [(place, axis, Role.ATTRIBUTE) for place, axis in trace.attributes.items()]
    families: dict[int, _Family] = {}
    for place, axis, role in spots:
        for atom, owner, position in layout(axis):
            if atom.size > 1:
                families.setdefault(id(atom), _Family(atom)).add(place, role, owner, position)
    return list(families.values()), {place: axis.size for place, axis, _ in spots}


def _role(trace: Trace, dim: Dim) -> Role:
    return (dim.role or Role.OTHER) if dim.place[0] in trace.parameters else Role.BUFFER


def _unprunable(
    groups: Mapping[str, LayerGroup], refused: Sequence[tuple[list[str], str, list[Place]]]
) -> dict[str, str]:
    """Of each family that is not offered the first layer that is no layer group, unless all it makes is cut."""
    found: dict[str, str] = {}
    cut = {c.place for group in groups.values() for c in group.couplings}
    for producers, why, places in refused:
        name = next((n for n in producers if n not in groups), None)
        if name is not None and not cut.issuperset(places):
            found.setdefault(name, why)
    return found


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """The first name of every parameter → all its names."""
    first = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(first[id(p)], []).append(name)
    return found


def _refusal(trace: Trace, family: _Family) -> str | None:
    """Why this family is not offered."""
    if family.atom.reason is not None:
        return family.atom.reason.text
    names = {tensor for tensor, _ in family.places} & trace.parameters.keys()
    if not any(trace.parameters[name].requires_grad for name in names):
        return "all its parameters are frozen"
    if not names & trace.used:
        return _reasons.UNREACHED
    if not names & trace.live:
        return _reasons.DEAD
    return None
