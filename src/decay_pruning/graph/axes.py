"""Axis algebra: what the positions along one dimension of a tensor are.

An *axis* is an atom (a width of its own), a product of axes (row-major: 768 seen as 12 · 64, a flattened C · H · W) or
a sum of axes (a concatenation, the parts of a split). Every dimension of every parameter starts as an atom. What the
model computes *unifies* axes: an atom that meets another becomes one with it, an atom that meets a product or a sum is
refined into it everywhere it stands. A *fixed* atom never loses a position, and says why.

Atoms that are not fixed in the end are the layer groups, and their positions the structures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

#: Ranks of reasons: of several, the user is told the last.
UNIT, CONSTANT, INPUT, CROSSING, OPERATION, OUTPUT, IGNORED = range(7)


class Reason(NamedTuple):
    """Why an atom is fixed. Of several reasons the user is told the one of the highest rank."""

    rank: int
    text: str


class Misaligned(Exception):
    """Two ways to see one axis that have no common refinement (4 · 6 and 6 · 4)."""


class Axis:
    """The positions along one dimension."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


#: One for each dimension of a tensor.
Axes = list[Axis]


class Atom(Axis):
    """A width of its own.

    Attributes:
        bound: what it became one with or was refined into.
        reason: why it is fixed, or None.
        mixed: why removal along it changes the function by its nature, or None.
        count: it counts equal parts (heads, groups): what it is multiplied with is pruned, not the atom.
        head: a batched product or attention runs once for each position.
        site: where the user's code first splits it ("net.py:17").
        users: names of the modules whose code splits it or names its size.
    """

    __slots__ = ("bound", "count", "head", "mixed", "reason", "site", "users")

    def __init__(self, size: int, reason: Reason | None = None) -> None:
        super().__init__(size)
        self.bound: Axis | None = None
        self.reason = reason
        self.mixed: str | None = None
        self.count = False
        self.head = False
        self.site: str | None = None
        self.users: set[str] = set()

    def like(self, size: int) -> Atom:
        """A part of this atom, as free or fixed as the whole."""
        part = Atom(size, self.reason)
        part.mixed, part.count, part.head, part.site = self.mixed, self.count, self.head, self.site
        part.users |= self.users
        return part


class Product(Axis):
    """Row-major product of axes."""

    __slots__ = ("factors",)

    def __init__(self, factors: Sequence[Axis]) -> None:
        super().__init__(math.prod(f.size for f in factors))
        self.factors = tuple(factors)


class Sum(Axis):
    """Axes one after the other."""

    __slots__ = ("terms",)

    def __init__(self, terms: Sequence[Axis]) -> None:
        super().__init__(sum(t.size for t in terms))
        self.terms = tuple(terms)


def find(axis: Axis) -> Axis:
    """What an axis is by now. Atoms on the way are bound to it: a residual stream makes long chains of them."""
    if not isinstance(axis, Atom) or axis.bound is None:
        return axis
    found = axis.bound
    while isinstance(found, Atom) and found.bound is not None:
        found = found.bound
    while isinstance(axis, Atom) and axis.bound is not None and axis.bound is not found:
        axis.bound, axis = found, axis.bound
    return found


def product(*axes: Axis) -> Axis:
    """The axes flattened into one."""
    rest = [axis for axis in axes if axis.size != 1]
    return rest[0] if len(rest) == 1 else Product(rest) if rest else Atom(1)


def concatenation(*axes: Axis) -> Axis:
    """The axes one after the other."""
    rest = [axis for axis in axes if axis.size]
    return rest[0] if len(rest) == 1 else Sum(rest)


def factors(axis: Axis) -> list[Axis]:
    """Atoms and sums (none of size 1) of which an axis is the product."""
    axis = find(axis)
    if isinstance(axis, Product):
        return [f for each in axis.factors for f in factors(each)]
    return [axis] if axis.size != 1 else []


def terms(axis: Axis) -> list[Axis]:
    """Atoms and products of which an axis is the sum."""
    axis = find(axis)
    if isinstance(axis, Sum):
        return [t for each in axis.terms for t in terms(each)]
    if isinstance(axis, Product):
        parts = factors(axis)
        return terms(parts[0]) if len(parts) == 1 else [axis]
    return [axis]


def leaves(axis: Axis) -> Iterator[Atom]:
    """All atoms in an axis (one may come several times)."""
    axis = find(axis)
    if isinstance(axis, Product):
        for each in axis.factors:
            yield from leaves(each)
    elif isinstance(axis, Sum):
        for each in axis.terms:
            yield from leaves(each)
    elif isinstance(axis, Atom):
        yield axis


def is_fixed(axis: Axis) -> bool:
    """Whether no position of the axis can go."""
    return all(atom.reason is not None for atom in leaves(axis))


def reason(axis: Axis) -> Reason | None:
    """The strongest reason in an axis."""
    return max((atom.reason for atom in leaves(axis) if atom.reason), default=None)


def fix(axis: Axis, why: Reason) -> None:
    """No position of the axis can go."""
    for atom in leaves(axis):
        if atom.reason is None or atom.reason.rank < why.rank:
            atom.reason = why


# ------------------------------------------------------------------------------------------------ unification


def unify(a: Axis, b: Axis) -> None:
    """Make two axes of one size the same.

    Raises:
        Misaligned: they have no common refinement. Some of their atoms may have become one already.
    """
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise Misaligned
    for one, other in ((a, b), (b, a)):
        why = reason(one) if is_fixed(one) else None
        if why is not None and not isinstance(other, Atom):
            fix(other, why)
            return
    if isinstance(a, Atom):
        _bind(a, b)
    elif isinstance(b, Atom):
        _bind(b, a)
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _align(terms(a), terms(b), split)
    else:
        _align(factors(a), factors(b), divide)


def _align(a: list[Axis], b: list[Axis], cut: object) -> None:
    """Unify two sequences part by part, cutting what is longer."""
    a, b = a[::-1], b[::-1]
    while a and b:
        x, y = a.pop(), b.pop()
        if x.size == y.size:
            unify(x, y)
            continue
        longer, shorter, rest = (x, y, a) if x.size > y.size else (y, x, b)
        head, tail = cut(longer, shorter.size)  # type: ignore[operator]
        unify(head, shorter)
        rest.append(tail)


def _bind(atom: Atom, axis: Axis) -> None:
    """Make an atom one with an axis."""
    for each in leaves(axis):
        if atom.reason is not None and (each.reason is None or each.reason.rank < atom.reason.rank):
            each.reason = atom.reason
        each.mixed = each.mixed or atom.mixed
        each.count |= atom.count
        each.head |= atom.head
        each.site = each.site or atom.site
        each.users |= atom.users
    atom.bound = axis


def split(axis: Axis, first: int) -> tuple[Axis, Axis]:
    """The first positions of an axis, and the others.

    Raises:
        Misaligned: it cannot be cut there.
    """
    axis = find(axis)
    if isinstance(axis, Atom):
        parts = axis.like(first), axis.like(axis.size - first)
        axis.bound = Sum(parts)
        return parts
    if isinstance(axis, Sum):
        before: list[Axis] = []
        after = terms(axis)
        while after and after[0].size <= first:
            first -= after[0].size
            before.append(after.pop(0))
        if first:
            left, right = split(after.pop(0), first)
            before.append(left)
            after.insert(0, right)
        return concatenation(*before), concatenation(*after)
    outer, *inner = factors(axis)
    rest = product(*inner)
    whole, part = divmod(first, rest.size)
    if inner and not part:
        left, right = split(outer, whole)
        return product(left, rest), product(right, rest)
    if not inner:
        return split(outer, first)
    raise Misaligned


def divide(axis: Axis, outer: int) -> tuple[Axis, Axis]:
    """An axis as a product of two, the first of size `outer`.

    Raises:
        Misaligned: it is no such product.
    """
    axis = find(axis)
    inner, rest = divmod(axis.size, outer)
    if rest:
        raise Misaligned
    if outer == 1 or inner == 1:
        return (Atom(1), axis) if outer == 1 else (axis, Atom(1))
    if isinstance(axis, Atom):
        parts = axis.like(outer), axis.like(inner)
        axis.bound = Product(parts)
        return parts
    if isinstance(axis, Sum):
        halves = [divide(each, each.size // inner) for each in terms(axis) if not _indivisible(each, inner)]
        for _, part in halves[1:]:
            unify(halves[0][1], part)
        return concatenation(*(left for left, _ in halves)), halves[0][1]
    taken: list[Axis] = []
    left = factors(axis)
    while outer > 1:
        head = left.pop(0)
        if outer % head.size == 0:
            taken.append(head)
            outer //= head.size
            continue
        if head.size % outer:
            raise Misaligned
        one, other = divide(head, outer)
        taken.append(one)
        left.insert(0, other)
        outer = 1
    return product(*taken), product(*left)


def _indivisible(axis: Axis, inner: int) -> bool:
    if axis.size % inner:
        raise Misaligned
    return False
