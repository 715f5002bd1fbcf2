"""Uniform widths: layer groups of the same kind in all layers lose the same number of structures.

Where the model has a config, kinds are what its numbers name (see `configs`). Elsewhere, layers of which the names
differ by their number alone are of one kind. What belongs to no kind keeps its width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from decay_pruning import configs
from decay_pruning.structures import StructureSet


def kinds(model: nn.Module, structures: StructureSet) -> dict[str, str]:
    """Layer group → its kind; what is absent is kept."""
    try:
        sizes = configs.Sizes(model)
    except ValueError:
        return _by_name(structures)
    if sizes.shapes != {name: tuple(p.shape) for name, p in model.named_parameters()}:
        return _by_name(structures)  # it is no longer what its config says
    return configs.kinds(sizes, structures)


def even(kinds: Mapping[str, str], structures: StructureSet, fading: Mapping[str, Tensor]) -> bool:
    """Whether all layer groups of a kind are equally wide when what fades is gone."""
    left = {(kind, len(structures.groups[name]) - int(fading[name].sum())) for name, kind in kinds.items()}
    return len(left) == len(set(kinds.values()))


def _by_name(structures: StructureSet) -> dict[str, str]:
    found = {}
    for name, group in structures.groups.items():
        if any(_numbered(c.tensor) for c in group.couplings):
            found[name] = f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', name)} of {len(group)}"
    return found


def _numbered(name: str) -> bool:
    """Whether this stands in one of several layers."""
    return any(part.isdigit() for part in name.split("."))
