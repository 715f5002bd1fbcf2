"""Rules of what shows the same values in another shape, and of operators on space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from decay_pruning.graph.axes import OPERATION, Atom, Axes, Misaligned, Reason, divide, fix, leaves, product
from decay_pruning.graph.op import Op
from decay_pruning.graph.rules._table import RULES, dims, rule
from decay_pruning.graph.sites import by_hand


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten")
def view(op: Op) -> Axes:
    return regroup(op, op.axes("self"), [int(n) for n in op.output.shape])


def regroup(op: Op, before: Axes, shape: Sequence[int]) -> Axes:
    """Merge and split dimensions, row-major."""
    if math.prod(shape) != math.prod(axis.size for axis in before) or 0 in shape:
        op.refuse(before, "is reinterpreted by")
        return [op.fixed(n) for n in shape]
    left = [axis for axis in before if axis.size != 1]
    out: Axes = []
    todo = [n for n in shape if n != 1]
    while todo:
        sizes, taken = [todo.pop(0)], [left.pop(0)]
        while (have := math.prod(a.size for a in taken)) != (want := math.prod(sizes)):
            if have < want:
                taken.append(left.pop(0))
            else:
                sizes.append(todo.pop(0))
        if len(sizes) == len(taken) == 1:
            if by_hand():
                op.mark(taken)  # the size may stand in the code as a number
            out += taken
            continue
        rest = product(*taken)
        try:
            parts: Axes = []
            for size in sizes[:-1]:
                part, rest = divide(rest, size)
                parts.append(part)
            parts.append(rest)
        except Misaligned:
            op.refuse(taken, "is split in a way that does not fit by", name=op.name.strip("_"))
            parts = [op.fixed(n) for n in sizes]
        if len(parts) > 1:
            op.mark(parts)
        out += parts
    found = iter(out)
    return [Atom(1) if n == 1 else next(found) for n in shape]


@rule("as_strided")
def as_strided(op: Op) -> Axes:
    """torch's pooling to one pixel rewrites strides only; anything else is beyond following."""
    x = op.axes("self")
    if [axis.size for axis in x] == list(op.output.shape):
        return x
    op.refuse(x, "is reinterpreted by")
    return [op.fixed(int(n)) for n in op.output.shape]


@rule("unsqueeze")
def unsqueeze(op: Op) -> Axes:
    x = op.axes("self")
    x.insert(op["dim"] % (len(x) + 1), Atom(1))
    return x


@rule("squeeze")
def squeeze(op: Op) -> Axes:
    x = op.axes("self")
    over = dims(op.get("dim"), len(x))
    return [axis for d, axis in enumerate(x) if d not in over or axis.size != 1]


@rule("permute")
def permute(op: Op) -> Axes:
    x = op.axes("self")
    return [x[d] for d in dims(op["dims"], len(x))] if x else x


@rule("t", "transpose", "numpy_T", "adjoint")
def transpose(op: Op) -> Axes:
    x = op.axes("self")
    if op.name in ("t", "numpy_T"):
        return x[::-1]
    a, b = (op["dim0"], op["dim1"]) if op.name == "transpose" else (-2, -1)
    if x:
        x[a], x[b] = x[b], x[a]
    return x


@rule("rot90")
def turn(op: Op) -> Axes:
    x = op.axes("self")
    a, b = dims(op["dims"], len(x))
    op.refuse([x[a], x[b]], "is turned by")
    if int(op["k"]) % 2:
        x[a], x[b] = x[b], x[a]
    return x


@rule("expand")
def expand(op: Op) -> Axes:
    x = op.axes("self")
    shape = [int(n) for n in op.output.shape]
    x = [Atom(1)] * (len(shape) - len(x)) + x
    return [axis if axis.size == n else Atom(n) for axis, n in zip(x, shape, strict=True)]


@rule("repeat")
def repeat(op: Op) -> Axes:
    x, times = op.axes("self"), op["repeats"]
    x = [Atom(1)] * (len(times) - len(x)) + x
    return [axis if n == 1 else product(Atom(n), axis) for axis, n in zip(x, times, strict=True)]


@rule("view_as_complex")
def view_as_complex(op: Op) -> Axes:
    *x, pair = op.axes("self")
    op.refuse([pair], "is read as pairs by")
    return x


@rule("view_as_real")
def view_as_real(op: Op) -> Axes:
    return [*op.axes("self"), op.fixed(2)]


def spatial(op: Op) -> Axes:
    """Pooling, padding, resizing: the last dimensions change, the others are kept."""
    x = op.axes(op.inputs[0])
    count = next((int(c) for c in op.name if c in "123"), 1)
    for tensor in op.inputs[1:]:
        op.refuse(op.axes(tensor), "is a position for")
    op.refuse(x[-count:], "is slid over by")
    return [*x[:-count], *(op.fixed(int(n)) for n in op.output.shape[-count:])]


@rule("max_unpool2d", "max_unpool3d")
def unpool(op: Op) -> Axes:
    """Every value goes to the place in space that it came from."""
    x, places = op.axes("self"), op.axes("indices")
    count = 3 if op.name.endswith("3d") else 2
    for mine, axis in zip(x[:-count], places, strict=False):
        op.tie(mine, axis)
    op.refuse([*x[-count:], *places[-count:]], "is slid over by")
    return [*x[:-count], *(op.fixed(int(n)) for n in op.output.shape[-count:])]


for _name in dir(torch.ops.aten):
    if (
        _name.lstrip("_").startswith(
            (
                "max_pool",
                "avg_pool",
                "adaptive_",
                "upsample_",
                "reflection_pad",
                "replication_pad",
                "grid_sampler_",
                "fractional_max",
            )
        )
        and "backward" not in _name
    ):
        RULES.setdefault(_name, spatial)


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(op: Op) -> Axes:
    x = op.axes("self")
    d = 1 if "channel" in op.name else len(x) - 3
    space = [op.fixed(int(n)) for n in op.output.shape[-2:]]
    try:
        if op.name == "pixel_unshuffle":
            extra = op.fixed(int(op["downscale_factor"]) ** 2)
            return [*x[:d], product(x[d], extra), *space]
        if op.name == "pixel_shuffle":
            width, extra = divide(x[d], int(op.output.shape[d]))
            fix(extra, Reason(OPERATION, "becomes space"))
            return [*x[:d], width, *space]
        count, width = divide(x[d], int(op["groups"]))
        op.mark([width])
        for atom in leaves(count):
            atom.count = True
        return [*x[:d], product(width, count), *x[d + 1 :]]
    except Misaligned:
        op.refuse([x[d]], "is shuffled by")
        return [*x[:d], op.fixed(int(op.output.shape[d])), *(space if d != 1 else x[d + 1 :])]


@rule("im2col")
def im2col(op: Op) -> Axes:
    x = op.axes("self")
    op.refuse(x[-2:], "is slid over by")
    window = op.fixed(math.prod(op["kernel_size"]))
    return [*x[:-3], product(x[-3], window), op.fixed(int(op.output.shape[-1]))]


@rule("col2im")
def col2im(op: Op) -> Axes:
    x = op.axes("self")
    try:
        width, window = divide(x[-2], int(op.output.shape[-3]))
        fix(window, Reason(OPERATION, "becomes space"))
    except Misaligned:
        op.refuse([x[-2]], "is folded by")
        width = op.fixed(int(op.output.shape[-3]))
    return [*x[:-2], width, *(op.fixed(int(n)) for n in op.output.shape[-2:])]
