"""Folds: what a removal multiplies, so that the function stays the same where a width is divided by.

Two things depend on a width by a known scale only: a root mean square over D positions, some of which are zero, and
attention scores that are divided by √d. A removal multiplies γ and ε, or what makes the queries, and is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: A tensor (or module attribute) and one of its dimensions.
Place = tuple[str, int]


@dataclass(frozen=True)
class Scaled:
    """What a fold multiplies: w ← (w + offset) · (D / D′) ^ power − offset.

    Attributes:
        tensor: name of a parameter, or the dotted path of a number on a module.
        dim, position: along which dimension of the parameter, and where (current positions); a number has (0, [0]).
        power: of the ratio of the width before a removal to the width after it.
        offset: what the model adds to the parameter before it uses it (the 1 of Gemma's 1 + γ).
        value: for a number: what the model takes where there is none (the ε of `nn.RMSNorm(eps=None)`).
        level: for a number: a value at which the output shows whether it follows.
    """

    tensor: str
    dim: int
    position: Tensor
    power: float
    offset: float = 0.0
    value: float | None = None
    level: float | None = None

    @property
    def place(self) -> Place:
        return self.tensor, self.dim


@dataclass(frozen=True)
class Fold:
    """A width that the model divides by, and what takes its change.

    - A root mean square: x / √(S / D + ε) · γ, where S is the sum of squares, to which zeros add nothing. With
      ε′ = ε · D / D′ the root becomes √(D / D′) times as large, and so γ′ = γ · √(D / D′): powers 1 and ½.
    - Attention: q · k / √d. With q′ = q · √(d′ / d) it is the same after d became d′: power −½.

    Attributes:
        place: where the width can be counted.
        line, position: parallel: the current positions there, and which line (one head) each belongs to. Lines are
            equally long, and their length is the width.
        scaled: what takes the change.
    """

    place: Place
    line: Tensor
    position: Tensor
    scaled: tuple[Scaled, ...]

    def ratio(self, kept: Mapping[Place, Tensor]) -> float:
        """The width before a cut over that after it."""
        if self.place not in kept:
            return 1.0
        before = torch.bincount(self.line)
        stays = torch.isin(self.position, kept[self.place])
        after = torch.bincount(self.line[stays])
        return int(before.max()) / max(1, int(after.max()) if after.numel() else 0)

    def moved(self, kept: Mapping[Place, Tensor]) -> Fold:
        """The same fold after a cut."""
        stays, position = _renumbered(self.position, kept.get(self.place))
        scaled = (
            replace(each, position=_renumbered(each.position, kept.get(each.place))[1])
            for each in self.scaled
        )
        return replace(self, line=self.line[stays], position=position, scaled=tuple(scaled))


def _renumbered(position: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which positions stay, and their new numbers."""
    if keep is None:
        return torch.ones_like(position, dtype=torch.bool), position
    at = torch.searchsorted(keep, position).clamp(max=max(0, keep.numel() - 1))
    stays = keep[at] == position
    return stays, at[stays]


@dataclass(frozen=True)
class Factor:
    """What the values along one dimension are multiplied with.

    Attributes:
        values: shape (n,), float64: one for each current position.
        offset: what is added to them before and taken off afterwards.
        value: for a number that is None: what it stands for.
    """

    values: Tensor
    offset: float = 0.0
    value: float | None = None

    def apply(self, tensor: Tensor, dim: int) -> Tensor:
        """A scaled copy of a tensor, in its dtype and memory format."""
        shape = [1] * tensor.ndim
        shape[dim] = -1
        values = self.values.to(tensor.device).view(shape)
        wide = tensor.to(torch.float64)
        wide = (wide + self.offset) * values - self.offset
        return torch.where(values == 1, tensor, wide.to(tensor.dtype)).contiguous(
            memory_format=torch.preserve_format
        )

    def of(self, number: float | None) -> float:
        """A scaled number."""
        known = self.value if number is None else number
        assert known is not None
        return (known + self.offset) * float(self.values[0]) - self.offset


#: Place → what is multiplied there.
Factors = Mapping[Place, Factor]


def factors(
    folds: Iterable[Fold], kept: Mapping[Place, Tensor], size: Callable[[Place], int]
) -> dict[Place, Factor]:
    """What a cut to `kept` multiplies, in positions before the cut; `size` is that of a place before it."""
    found: dict[Place, Factor] = {}
    for fold in folds:
        ratio = fold.ratio(kept)
        if ratio == 1:
            continue
        for each in fold.scaled:
            if each.place not in found:
                ones = torch.ones(size(each.place), dtype=torch.float64)
                found[each.place] = Factor(ones, each.offset, each.value)
            found[each.place].values[each.position] *= ratio**each.power
    return found
