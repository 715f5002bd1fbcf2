"""Which parameter's size made each dimension of a tensor, and how that goes through views.

Every dimension of every tensor carries its *makers*: the (parameter, dimension) pairs whose size it was made from, each
with the power to which it grows with that size. They only ever predict; where they get lost (an index, an unknown
operator) a dimension counts as constant until the model is counted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from decay_pruning.structures import Place

#: What a size was made from → to which power it grows with that.
Makers = Mapping[Place, float]


@dataclass(frozen=True)
class Axis:
    """A dimension as the product of its factors, outermost first; without any it counts as constant."""

    factors: tuple[tuple[int, Makers], ...] = ()

    def __bool__(self) -> bool:
        return any(makers for _, makers in self.factors)

    def within(self, size: int) -> tuple[tuple[int, Makers], ...]:
        """The factors of such a size: one, where only a part of the dimension is left, or more of it is there."""
        if math.prod(factor for factor, _ in self.factors) == size:
            return self.factors
        return ((size, joined([self])),)


Axes = Sequence[Axis]
CONSTANT = Axis()


def joined(axes: Iterable[Axis]) -> Makers:
    """The makers of something that grows with all of these."""
    total: dict[Place, float] = {}
    for axis in axes:
        for _, makers in axis.factors:
            for place, power in makers.items():
                total[place] = total.get(place, 0.0) + power
    return total


def aligned(axes: Axes, shape: Sequence[int], others: Axes, other_shape: Sequence[int]) -> Axes:
    """These axes, and those of another tensor of as many dimensions where these are constant."""
    return [
        own or (Axis(other.within(n)) if there > 1 else CONSTANT)
        for own, n, other, there in zip(axes, shape, others, other_shape, strict=True)
    ]


def _reshaped(axes: Axes, source: Tensor, out: Tensor, *_: Any, **__: Any) -> Axes:
    """The same factors in other dimensions. One that is split hands its makers on by log(size): the parts add up."""
    left = [f for axis, n in zip(axes, source.shape, strict=True) for f in axis.within(n) if f[0] != 1]
    found = []
    for rest in out.shape:
        factors: list[tuple[int, Makers]] = []
        while rest > 1 and left:
            size, makers = left.pop(0)
            if size > rest and size % rest == 0:
                share = math.log(rest) / math.log(size)
                left.insert(0, (size // rest, _powered(makers, 1 - share)))
                size, makers = rest, _powered(makers, share)
            if rest % size:
                return [CONSTANT] * out.ndim
            factors.append((size, makers))
            rest //= size
        found.append(Axis(tuple(factors)))
    return found


def _powered(makers: Makers, power: float) -> Makers:
    return {place: own * power for place, own in makers.items()}


def _permuted(axes: Axes, source: Tensor, out: Tensor, dims: Sequence[int]) -> Axes:
    return [axes[d] for d in dims]


def _transposed(axes: Axes, source: Tensor, out: Tensor, a: int = 0, b: int = -1) -> Axes:
    found = list(axes)
    if found:
        found[a], found[b] = axes[b], axes[a]
    return found


def _selected(axes: Axes, source: Tensor, out: Any, dim: int = 0, *_: Any) -> Axes:
    """One index of a dimension: what had made it is in the other parts of the same width, if there are any."""
    gone = joined([axes[dim]])
    rest = [axis for d, axis in enumerate(axes) if d != dim % len(axes)]
    whole = joined(rest)
    more = {place: 1 + gone.get(place, 0.0) / power for place, power in whole.items() if power}
    return [
        Axis(
            tuple((n, {p: own * more.get(p, 1.0) for p, own in makers.items()}) for n, makers in axis.factors)
        )
        for axis in rest
    ]


def _expanded(axes: Axes, source: Tensor, out: Tensor, *_: Any, **__: Any) -> Axes:
    more = [CONSTANT] * (out.ndim - len(axes))
    shape = out.shape[len(more) :]
    return [*more, *aligned([CONSTANT] * len(axes), shape, axes, source.shape)]


#: View → (axes of the source, source, result, further arguments) → axes of the result, or of each of several.
VIEWS: dict[str, Callable[..., Axes]] = {
    **dict.fromkeys(
        (
            "aten::view",
            "aten::_unsafe_view",
            "aten::_reshape_alias",
            "aten::reshape",
            "aten::unsqueeze",
            "aten::squeeze",
        ),
        _reshaped,
    ),
    "aten::permute": _permuted,
    "aten::t": _transposed,
    "aten::transpose": _transposed,
    "aten::select": _selected,
    "aten::unbind": _selected,
    "aten::expand": _expanded,
}
