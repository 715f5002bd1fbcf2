"""Proposals: what verification tries first, and what it tries where that fails."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from decay_pruning.graph._verify import kind_of
from decay_pruning.graph.attributes import Attributes, Candidate, same
from decay_pruning.graph.axes import Atom, Axis
from decay_pruning.graph.choices import Choices
from decay_pruning.graph.families import assemble
from decay_pruning.graph.trace import Trace
from decay_pruning.structures import LayerGroup, Place, StructureSet

Variant = tuple[Candidate, ...]


@dataclass
class _Search:
    """Layer groups of one kind that have failed, and the variants of the first of them that are left to try."""

    left: list[int]
    reasons: dict[str, str] = field(default_factory=dict)
    tried: int = 0
    done: bool = False


class Proposals:
    """Layer groups to try.

    Each is tried as it is first. Where that fails, choices of the user's own attributes follow it, the smaller ones
    first, for one layer group of each kind: what helps it helps the others. Where none helps, the families that were
    out for its sake come in.

    Attributes:
        assembly: the layer groups as they are assembled now.
    """

    def __init__(self, trace: Trace, allow_inexact: bool) -> None:
        self._trace = trace
        self._choices = Choices(trace)
        self._attributes = Attributes(trace)
        self._allow_inexact = allow_inexact
        self.assembly = assemble(trace)
        self._sites: dict[str, str] = {}
        self._taken: dict[Place, tuple[str, Axis]] = {}  # attributes that follow a layer group
        self._searches: dict[Hashable, _Search] = {}
        self._known: dict[int, list[Variant]] = {}  # by identity of the atom
        self._lost: dict[int, tuple[Atom, str]] = {}

    def first(self) -> StructureSet:
        """Every layer group, without any attribute of the user's own."""
        self._sites |= self.assembly.sites
        return self._set(dict.fromkeys(self.assembly.structures.groups, 0))

    def second(self, failed: Mapping[str, str]) -> StructureSet | None:
        """What to try in the place of layer groups that have failed, for these reasons."""
        for name, why in failed.items():
            self._taken = {p: (owner, axis) for p, (owner, axis) in self._taken.items() if owner != name}
            kind = kind_of(self._trace.model, self.assembly.structures.groups[name])
            search = self._searches.setdefault(kind, _Search(list(range(1, len(self._variants(name))))))
            if search.done:
                self._lose({name: why})
            else:
                search.reasons.setdefault(name, why)
        todo: dict[str, int] = {}
        for search in self._searches.values():
            if not search.done:
                todo |= self._next(search, failed)
        return self._set(todo) if todo else self._freed()

    def _next(self, search: _Search, failed: Mapping[str, str]) -> dict[str, int]:
        """The next variant of the first layer group; once it has passed, the same one of all others."""
        first, *others = search.reasons
        search.done = first not in failed or not search.left
        if first not in failed:
            return dict.fromkeys(others, search.tried)
        if search.done:
            self._lose(search.reasons)
            return {}
        search.tried = search.left.pop(0)
        return {first: search.tried}

    def _lose(self, reasons: Mapping[str, str]) -> None:
        for name, why in reasons.items():
            atom = self.assembly.atoms[name]
            self._lost[id(atom)] = atom, why

    def _freed(self) -> StructureSet | None:
        """The families that were out for the sake of what is lost."""
        freed = {id(atom) for atom in self._choices.second(self._lost, self._allow_inexact)}
        self._lost = {}
        if not freed:
            return None
        names = {id(atom): name for name, atom in self.assembly.atoms.items() if atom.reason is None}
        self.assembly = assemble(self._trace, names)
        self._sites |= self.assembly.sites
        fresh = [name for name, atom in self.assembly.atoms.items() if id(atom) in freed]
        return self._set(dict.fromkeys(fresh, 0))

    # ------------------------------------------------------------------------------------------- attributes

    def _set(self, chosen: Mapping[str, int]) -> StructureSet:
        """Layer groups in the variants of these numbers."""
        structures = self.assembly.structures
        sizes = dict(structures.sizes)
        groups: dict[str, LayerGroup] = {}
        for name, number in chosen.items():
            group, variants = structures.groups[name], self._variants(name)
            more = []
            for each in variants[min(number, len(variants) - 1)]:
                _, axis = self._taken.setdefault(each.coupling.place, (name, each.axis))
                if same(axis, each.axis):
                    sizes[each.coupling.place] = each.axis.size
                    more.append(each.coupling)
            groups[name] = replace(group, couplings=(*group.couplings, *more))
        return replace(structures, groups=groups, sizes=sizes)

    def _variants(self, name: str) -> list[Variant]:
        """Choices of attributes."""
        atom = self.assembly.atoms[name]
        if id(atom) in self._known:
            return self._known[id(atom)]
        every = tuple(self._attributes.of(self.assembly.structures.groups[name], atom))
        sure = tuple(each for each in every if each.sure)
        doubtful = [each for each in every if not each.sure][:6]
        choices: list[Variant] = [(), sure, *((each,) for each in every[:6])]
        choices += [(*sure, each) for each in doubtful]
        choices += [tuple(e for e in every if e is not each) for each in doubtful]
        choices.append(every)
        self._known[id(atom)] = found = list(dict.fromkeys(choices))
        return found

    def located(self, structures: StructureSet) -> StructureSet:
        """Name the line that splits a width whose removal fails: there stands a number that does not follow it."""
        told = {
            name: f"{why}; its width is split by {self._sites[name]}" if name in self._sites else why
            for name, why in structures.unprunable.items()
        }
        return replace(structures, unprunable=told)
