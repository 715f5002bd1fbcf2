"""Rules of parts and wholes: concatenations, splits, slices, padding, indices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decay_pruning.graph.axes import (
    UNIT,
    Atom,
    Axes,
    Axis,
    Misaligned,
    Reason,
    concatenation,
    divide,
    fix,
    is_fixed,
    split,
)
from decay_pruning.graph.op import Op
from decay_pruning.graph.rules._table import rule
from decay_pruning.graph.sites import at


@rule("cat", "concat")
def cat(op: Op) -> Axes:
    parts = [op.axes(t) for t in op["tensors"] if t.ndim == op.output.ndim]
    d = op["dim"] % op.output.ndim
    out = list(parts[0])
    for part in parts[1:]:
        for k, axis in enumerate(part):
            if k != d:
                op.tie(out[k], axis)
    out[d] = concatenation(*(part[d] for part in parts))
    return out


@rule("stack")
def stack(op: Op) -> Axes:
    parts = [op.axes(t) for t in op["tensors"]]
    for part in parts[1:]:
        for mine, axis in zip(parts[0], part, strict=True):
            op.tie(mine, axis)
    out = list(parts[0])
    out.insert(op["dim"] % op.output.ndim, op.fixed(len(parts)))
    return out


@rule(
    "split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "chunk", "split_with_sizes_copy"
)
def split_parts(op: Op) -> list[Axes]:
    x = op.axes("self")
    d = op["dim"] % len(x)
    sizes = [int(t.shape[d]) for t in op.outputs]
    parts = cut(op, x[d], sizes, equal="sizes" not in op.name)
    return [[*x[:d], part, *x[d + 1 :]] for part in parts]


def cut(op: Op, axis: Axis, sizes: Sequence[int], *, equal: bool) -> Axes:
    """An axis as parts one after the other; equal parts stay equal."""
    if len(sizes) == 1:
        return [axis]
    try:
        if equal and len(set(sizes)) == 1:
            count, part = divide(axis, len(sizes))
            fix(count, Reason(UNIT, f"counts equal parts{at(op.site())}"))
            op.mark([part])
            return [part] * len(sizes)
    except Misaligned:
        pass
    try:
        parts: Axes = []
        rest = axis
        for size in sizes[:-1]:
            part, rest = split(rest, size) if 0 < size < rest.size else (Atom(size), rest)
            parts.append(part)
        op.mark([*parts, rest])
        return [*parts, rest]
    except Misaligned:
        op.refuse([axis], "is split in a way that does not fit by")
        return [op.fixed(n) for n in sizes]


@rule("glu")
def glu(op: Op) -> Axes:
    x = op.axes("self")
    d = op["dim"] % len(x)
    half = x[d].size // 2
    one, other = cut(op, x[d], [half, half], equal=True)
    op.tie(one, other)
    return [*x[:d], one, *x[d + 1 :]]


@rule("unbind", "select", "diagonal")
def select(op: Op) -> Axes:
    x = op.axes("self")
    if op.name == "diagonal":
        op.refuse(x, "is read by position in")
        return [op.fixed(int(n)) for n in op.output.shape]
    d = op["dim"] % len(x)
    if not is_fixed(x[d]):
        fix(x[d], Reason(UNIT, f"is read by position in {op.name}{at(op.site())}"))
    return [*x[:d], *x[d + 1 :]]


@rule("slice")
def slice_(op: Op) -> Axes:
    x = op.axes("self")
    d = op["dim"] % len(x)
    n, step = x[d].size, int(op["step"])
    start, stop = op["start"] or 0, n if op["end"] is None else op["end"]
    start, stop, _ = slice(start, stop).indices(n)
    if (start, stop, step) == (0, n, 1):
        return x
    length = int(op.output.shape[d])
    if is_fixed(x[d]) or length == 0:
        return [*x[:d], op.fixed(length), *x[d + 1 :]]
    if step != 1:
        try:
            if n % step or length * step != n:
                raise Misaligned
            part, phase = divide(x[d], length)
            fix(phase, Reason(UNIT, f"is read in steps{at(op.site())}"))
            op.mark([part])
        except Misaligned:
            op.refuse([x[d]], "is read in steps by")
            part = op.fixed(length)
        return [*x[:d], part, *x[d + 1 :]]
    sizes = [size for size in (start, stop - start, n - stop) if size]
    part = cut(op, x[d], sizes, equal=False)[1 if start else 0]
    return [*x[:d], part, *x[d + 1 :]]


@rule("constant_pad_nd", "pad")
def pad(op: Op) -> Axes:
    x, amounts = op.axes("self"), [int(n) for n in op["pad"]]
    for k in range(len(amounts) // 2):
        d, (before, after) = len(x) - 1 - k, amounts[2 * k : 2 * k + 2]
        if (before, after) == (0, 0):
            continue
        if is_fixed(x[d]) or before < 0 or after < 0:
            op.refuse([x[d]], "is cropped by")
            x[d] = op.fixed(int(op.output.shape[d]))
        else:
            x[d] = concatenation(*(op.fixed(before),) * bool(before), x[d], *(op.fixed(after),) * bool(after))
    return x


@rule("index")
def index(op: Op) -> Axes:
    return _read(op)[1]


@rule("index_put", "_index_put_impl")
def index_put(op: Op) -> Axes:
    x, found = _read(op)
    for mine, axis in zip(reversed(found), reversed(op.axes("values")), strict=False):
        if axis.size == mine.size:
            op.tie(mine, axis)
    return x


def _read(op: Op) -> tuple[Axes, Axes]:
    """Axes of a tensor, and of what is read from it by lists of positions and masks."""
    x = op.axes("self")
    kept: list[Axis | None] = []  # None where positions are given
    read: Axes = []
    shapes = []
    for given in op["indices"]:
        d = len(kept)
        if given is None:
            kept.append(x[d])
            continue
        mask = given.dtype in (torch.bool, torch.uint8)
        many = given.ndim if mask else 1
        read += [*x[d : d + many], *op.axes(given)]
        kept += [None] * many
        shapes.append(
            (int(given.sum()),)
            if mask and not given.is_meta
            else tuple(given.shape[:1] if mask else given.shape)
        )
    op.refuse(read, "is read by position in")
    new = [op.fixed(int(n)) for n in torch.broadcast_shapes(*shapes)]
    first, last = kept.index(None), len(kept) - kept[::-1].index(None)
    where = first if None in kept and all(k is None for k in kept[first:last]) else 0
    rest = [axis for axis in [*kept, *x[len(kept) :]] if axis is not None]
    return x, [*rest[:where], *new, *rest[where:]]


@rule("index_select")
def index_select(op: Op) -> Axes:
    x = op.axes("self")
    d = op["dim"] % max(len(x), 1)
    op.refuse([x[d], *op.axes("index")], "is read by position in")
    return [*x[:d], op.fixed(int(op.output.shape[d])), *x[d + 1 :]]


@rule("index_add", "index_copy", "index_reduce")
def index_add(op: Op) -> Axes:
    """Rows of one tensor go to given places of another one."""
    x, source = op.axes("self"), op.axes("source")
    d = op["dim"] % len(x)
    op.refuse([x[d], source[d], *op.axes("index")], "is written by position in")
    for k, (mine, axis) in enumerate(zip(x, source, strict=True)):
        if k != d:
            op.tie(mine, axis)
    return x


@rule("index_fill")
def index_fill(op: Op) -> Axes:
    x = op.axes("self")
    op.refuse([x[op["dim"] % len(x)], *op.axes("index")], "is written by position in")
    return x


@rule("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce")
def gather(op: Op) -> Axes:
    """Positions along one dimension, given one by one; along the others nothing moves."""
    x, places = op.axes("self"), op.axes("index")
    d = op["dim"] % max(len(x), 1)
    others = [op.axes(name) for name in ("src",) if isinstance(op.get(name), torch.Tensor)]
    op.refuse([axes[d] for axes in (x, places, *others)], "is read by position in")
    for k, place in enumerate(places):
        for axes in (x, *others) if k != d else ():
            if axes[k].size == place.size:
                op.tie(axes[k], place)
            else:
                op.refuse([axes[k], place], "is read by position in")
    return places if op.name in ("gather", "take_along_dim") else x


@rule("_pack_padded_sequence")
def pack(op: Op) -> list[Axes]:
    """Steps of all sequences one after the other, and how many sequences each step has."""
    x = op.axes("input")
    op.refuse(x[:2], "is packed by")
    return [[op.fixed(int(op.output.shape[0])), *x[2:]], [op.fixed(int(op.outputs[1].shape[0]))]]


@rule("_pad_packed_sequence")
def unpack(op: Op) -> list[Axes]:
    x = op.axes("data")
    op.refuse(x[:1], "is unpacked by")
    first = [op.fixed(int(n)) for n in op.output.shape[:2]]
    return [[*first, *x[1:]], [op.fixed(int(op.outputs[1].shape[0]))]]
