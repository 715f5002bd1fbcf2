"""Outputs: by what names a model's outputs go, and what the others may lose when only some must keep their shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

#: An output and one of its dimensions.
Spot = tuple[str, int]


def named(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested tuples, lists, mappings and dataclasses, by names such as "logits" or "hidden_states.0"."""
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Tensor):
        yield prefix, output
    elif isinstance(output, Mapping):
        inside = output.items()
    elif isinstance(output, list | tuple):
        inside = enumerate(output)
    elif is_dataclass(output) and not isinstance(output, type):
        inside = ((each.name, getattr(output, each.name)) for each in fields(output))
    for key, value in inside:
        yield from named(value, f"{prefix}.{key}" if prefix else str(key))


def wanted(name: str, names: Iterable[str]) -> bool:
    """Whether an output is one of these, or inside one of them."""
    return any(name == each or name.startswith(f"{each}.") for each in names)


@dataclass(frozen=True)
class Part:
    """The positions of a layer group along one dimension of an output.

    Attributes:
        spot: the output and its dimension.
        group: name of the layer group.
        owner, position: as in a coupling.
    """

    spot: Spot
    group: str
    owner: Tensor
    position: Tensor


@dataclass(frozen=True)
class Outputs:
    """Outputs that may lose width.

    Attributes:
        keep: names of those that keep their shape; empty where all do.
        parts: where layer groups stand in the others.
        sizes: of their dimensions.
    """

    keep: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    sizes: Mapping[Spot, int] = field(default_factory=dict)

    def kept(self, gone: Mapping[str, Tensor]) -> dict[Spot, Tensor]:
        """Positions that stay; `gone` says which rows of a layer group go. Spots that lose nothing are absent."""
        drop: dict[Spot, Tensor] = {}
        for part in self.parts:
            if part.group in gone:
                mask = drop.setdefault(part.spot, torch.zeros(self.sizes[part.spot], dtype=torch.bool))
                mask[part.position[gone[part.group][part.owner]]] = True
        return {spot: (~mask).nonzero().flatten() for spot, mask in drop.items() if bool(mask.any())}

    def without(self, gone: Mapping[str, Tensor]) -> Outputs:
        """What is left after a removal, renumbered."""
        kept, parts = self.kept(gone), []
        for part in self.parts:
            owner, position = part.owner, part.position
            if part.group in gone:
                stays = ~gone[part.group]
                mine = stays[owner]
                owner, position = (stays.cumsum(0) - 1)[owner[mine]], position[mine]
            if part.spot in kept:
                position = torch.searchsorted(kept[part.spot], position)
            parts.append(replace(part, owner=owner, position=position))
        sizes = {spot: kept[spot].numel() if spot in kept else size for spot, size in self.sizes.items()}
        return replace(self, parts=tuple(parts), sizes=sizes)


def narrowed(names: Sequence[str], leaves: Sequence[Tensor], kept: Mapping[Spot, Tensor]) -> list[Tensor]:
    """Tensors without the positions that go."""
    found = list(leaves)
    for k, name in enumerate(names):
        for d in range(found[k].ndim):
            if (name, d) in kept:
                found[k] = found[k].index_select(d, kept[name, d].to(found[k].device))
    return found
