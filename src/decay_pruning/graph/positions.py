"""Positions: where the atoms of an axis stand along it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from decay_pruning.graph.axes import Atom, Axis, Product, Sum, find, leaves

Indices = NDArray[np.int64]


def layout(axis: Axis) -> list[tuple[Atom, Indices, Indices]]:
    """Where the atoms of an axis stand: (atom, position within the atom, position along the axis), parallel."""
    axis = find(axis)
    if isinstance(axis, Atom):
        every = np.arange(axis.size, dtype=np.int64)
        return [(axis, every, every)]
    found: list[tuple[Atom, Indices, Indices]] = []
    if isinstance(axis, Sum):
        start = 0
        for term in axis.terms:
            found += [(atom, owner, position + start) for atom, owner, position in layout(term)]
            start += term.size
        return found
    assert isinstance(axis, Product)
    outer, inner = 1, axis.size
    for factor in axis.factors:
        inner //= factor.size
        before = np.arange(outer, dtype=np.int64)[:, None, None] * (factor.size * inner)
        after = np.arange(inner, dtype=np.int64)[None, None, :]
        for atom, owner, position in layout(factor):
            every = (before + position[None, :, None] * inner + after).reshape(-1)
            found.append(
                (atom, np.broadcast_to(owner[None, :, None], (outer, owner.size, inner)).reshape(-1), every)
            )
        outer *= factor.size
    return found


def crossings(axis: Axis) -> Iterator[tuple[Atom, Atom]]:
    """Pairs of atoms that share positions of an axis, the outer one first."""
    axis = find(axis)
    if isinstance(axis, Sum):
        for each in axis.terms:
            yield from crossings(each)
    elif isinstance(axis, Product):
        for k, one in enumerate(axis.factors):
            yield from crossings(one)
            for other in axis.factors[k + 1 :]:
                inner = [atom for atom in leaves(other) if atom.size > 1]
                yield from ((a, b) for a in leaves(one) if a.size > 1 for b in inner)
