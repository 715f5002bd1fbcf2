"""Axis algebra: axes that are made one are the same at every position, whatever way they were seen in before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decay_pruning.graph.axes import (
    Atom,
    Axis,
    Misaligned,
    Product,
    Reason,
    concatenation,
    divide,
    find,
    fix,
    is_fixed,
    leaves,
    product,
    split,
    unify,
)
from decay_pruning.graph.positions import crossings, layout


def tokens(axis: Axis) -> list[frozenset[tuple[int, int]]]:
    """What stands at each position: (atom, position in it) of every atom there that has more than one."""
    found: list[set[tuple[int, int]]] = [set() for _ in range(axis.size)]
    for atom, owner, position in layout(axis):
        for o, p in zip(owner.tolist(), position.tolist(), strict=True):
            if atom.size > 1:
                found[p].add((id(atom), o))
    return [frozenset(each) for each in found]


@st.composite
def axes(draw: st.DrawFn, size: int) -> Axis:
    """A random axis of a size."""
    kind = draw(st.sampled_from(["atom", "atom", "product", "sum"]))
    divisors = [d for d in range(2, size) if size % d == 0]
    if kind == "product" and divisors:
        outer = draw(st.sampled_from(divisors))
        return product(draw(axes(outer)), draw(axes(size // outer)))
    if kind == "sum" and size > 1:
        first = draw(st.integers(1, size - 1))
        return concatenation(draw(axes(first)), draw(axes(size - first)))
    return Atom(size)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([4, 6, 8, 12, 24]))
def test_unified_axes_are_the_same_everywhere(data: st.DataObject, size: int) -> None:
    one, other, third = (data.draw(axes(size)) for _ in range(3))
    try:
        unify(one, other)
        unify(other, third)
    except Misaligned:
        return
    assert tokens(one) == tokens(other) == tokens(third)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([6, 8, 12, 24]))
def test_splitting_and_dividing_lose_nothing(data: st.DataObject, size: int) -> None:
    axis = data.draw(axes(size))
    first = data.draw(st.integers(1, size - 1))
    try:
        left, right = split(axis, first)
        assert tokens(axis) == tokens(left) + tokens(right)
        outer = data.draw(st.sampled_from([d for d in range(2, size) if size % d == 0]))
        assert tokens(product(*divide(axis, outer))) == tokens(axis)
    except Misaligned:
        return


def test_a_view_meets_another_view_in_their_common_refinement() -> None:
    a, b = product(Atom(12), Atom(64)), product(Atom(3), Atom(256))
    unify(a, b)
    assert [atom.size for atom in leaves(a)] == [atom.size for atom in leaves(b)] == [3, 4, 64]


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(Misaligned):
        unify(product(Atom(4), Atom(6)), product(Atom(6), Atom(4)))
    with pytest.raises(Misaligned):
        unify(Atom(3), Atom(4))


def test_halves_that_are_swapped_and_added_are_one_atom() -> None:
    width = Atom(8)
    first, second = split(width, 4)
    unify(width, concatenation(second, first))
    assert find(first) is find(second) and len(set(map(id, leaves(width)))) == 1


def test_the_parts_of_a_shuffle_are_tied() -> None:
    both = concatenation(Atom(4), Atom(4))
    count, width = divide(both, 2)
    assert [len({id(a) for a in leaves(width)}), count.size, width.size] == [1, 2, 4]
    assert tokens(both)[:4] == tokens(both)[4:] == tokens(width)


def test_what_is_fixed_stays_fixed_through_all_that_it_meets() -> None:
    a, b = Atom(6), Atom(6)
    fix(a, Reason(1, "input"))
    unify(b, product(Atom(2), Atom(3)))
    unify(a, b)
    assert is_fixed(b) and {atom.reason for atom in leaves(b)} == {Reason(1, "input")}


def test_crossings_are_factors_of_one_product() -> None:
    heads, width, other = Atom(3), Atom(4), Atom(5)
    axis = concatenation(Product([heads, width]), other)
    assert list(crossings(axis)) == [(heads, width)]
    owner = next(o for atom, o, _ in layout(axis) if atom is heads)
    assert np.array_equal(owner, np.repeat(np.arange(3), 4))
