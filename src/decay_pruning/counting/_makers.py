"""Which parameter's size made each dimension of a tensor, and how that goes through views.

Every dimension of every tensor carries its *makers*: the (parameter, dimension) pairs whose size it was made from, each
with the power to which it grows with that size. They only ever predict; where they get lost (an index, an unknown
operator) a dimension counts as constant until the model is counted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from decay_pruning.structures import Place

#: What a dimension was made from → to which power its size grows with that.
Makers = Mapping[Place, float]
#: Makers of each dimension of a tensor.
Axes = Sequence[Makers]


def joined(makers: Iterable[Makers]) -> Makers:
    """The makers of something that grows with all of these."""
    total: dict[Place, float] = {}
    for each in makers:
        for place, power in each.items():
            total[place] = total.get(place, 0.0) + power
    return total


def _reshaped(axes: Axes, source: Tensor, out: Tensor, *_: Any, **__: Any) -> Axes:
    """Joined dimensions have the makers of all; one that is split hands them on by log(size), so that parts add up."""
    found: list[Makers] = [{}] * out.ndim
    for before, after in _runs(source.shape, out.shape):
        makers = joined(axes[d] for d in before)
        size = math.prod(out.shape[d] for d in after)
        for d in after:
            if out.shape[d] > 1:
                found[d] = _powered(makers, math.log(out.shape[d]) / math.log(size))
    return found


def _runs(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions of two shapes that hold the same elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        a, b = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while (m := math.prod(before[a:i])) != (n := math.prod(after[b:j])):
            if m < n and i < len(before):
                i += 1
            elif n < m and j < len(after):
                j += 1
            else:
                break
        yield list(range(a, i)), list(range(b, j))


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
    gone = axes[dim]
    rest = [axis for d, axis in enumerate(axes) if d != dim % len(axes)]
    left = joined(rest)
    return [
        {p: own * (1 + gone.get(p, 0.0) / left[p] if left[p] else 1.0) for p, own in axis.items()}
        for axis in rest
    ]


def _expanded(axes: Axes, source: Tensor, out: Tensor, *_: Any, **__: Any) -> Axes:
    return [{}] * (out.ndim - len(axes)) + list(axes)


#: View → (makers of the source, source, result, further arguments) → makers of the result, or of each of several.
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
