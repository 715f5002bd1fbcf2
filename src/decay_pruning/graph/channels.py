"""Layer groups as torch-pruning's importances read them, for importances that were written for its groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from decay_pruning import surgery
from decay_pruning.structures import NOT_PARAMETERS, Coupling, LayerGroup, Role


class _Entry(NamedTuple):
    dep: Any
    idxs: list[int]


@dataclass
class _Item:
    """One side of one layer: unpacks to (dependency, indices), and knows the root channel of each index."""

    dep: Any
    idxs: list[int]
    root_idxs: list[int]

    def __iter__(self) -> Iterator[Any]:
        return iter(_Entry(self.dep, self.idxs))


class Channels:
    """The layers of one layer group, the producer first.

    Attributes:
        owner: structure (row) of each channel of the first layer.
    """

    def __init__(self, model: nn.Module, group: LayerGroup) -> None:
        usable = [c for c in group.couplings if c.role not in NOT_PARAMETERS]
        usable.sort(key=lambda c: (c.role is not Role.ROW, c.role in (Role.BIAS, Role.SHIFT)))
        root = usable[0]
        self.owner = root.owner
        self._items = []
        for c in usable:
            module, leaf = surgery.parent(model, c.tensor)
            handler = _handler(module, c, leaf)
            if c is root or handler is not None:
                dep = SimpleNamespace(layer=module, pruning_fn=handler, handler=handler)
                dep.target = SimpleNamespace(module=module, name=c.tensor)
                roots = _roots(root.owner, c.owner)
                self._items.append(_Item(dep, *_all_groups(module, c, handler, c.position, roots)))

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[_Item]:
        return iter(self._items)

    def __getitem__(self, k: int) -> _Item:
        return self._items[k]


def _roots(root: Tensor, owner: Tensor) -> list[int]:
    """The root channel of each position: those of a structure in turn."""
    channels: dict[int, list[int]] = {}
    for channel, row in enumerate(root.tolist()):
        channels.setdefault(row, []).append(channel)
    counts = torch.bincount(owner)
    seen: dict[int, int] = {}
    found = []
    for row in owner.tolist():
        k = seen.get(row, 0)
        seen[row] = k + 1
        mine = channels[row]
        found.append(mine[min(k * len(mine) // int(counts[row]), len(mine) - 1)])
    return found


def _all_groups(
    module: Any, c: Coupling, handler: Any, position: Tensor, roots: list[int]
) -> tuple[list[int], list[int]]:
    """Input channels of a grouped convolution are numbered over all groups there."""
    index = position.tolist()
    if handler is None or c.role is not Role.COLUMN or getattr(module, "groups", 1) == 1 or module.transposed:
        return index, roots
    width = module.weight.shape[1]
    return [i + g * width for g in range(module.groups) for i in index], roots * module.groups


def _handler(module: nn.Module, c: Coupling, leaf: str) -> Any:
    """torch-pruning's function for this side of a layer, or None where it has none that scores."""
    try:
        from torch_pruning.pruner import function
    except ImportError:
        return None
    if leaf != "weight":
        return None
    if isinstance(module, _ConvNd):
        if module.groups == module.in_channels and module.groups > 1:
            return None
        return function.prune_conv_out_channels if c.role is Role.ROW else function.prune_conv_in_channels
    if isinstance(module, nn.Linear):
        return function.prune_linear_out_channels if c.role is Role.ROW else function.prune_linear_in_channels
    if isinstance(module, _BatchNorm):
        return function.prune_batchnorm_out_channels
    if isinstance(module, nn.LayerNorm):
        return function.prune_layernorm_out_channels
    return None
