"""Proposals: what verification tries first, and what it tries where that fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from decay_pruning.graph.attributes import with_candidates
from decay_pruning.graph.axes import Atom
from decay_pruning.graph.choices import Choices
from decay_pruning.graph.families import assemble
from decay_pruning.graph.trace import Trace
from decay_pruning.structures import StructureSet


class Proposals:
    """Layer groups to try.

    A width that the code splits is tried with the user's own attributes that may carry it, any other without. Where
    that fails, it is the other way round; where that fails too, the families that were out for its sake come in.

    Attributes:
        assembly: the layer groups as they are assembled now.
    """

    def __init__(self, trace: Trace, allow_inexact: bool) -> None:
        self._trace = trace
        self._choices = Choices(trace)
        self.assembly = assemble(trace)
        self._allow_inexact = allow_inexact
        self._sites: dict[str, str] = {}
        self._turned: set[str] = set()  # tried in both ways
        self._lost: dict[int, tuple[Atom, str]] = {}  # failed in both

    def first(self) -> StructureSet:
        return self._tried(self.assembly.structures)

    def second(self, failed: Mapping[str, str]) -> StructureSet | None:
        """What to try in the place of layer groups that have failed, for these reasons."""
        fresh = {name for name in failed if name not in self._turned}
        groups = {name: self.assembly.structures.groups[name] for name in fresh}
        other = with_candidates(self._trace, replace(self.assembly.structures, groups=groups))
        again = {n: groups[n] if n in self.assembly.sites else group for n, group in other.groups.items()}
        self._turned |= fresh
        for name, why in failed.items():
            if name not in again:
                atom = self.assembly.atoms[name]
                self._lost[id(atom)] = atom, why
        if again:
            return replace(other, groups=again)
        return self._freed()

    def _freed(self) -> StructureSet | None:
        """The families that were out for the sake of what is lost."""
        freed = {id(atom) for atom in self._choices.second(self._lost, self._allow_inexact)}
        if not freed:
            return None
        names = {id(atom): name for name, atom in self.assembly.atoms.items() if atom.reason is None}
        self.assembly = assemble(self._trace, names)
        fresh = {name for name, atom in self.assembly.atoms.items() if id(atom) in freed}
        self._turned -= fresh
        groups = {name: group for name, group in self.assembly.structures.groups.items() if name in fresh}
        return self._tried(replace(self.assembly.structures, groups=groups))

    def _tried(self, structures: StructureSet) -> StructureSet:
        """Layer groups as they are tried first."""
        self._sites |= self.assembly.sites
        split = {name: group for name, group in structures.groups.items() if name in self.assembly.sites}
        found = with_candidates(self._trace, replace(structures, groups=split))
        return replace(structures, groups={**structures.groups, **found.groups}, sizes=found.sizes)

    def located(self, structures: StructureSet) -> StructureSet:
        """Name the line that splits a width whose removal fails: there stands a number that does not follow it."""
        told = {
            name: f"{why}; its width is split by {self._sites[name]}" if name in self._sites else why
            for name, why in structures.unprunable.items()
        }
        return replace(structures, unprunable=told)
