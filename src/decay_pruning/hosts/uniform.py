"""Uniform widths: layer groups of the same kind in all layers lose the same number of structures.

Where the model has a config, kinds are what its numbers name (see `configs`). Elsewhere, layers of which the names
differ by their number alone are of one kind. What belongs to no kind keeps its width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from decay_pruning import configs
from decay_pruning.structures import StructureSet


@dataclass
class Kinds:
    """Which layer groups come to the same width, and which widths are possible.

    Attributes:
        of: layer group → its kind; what is absent is kept.
        whole: kind → its width before anything was removed, which is always possible.
        round_to: other widths are multiples of this,
        takes: and of those that this says of a kind.
    """

    of: Mapping[str, str]
    whole: Mapping[str, int]
    round_to: int = 1
    takes: Callable[[str, int], bool] = lambda kind, width: True
    _seen: dict[tuple[str, int], bool] = field(default_factory=dict)

    def up(self, kind: str, width: int, most: int) -> int:
        """The least possible width from here on; `most` where none is."""
        return next((w for w in range(width, most) if self.possible(kind, w)), most)

    def down(self, kind: str, width: int) -> int:
        """The largest possible width up to here; this one where none is."""
        return next((w for w in range(width, 0, -1) if self.possible(kind, w)), width)

    def possible(self, kind: str, width: int) -> bool:
        """Whether a kind can have this width, for all that is known of it alone."""
        if (kind, width) not in self._seen:
            other = width % self.round_to == 0 and self.takes(kind, width)
            self._seen[kind, width] = other or width == self.whole[kind]
        return self._seen[kind, width]

    def even(self, structures: StructureSet, fading: Mapping[str, Tensor]) -> bool:
        """Whether all layer groups of a kind have the same possible width when what fades is gone."""
        left = {(kind, len(structures.groups[n]) - int(fading[n].sum())) for n, kind in self.of.items()}
        return len(left) == len(self.whole) and all(self.possible(*each) for each in left)


def kinds(model: nn.Module, structures: StructureSet, round_to: int = 1) -> Kinds:
    """The kinds of a model that is as it was built."""
    try:
        sizes = configs.Sizes(model)
    except ValueError:
        return _by_name(structures, round_to)
    if sizes.shapes != {name: tuple(p.shape) for name, p in model.named_parameters()}:
        return _by_name(structures, round_to)  # it is no longer what its config says
    apart = configs.told_apart(model, structures)
    named = {name: units for name, units in configs.kinds(sizes, structures).items() if name not in apart}
    of = {name: " and ".join(sorted(units)) for name, units in named.items()}
    units = {of[name]: each for name, each in named.items()}

    def takes(kind: str, width: int) -> bool:
        return sizes.accepts({number: width * each for number, each in units[kind].items()})

    return Kinds(of, {kind: len(structures.groups[name]) for name, kind in of.items()}, round_to, takes)


def _by_name(structures: StructureSet, round_to: int) -> Kinds:
    of, whole = {}, {}
    for name, group in structures.groups.items():
        if any(_numbered(c.tensor) for c in group.couplings):
            of[name] = f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', name)} of {len(group)}"
            whole[of[name]] = len(group)
    return Kinds(of, whole, round_to)


def _numbered(name: str) -> bool:
    """Whether this stands in one of several layers."""
    return any(part.isdigit() for part in name.split("."))
