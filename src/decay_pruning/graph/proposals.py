"""Proposals: what verification tries first, and what it tries where that fails."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from decay_pruning import surgery
from decay_pruning.folds import Fold
from decay_pruning.graph.attributes import Attributes, Candidate, same
from decay_pruning.graph.axes import Atom, Axis, Misaligned, find, leaves, unify
from decay_pruning.graph.choices import Choices
from decay_pruning.graph.families import assemble
from decay_pruning.graph.scales import Option, Scales
from decay_pruning.graph.trace import Trace
from decay_pruning.graph.verification import kind_of
from decay_pruning.structures import LayerGroup, Place, StructureSet

#: Attributes that follow a layer group, and folds that go with it.
Variant = tuple[Candidate | Option, ...]
#: Classes and names of attributes: what a choice has in common for layer groups of one kind.
Labels = frozenset[Hashable]


@dataclass
class _Search:
    """Layer groups of one kind that have failed, and the variants of the first of them that are left to try."""

    left: list[Labels]
    reasons: dict[str, str] = field(default_factory=dict)
    tried: Labels = frozenset()
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
        self._scales = Scales(trace)
        self._choices = Choices(trace)
        self._attributes = Attributes(trace)
        self._allow_inexact = allow_inexact
        self.assembly = assemble(trace)
        self._sites: dict[str, str] = {}
        self._ties: dict[str, str] = {}  # layer group → the one that it became one with
        self._folds: dict[str, list[Fold]] = {}  # that go with a layer group
        self._taken: dict[Place, tuple[str, Axis]] = {}  # attributes that follow a layer group
        self._searches: dict[Hashable, _Search] = {}
        self._helpless: dict[str, str] = {}  # what was tried in vain, in words
        self._known: dict[int, list[Variant]] = {}  # by identity of the atom
        self._lost: dict[int, tuple[Atom, str]] = {}

    def first(self) -> StructureSet:
        """Every layer group, without any attribute of the user's own."""
        self._sites |= self.assembly.sites
        return self._set({name: self._variants(name)[0] for name in self.assembly.structures.groups})

    def second(self, failed: Mapping[str, str] | None) -> StructureSet | None:
        """What to try in place of layer groups that have failed, for these reasons; None: all others have passed."""
        last, failed = failed is None, failed or {}
        for name, why in failed.items():
            self._taken = {p: (owner, axis) for p, (owner, axis) in self._taken.items() if owner != name}
            kind = kind_of(self._trace.model, self.assembly.structures.groups[name])
            if kind not in self._searches:
                labels = dict.fromkeys(self._labels(variant) for variant in self._variants(name)[1:])
                self._searches[kind] = _Search(list(labels))
            search = self._searches[kind]
            if search.done:  # what has helped another one, or fitted in shape, does not help here
                search.reasons, search.done = {}, False
            search.reasons.setdefault(name, why)
        todo: dict[str, Variant] = {}
        for search in self._searches.values():
            if not search.done:
                todo |= self._next(search, failed)
        return self._set(todo) if todo else self._freed(last)

    def _next(self, search: _Search, failed: Mapping[str, str]) -> dict[str, Variant]:
        """The next choice for the first layer group; once it has passed, the same one for all others."""
        first, *others = search.reasons
        if first in failed and search.tried:
            for name in search.reasons:
                self._note(name, search.tried, failed[first])
        if first not in failed:
            search.done = True
            return {name: self._alike(name, search.tried) or () for name in others}
        while search.left:
            search.tried = search.left.pop(0)
            variant = self._alike(first, search.tried)
            if variant is not None and self._takes(first, variant):
                return {first: variant}
        search.done = True
        self._lose(search.reasons)
        return {}

    def _takes(self, name: str, variant: Variant) -> bool:
        """Whether the attributes are free for this layer group, which then has them: a number follows one width."""
        attributes = [each for each in variant if isinstance(each, Candidate)]
        for each in attributes:
            owner, axis = self._taken.get(each.coupling.place, (name, each.axis))
            if owner != name and not same(axis, each.axis):
                return False
        self._taken |= {each.coupling.place: (name, each.axis) for each in attributes}
        return True

    def _alike(self, name: str, labels: Labels) -> Variant | None:
        """The attributes of a layer group that are called like this."""
        return next((v for v in self._variants(name) if self._labels(v) == labels), None)

    def _labels(self, variant: Variant) -> Labels:
        found = set[Hashable]()
        for each in variant:
            tensor, dim = each.fold.place if isinstance(each, Option) else each.coupling.place
            owner, leaf = surgery.parent(self._trace.model, tensor)
            found.add((type(owner), leaf, dim, isinstance(each, Option)))
        return frozenset(found)

    def _note(self, name: str, tried: Labels, why: str) -> None:
        """Remember the attributes that were set in vain, if they all stand where the width is split."""
        variant = self._alike(name, tried) or ()
        attributes = [each for each in variant if isinstance(each, Candidate)]
        if attributes and all(each.near for each in attributes) and name not in self._helpless:
            told = ", ".join(sorted({each.coupling.tensor for each in attributes}))
            self._helpless[name] = f"; nor with {told} following ({why.partition('fails: ')[2] or why})"

    def _lose(self, reasons: Mapping[str, str]) -> None:
        for name, why in reasons.items():
            atom = self.assembly.atoms[name]
            self._lost[id(atom)] = atom, why

    def _freed(self, last: bool) -> StructureSet | None:
        """The families that were out for the sake of what is lost."""
        if not last and self._waits():
            return None
        if tied := self._tied():
            return self._again(tied)
        freed = {id(atom) for atom in self._choices.second(self._lost, self._allow_inexact)}
        self._lost = {}
        return self._again(freed) if freed else None

    def _waits(self) -> bool:
        """Whether something that is lost may still be tied to what has not failed so far."""
        groups = self.assembly.structures.groups
        places: dict[Place, set[bool]] = {}
        for name, atom in self.assembly.atoms.items():
            if atom.reason is None:
                for each in self._attributes.of(groups[name], atom):
                    places.setdefault(each.coupling.place, set()).add(id(atom) in self._lost)
        return any(len(some) == 2 for some in places.values())

    def _tied(self) -> set[int]:
        """Tie widths that are lost and that one number on a module stands for: both are as wide as it says.

        So it is with the offsets in a head of queries and keys on one side, and of values on the other.
        """
        groups = self.assembly.structures.groups
        names = {name: atom for name, atom in self.assembly.atoms.items() if id(atom) in self._lost}
        first: dict[Place, tuple[str, Axis]] = {}
        tied: dict[str, str] = {}
        for name, atom in names.items():
            for each in self._attributes.of(groups[name], atom):
                other, axis = first.setdefault(each.coupling.place, (name, each.axis))
                if other == name or not each.near:
                    continue
                with suppress(Misaligned):
                    unify(axis, each.axis)
                    tied[name] = other
        for name, other in tied.items():
            for atom in (names[name], names[other]):
                self._lost.pop(id(atom), None)
                self._known.pop(id(atom), None)
        self._ties |= tied
        if tied:  # layer groups of a new kind, whatever they look like
            self._searches.clear()
        return {id(atom) for name in tied.values() for atom in leaves(names[name])}

    def _again(self, freed: Collection[int]) -> StructureSet:
        """Assemble anew, and try what is free now."""
        names: dict[int, str] = {}
        for name, atom in self.assembly.atoms.items():
            now = find(atom)
            if isinstance(now, Atom) and now.reason is None:
                names.setdefault(id(now), name)
        self.assembly = assemble(self._trace, names)
        self._sites |= self.assembly.sites
        fresh = [name for name, atom in self.assembly.atoms.items() if id(atom) in freed]
        return self._set({name: self._variants(name)[0] for name in fresh})

    # ------------------------------------------------------------------------------------------- attributes

    def _set(self, chosen: Mapping[str, Variant]) -> StructureSet:
        """Layer groups, with these attributes."""
        structures = self.assembly.structures
        sizes = dict(structures.sizes)
        groups: dict[str, LayerGroup] = {}
        for name, variant in chosen.items():
            group = structures.groups[name]
            more = []
            self._folds[name] = [each.fold for each in variant if isinstance(each, Option)]
            for each in variant:
                if isinstance(each, Option):
                    continue
                _, axis = self._taken.setdefault(each.coupling.place, (name, each.axis))
                if same(axis, each.axis):
                    sizes[each.coupling.place] = each.axis.size
                    more.append(each.coupling)
            groups[name] = replace(group, couplings=(*group.couplings, *more))
        folds = [*self._scales.sure, *(fold for some in self._folds.values() for fold in some)]
        outputs = self._trace.outputs.of(self.assembly.atoms)
        return replace(structures, groups=groups, sizes=sizes, folds=tuple(folds), outputs=outputs)

    def _variants(self, name: str) -> list[Variant]:
        """Choices of attributes, none first."""
        atom = self.assembly.atoms[name]
        if id(atom) in self._known:
            return self._known[id(atom)]
        every = self._attributes.of(self.assembly.structures.groups[name], atom)
        options = tuple(each for each in self._scales.options if any(a is atom for a in leaves(each.axis)))
        choices: list[Variant] = [()]
        for some in ([c for c in every if c.near], every):
            sure = tuple(each for each in some if each.sure)
            doubtful = [each for each in some if not each.sure][:6]
            choices += [sure, *((each,) for each in some[:6]), *((*sure, each) for each in doubtful)]
            choices += [tuple(e for e in some if e is not each) for each in doubtful] + [tuple(some)]
        if options:
            pairs = [(choice, (*choice, *options)) for choice in choices]
            turned = any(each.first for each in options)
            choices = [each for pair in pairs for each in (reversed(pair) if turned else pair)]
        self._known[id(atom)] = found = list(dict.fromkeys(choices))
        return found

    def located(self, structures: StructureSet) -> StructureSet:
        """Name the line that splits a width whose removal fails: there stands a number that does not follow it."""
        told = dict(structures.unprunable)
        for name, other in self._ties.items():
            if other in structures.groups:
                told.pop(name, None)
        for name in told.keys() & self._sites.keys():
            site = self._sites[name]
            made = site.startswith(("new_", "zeros", "ones", "empty", "full", "rand", "arange"))
            told[name] += f"; its width is {'written in' if made else 'split by'} {site}"
            if name in self.assembly.atoms:
                group = self.assembly.structures.groups[name]
                told[name] += self._attributes.elsewhere(group, self.assembly.atoms[name])
            told[name] += self._helpless.get(name, "")
        return replace(structures, unprunable=told)
