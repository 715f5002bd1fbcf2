"""From axes to layer groups: which atoms are offered, and every tensor and attribute that goes with their positions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from decay_pruning.errors import ConfigError
from decay_pruning.graph import _reasons
from decay_pruning.graph.axes import (
    Atom,
    Axis,
    Indices,
    Misaligned,
    Reason,
    crossings,
    divide,
    factors,
    find,
    fix,
    is_fixed,
    layout,
    leaves,
    product,
    terms,
)
from decay_pruning.graph.trace import CROSSING, IGNORED, OPERATION, Dim, Trace
from decay_pruning.structures import Coupling, LayerGroup, Place, Role, StructureSet

HINT = "; if these are attention heads, give their number in heads={layer: number}"
_PRODUCES = (Role.ROW, Role.SCALE, Role.BIAS, Role.OTHER)


def owner_of(tensor: str) -> str:
    """The layer that a parameter belongs to, also where it is behind a parametrization."""
    head, _, leaf = tensor.rpartition(".")
    head = head.split("parametrizations.")[0].rstrip(".")
    plain = leaf.startswith(
        ("weight", "bias", "in_proj", "original", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    )
    return head if plain and head else tensor


# ---------------------------------------------------------------------------------------------------- choosing


def ignore(trace: Trace, skipped: set[int]) -> None:
    """Fix the widths that ignored modules and parameters produce."""
    parameters = dict(trace.model.named_parameters())
    owners = {name: trace.model.get_submodule(name.rpartition(".")[0]) for name in parameters}
    for (name, _), dim in trace.dims.items():
        if name not in parameters:
            continue
        inside = id(owners[name]) in skipped and dim.role is not Role.COLUMN
        if inside or (id(parameters[name]) in skipped and dim.role is not Role.COLUMN):
            fix(dim.axis, Reason(IGNORED, "ignored, as asked"))


def name_heads(trace: Trace, heads: Mapping[str, int], unknown: Callable[[str], str]) -> None:
    """Read the outputs of layers as heads: the heads stay, and the same offset of every head is a structure.

    Raises:
        ConfigError: no such layer, or a number of heads that does not divide its structures.
    """
    for name, count in heads.items():
        axes = [
            dim.axis
            for (tensor, _), dim in trace.dims.items()
            if dim.role is Role.ROW and owner_of(tensor) == name and not is_fixed(dim.axis)
        ]
        if not axes:
            raise ConfigError(unknown(name))
        for axis in axes:
            for term in {id(find(t)): t for t in terms(axis)}.values():
                free = [f for f in factors(term) if not is_fixed(f)]
                if not free:
                    continue
                width = product(*free)
                try:
                    if count < 1:
                        raise Misaligned
                    number, _ = divide(width, count)
                except Misaligned:
                    raise ConfigError(
                        f"heads[{name!r}] = {count} does not divide its {width.size} structures"
                    ) from None
                for atom in leaves(number):
                    atom.count = True


def choose(trace: Trace) -> None:
    """Where two families of structures share positions (heads and offsets in a head), at most one is offered."""
    for axis in trace.heads:
        for atom in leaves(axis):
            atom.head = True
    pairs: dict[tuple[int, int], tuple[Atom, Atom]] = {}
    for axis in _every_axis(trace):
        for a, b in crossings(axis):
            pairs[id(a), id(b)] = a, b
    for a, b in pairs.values():
        if a is b:
            fix(a, Reason(OPERATION, f"meets itself{_at(a)}"))
        elif a.reason is None and b.reason is None and (a.count or b.count):
            fix(a if a.count else b, Reason(OPERATION, f"counts equal parts{_at(a)}"))
    for a, b in pairs.values():
        if a.reason is None and b.reason is None:
            # whole heads; otherwise what the outer one counts
            less = b if a.head else a
            fix(less, Reason(CROSSING, f"is seen as {a.size} × {b.size}{_at(a) or _at(b)}"))


def _at(atom: Atom) -> str:
    return f" by {atom.site}" if atom.site else ""


def _every_axis(trace: Trace) -> Iterator[Axis]:
    for dim in trace.dims.values():
        yield dim.axis
    yield from trace.attributes.values()


# --------------------------------------------------------------------------------------------------- assembling


@dataclass
class _Family:
    """One atom and where it stands."""

    atom: Atom
    places: dict[Place, tuple[Role, list[Indices], list[Indices]]] = field(default_factory=dict)

    def add(self, place: Place, role: Role, owner: Indices, position: Indices) -> None:
        _, owners, positions = self.places.setdefault(place, (role, [], []))
        owners.append(owner)
        positions.append(position)

    def couplings(self) -> tuple[Coupling, ...]:
        found = []
        for (tensor, d), (role, owners, positions) in self.places.items():
            position, owner = np.concatenate(positions), np.concatenate(owners)
            order = np.argsort(position, kind="stable")
            found.append(
                Coupling(tensor, d, role, torch.from_numpy(owner[order]), torch.from_numpy(position[order]))
            )
        return tuple(found)

    def producers(self, aliases: Mapping[str, Sequence[str]]) -> list[str]:
        """Layers that produce this width, in the order of the model."""
        for role in _PRODUCES:
            found = self.members(aliases, (role,))
            if found:
                return found
        return [owner_of(tensor) for tensor, _ in self.places]

    def members(
        self, aliases: Mapping[str, Sequence[str]], roles: Collection[Role] = _PRODUCES
    ) -> list[str]:
        """Layers in whose parameters this width stands in one of these roles."""
        tensors = [tensor for (tensor, _), (mine, _, _) in self.places.items() if mine in roles]
        return list(dict.fromkeys(owner_of(name) for t in tensors for name in aliases.get(t, [t])))

    @property
    def produced(self) -> list[Place]:
        return [place for place, (role, _, _) in self.places.items() if role is Role.ROW]


def assemble(trace: Trace) -> tuple[StructureSet, dict[str, str], dict[str, str]]:
    """Layer groups and what is unprunable; where the user's code splits the width of each layer group; and for each
    layer the first that its width is known by."""
    parameters = dict(trace.model.named_parameters())
    families: dict[int, _Family] = {}
    sizes: dict[Place, int] = {}
    spots: list[tuple[Place, Axis, Role]] = []
    spots += [(dim.place, dim.axis, _role(dim, parameters)) for dim in trace.dims.values()]
    spots += [(place, axis, Role.ATTRIBUTE) for place, axis in trace.attributes.items()]
    for place, axis, role in spots:
        sizes[place] = axis.size
        for atom, owner, position in layout(axis):
            if atom.size > 1:
                families.setdefault(id(atom), _Family(atom)).add(place, role, owner, position)
    aliases = _aliases(trace.model)
    groups: dict[str, LayerGroup] = {}
    sites: dict[str, str] = {}
    shared: dict[str, str] = {}
    refused: list[tuple[list[str], str, list[Place]]] = []
    for family in families.values():
        tensors = [tensor for tensor, _ in family.places if tensor in parameters]
        if not tensors:
            continue
        names = family.producers(aliases)
        why = _refusal(trace, family, [parameters[t] for t in tensors])
        if why is not None:
            if family.produced:
                refused.append((names, why, family.produced))
                shared |= {n: names[0] for n in family.members(aliases) if n not in shared}
            continue
        if not family.produced:  # what no layer makes is no width of the model's own
            continue
        name = next((n for n in names if n not in groups), None)
        if name is None:
            first = min(int(positions[0].min()) for _, _, positions in family.places.values())
            name = f"{names[0]}[{first}:]"
        shared |= {n: name for n in family.members(aliases) if n not in shared}
        couplings = family.couplings()
        groups[name] = LayerGroup(name, torch.arange(family.atom.size), couplings, family.atom.mixed)
        if family.atom.site:
            sites[name] = family.atom.site + (HINT if family.atom.head else "")
    order = {name: k for k, name in enumerate(dict.fromkeys([*trace.modules.values(), *groups]))}
    groups = {name: groups[name] for name in sorted(groups, key=order.__getitem__)}
    unprunable: dict[str, str] = {}
    cut = {c.place for group in groups.values() for c in group.couplings}
    for names, why, places in refused:
        name = next((n for n in names if n not in groups), None)
        if name is not None and not cut.issuperset(places):
            unprunable.setdefault(name, why)
    return StructureSet(groups, sizes, unprunable), sites, shared


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """The first name of every parameter → all its names."""
    first = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(first[id(p)], []).append(name)
    return found


def _role(dim: Dim, parameters: Mapping[str, nn.Parameter]) -> Role:
    if dim.place[0] not in parameters:
        return Role.BUFFER
    return dim.role or Role.OTHER


def _refusal(trace: Trace, family: _Family, tensors: Sequence[nn.Parameter]) -> str | None:
    """Why this family is not offered."""
    if family.atom.reason is not None:
        return family.atom.reason.text
    if not any(p.requires_grad for p in tensors):
        return "all its parameters are frozen"
    names = {tensor for tensor, _ in family.places}
    if not names & trace.used:
        return _reasons.UNREACHED
    if not names & trace.live:
        return _reasons.DEAD
    return None
