"""Wanted outputs: which outputs of a model keep their shape, by the names that the user gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from decay_pruning.checks import did_you_mean, shown
from decay_pruning.errors import ConfigError
from decay_pruning.graph.axes import Atom, Axes
from decay_pruning.graph.positions import layout
from decay_pruning.outputs import Outputs, Part, Spot, named, wanted


@dataclass
class Wanted:
    """What the user asks for, and what the runs of a model return.

    Attributes:
        asked: names or numbers of outputs that keep their shape; none for all.
        axes: axes of the others, by name.
        seen: names of all outputs in all runs.
        found: what was asked for and is there.
    """

    asked: tuple[str | int, ...] = ()
    axes: dict[str, Axes] = field(default_factory=dict)
    seen: dict[str, None] = field(default_factory=dict)
    found: set[str | int] = field(default_factory=set)

    def names(self, output: Any, count: int) -> list[str | None]:
        """For each tensor that a run returns its name, if it may lose width, or None."""
        if not self.asked:
            return [None] * count
        known = [name for name, _ in named(output)]
        self.seen |= dict.fromkeys(known)
        length = len(output) if isinstance(output, list | tuple) else 0
        keep = {str(n + length if isinstance(n, int) and n < 0 else n): n for n in self.asked}
        self.found |= {n for name, n in keep.items() if any(wanted(each, [name]) for each in known)}
        here = [wanted(name, keep) for name in known]
        if len(known) != count or not any(here):
            return [None] * count
        return [None if kept else name for name, kept in zip(known, here, strict=True)]

    def check(self) -> None:
        """Every name that was asked for is there.

        Raises:
            ConfigError: it is not; the message lists those that are.
        """
        names = [name for name in self.seen if name]
        for each in self.asked:
            if each not in self.found:
                there = (
                    f"its outputs are {', '.join(names)}"
                    if names
                    else "it returns one tensor, without a name"
                )
                hint = did_you_mean(each, names) if isinstance(each, str) else ""
                raise ConfigError(f"outputs: the model returns no {shown(each)}; {there}{hint}")

    def of(self, groups: Mapping[str, Atom]) -> Outputs:
        """Where layer groups (each with its atom) stand in the outputs that may lose width."""
        owners = {id(atom): name for name, atom in groups.items()}
        parts: list[Part] = []
        sizes: dict[Spot, int] = {}
        for output, axes in self.axes.items():
            for d, axis in enumerate(axes):
                sizes[output, d] = axis.size
                for atom, owner, position in layout(axis):
                    if id(atom) in owners:
                        tensors = (torch.from_numpy(each.copy()) for each in (owner, position))
                        parts.append(Part((output, d), owners[id(atom)], *tensors))
        return Outputs(tuple(map(str, self.asked)), tuple(parts), sizes)
