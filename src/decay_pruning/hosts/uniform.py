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
        takes: whether a kind can have a width, for all that is known of it alone.
    """

    of: Mapping[str, str]
    takes: Callable[[str, int], bool] = lambda kind, width: True
    _seen: dict[tuple[str, int], bool] = field(default_factory=dict)

    def up(self, kind: str, width: int, most: int) -> int:
        """The least width from here on that is possible; `most` where none is."""
        while width < most and not self._taken(kind, width):
            width += 1
        return min(width, most)

    def even(self, structures: StructureSet, fading: Mapping[str, Tensor]) -> bool:
        """Whether all layer groups of a kind are equally wide when what fades is gone."""
        left = {(kind, len(structures.groups[n]) - int(fading[n].sum())) for n, kind in self.of.items()}
        return len(left) == len(set(self.of.values()))

    def _taken(self, kind: str, width: int) -> bool:
        if (kind, width) not in self._seen:
            self._seen[kind, width] = self.takes(kind, width)
        return self._seen[kind, width]


def kinds(model: nn.Module, structures: StructureSet) -> Kinds:
    """The kinds of a model that is as it was built."""
    try:
        sizes = configs.Sizes(model)
    except ValueError:
        return Kinds(_by_name(structures))
    if sizes.shapes != {name: tuple(p.shape) for name, p in model.named_parameters()}:
        return Kinds(_by_name(structures))  # it is no longer what its config says
    named = configs.kinds(sizes, structures)
    units = {" and ".join(sorted(each)): each for each in named.values()}

    def takes(kind: str, width: int) -> bool:
        return sizes.accepts({number: width * each for number, each in units[kind].items()})

    return Kinds({name: " and ".join(sorted(each)) for name, each in named.items()}, takes)


def _by_name(structures: StructureSet) -> dict[str, str]:
    found = {}
    for name, group in structures.groups.items():
        if any(_numbered(c.tensor) for c in group.couplings):
            found[name] = f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', name)} of {len(group)}"
    return found


def _numbered(name: str) -> bool:
    """Whether this stands in one of several layers."""
    return any(part.isdigit() for part in name.split("."))
