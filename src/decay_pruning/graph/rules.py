"""Operation rules: how the axes of a result follow from those of the inputs, one entry for each kind of operator.

To teach the tracer an operator, write a function of an `Op` that ties what must stay equal and returns the axes of the
output (a list of lists for several outputs), put its name above it, and add a case to `tests/test_rules.py`. An
operator that has no entry fixes all its inputs, and the reason says its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from decay_pruning.graph.axes import (
    Atom,
    Axis,
    Misaligned,
    Reason,
    concatenation,
    divide,
    fix,
    is_fixed,
    leaves,
    product,
    split,
)
from decay_pruning.graph.trace import OPERATION, UNIT, Axes, Op, Rule, at, by_hand, site
from decay_pruning.structures import Role

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function for operators, by their names in ATen."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def rule_of(function: Any) -> Rule | None:
    """The rule of an operator: its own, that of its in-place form, or the one of all elementwise operators."""
    name = function._schema.name.removeprefix("aten::")
    found = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in function.tags:
        return elementwise
    return found


def dims(value: Any, ndim: int) -> list[int]:
    """Dimensions as positive numbers; none given means all."""
    if value is None or value == []:
        return list(range(ndim))
    return [d % max(ndim, 1) for d in (value if isinstance(value, list | tuple) else [value])]


def mark(op: Op, axes: Sequence[Axis]) -> None:
    """Remember where the code splits these axes, to be named where a removal fails."""
    where = None
    for axis in axes:
        for atom in leaves(axis):
            if atom.reason is None and atom.site is None:
                where = where or site()
                atom.site = f"{op.name.strip('_')}{at(where)}"


# ------------------------------------------------------------------------------------------------ elementwise


@rule(
    "alias", "detach", "clone", "_to_copy", "contiguous", "copy", "native_dropout", "bernoulli", "fill", "zero",
    "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like", "normal", "uniform", "dropout",
    "masked_fill", "where", "_prelu_kernel", "lerp", "_to_dense", "lift", "lift_fresh", "lift_fresh_copy", "to", "resolve_conj", "_conj", "real", "imag",
    "exponential", "rrelu_with_noise", "_fused_dropout", "polar", "complex", "new_zeros", "new_ones", "new_full",
)  # fmt: skip
def elementwise(op: Op) -> Axes:
    """Dimensions from the last on are one, where neither has size 1."""
    if op.name.startswith("new_"):
        return [Atom(int(n)) for n in op.output.shape]
    out: list[Axis | None] = [None] * op.output.ndim
    for tensor in op.inputs:
        for d, axis in enumerate(reversed(op.axes(tensor))):
            if d >= len(out) or axis.size == 1:
                continue
            mine = out[-1 - d]
            if mine is None:
                out[-1 - d] = axis
                continue
            op.tie(mine, axis)
            if op.trace.is_parameter(axis) and not op.trace.is_parameter(mine):
                out[-1 - d] = axis
    return [op.fixed(int(n)) if axis is None else axis for axis, n in zip(out, op.output.shape, strict=True)]


# ------------------------------------------------------------------------------------------------ contractions


def contract(op: Op, a: Axis, b: Axis) -> None:
    """Sum over products along an axis that both inputs have."""
    op.role(a, Role.COLUMN)
    op.role(b, Role.COLUMN)
    op.tie(a, b)


def produce(op: Op, *axes: Axis) -> Axes:
    for axis in axes:
        op.role(axis, Role.ROW)
    return list(axes)


def add_bias(op: Op, argument: str, out: Axes) -> Axes:
    if op.get(argument) is not None:
        for mine, axis in zip(reversed(out), reversed(op.axes(argument)), strict=False):
            if axis.size != 1:
                op.role(axis, Role.BIAS)
                op.tie(mine, axis)
    return out


@rule("mm", "addmm", "_grouped_mm", "mv", "addmv", "dot", "vdot", "linear")
def matrix_product(op: Op) -> Axes:
    first, second = {
        "mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "_grouped_mm": ("self", "mat2"), "mv": ("self", "vec"),
        "addmv": ("mat", "vec"), "dot": ("self", "tensor"), "vdot": ("self", "other"), "linear": ("input", "weight"),
    }[op.name]  # fmt: skip
    a, b = op.axes(first), op.axes(second)
    if op.name == "linear":
        b = b[::-1]
    if op.name == "_grouped_mm":
        if len(a) != 2 or len(b) != 3:
            op.refuse([*a, *b], "goes through")
            return [op.fixed(int(n)) for n in op.output.shape]
        fix(b[0], Reason(OPERATION, "counts experts"))
        b = b[1:]
    contract(op, a[-1], b[0])
    out = produce(op, *a[:-1], *b[1:])
    return add_bias(op, {"linear": "bias"}.get(op.name, "self" if op.name.startswith("add") else "bias"), out)


@rule("bmm", "baddbmm")
def batched_product(op: Op) -> Axes:
    first, second = ("self", "mat2") if op.name == "bmm" else ("batch1", "batch2")
    a, b = op.axes(first), op.axes(second)
    op.tie(a[0], b[0])
    op.trace.heads.append(a[0])
    contract(op, a[2], b[1])
    out = [a[0], *produce(op, a[1], b[2])]
    return add_bias(op, "self", out) if op.name == "baddbmm" else out


@rule("_cdist_forward")
def distances(op: Op) -> Axes:
    a, b = op.axes("x1"), op.axes("x2")
    op.tie(a[-1], b[-1])
    return [*a[:-1], b[-2]]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "scaled_dot_product_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def attention(op: Op) -> list[Axes]:
    q, k, v = op.axes("query"), op.axes("key"), op.axes("value")
    for a, b, c in zip(q[:-2], k[:-2], v[:-2], strict=True):
        op.tie(b, c)
        try:  # several heads of queries can share one of keys and values
            op.tie(divide(a, b.size)[0], b)
        except Misaligned:
            op.refuse([a, b, c], "is shared between heads by")
        op.trace.heads.append(a)
    op.tie(k[-2], v[-2])
    op.tie(q[-1], k[-1])
    if op.get("scale") is None and not isinstance(
        op.module, nn.MultiheadAttention
    ):  # that one is in `layers`
        mix(op, [q[-1]], "{} scales its scores by the head width")
    return [[*q[:-1], v[-1]]]


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def convolution(op: Op) -> Axes:
    x, w = op.axes("input"), op.axes("weight")
    groups, rows = int(op["groups"]), 0
    if op.get("transposed"):
        w, rows = [w[1], w[0], *w[2:]], 1  # rows first
    op.refuse([*x[2:], *w[2:]], "is slid over by")
    space = [op.fixed(int(n)) for n in op.output.shape[2:]]
    if rows and groups > 1 and groups == x[1].size:  # transposed depthwise: one dimension is both
        op.role(w[1], Role.ROW)
    for axis, role in ((w[0], Role.ROW), (w[1], Role.COLUMN)):
        op.role(axis, role)
    if groups == 1:
        op.tie(x[1], w[1])
        return _with_bias(op, [x[0], w[0], *space])
    try:
        if rows:  # weight is (in, out per group, …)
            count, per_group = divide(x[1], groups)
            op.tie(w[1], x[1])
            out: Axis = product(count, w[0])
        else:
            count, per_group = divide(x[1], groups)
            op.tie(per_group, w[1])
            outer, inner = divide(w[0], groups)
            op.tie(count, outer)
            out = w[0]
    except Misaligned:
        op.refuse([x[1], w[0], w[1]], "is cut into groups that do not fit by", name="a grouped convolution")
        return [x[0], op.fixed(int(op.output.shape[1])), *space]
    if isinstance(op.module, nn.modules.conv._ConvNd):
        op.trace.groups[op.module] = count
    else:
        fix(count, Reason(OPERATION, f"counts the groups of a convolution{at(site())}"))
    inner = divide(out, groups)[1]
    for atom in leaves(count if per_group.size > 1 else inner):
        atom.count = True
    return _with_bias(op, [x[0], out, *space])


def _with_bias(op: Op, out: Axes) -> Axes:
    if op.get("bias") is not None:
        bias = op.axes("bias")[0]
        op.role(bias, Role.BIAS)
        op.tie(out[1], bias)
    return out


@rule("embedding", "_embedding_bag", "_embedding_bag_forward_only")
def lookup(op: Op) -> list[Axes]:
    words, width = op.axes("weight")
    op.refuse([words], "is looked up by number in")
    op.role(width, Role.ROW)
    rows = op.axes("indices") if op.name == "embedding" else [op.fixed(int(op.output.shape[0]))]
    return [[*rows, width]]


@rule("mkldnn_rnn_layer")
def recurrent_layer(op: Op) -> list[Axes]:
    x, hidden = op.axes("input"), int(op["hidden_size"])
    wi, wh = op.axes("weight0"), op.axes("weight1")
    contract(op, x[-1], wi[1])
    width = divide(wi[0], wi[0].size // hidden)[1]
    for gates in (wi[0], wh[0]):
        op.role(gates, Role.ROW)
        op.tie(wi[0], gates)
    contract(op, width, wh[1])
    for leaf in ("weight2", "weight3"):
        bias = op.axes(leaf)
        if bias and bias[0].size == wi[0].size:
            op.role(bias[0], Role.BIAS)
            op.tie(wi[0], bias[0])
    state = [*(op.fixed(int(n)) for n in op.outputs[1].shape[:-1]), width]
    return [[*x[:-1], width], state, list(state)]


# ------------------------------------------------------------------------------------------------------- norms


def mix(op: Op, axes: Sequence[Axis], text: str) -> None:
    """Removal along these axes changes the function by its nature."""
    for axis in axes:
        for atom in leaves(axis):
            if atom.reason is None and atom.size > 1 and atom.mixed is None:
                atom.mixed = text.format(op.trace.name(op.module))


def affine(op: Op, axis: Axis, d: int = 0) -> None:
    for leaf, role in (("weight", Role.SCALE), ("bias", Role.SHIFT), ("running_mean", Role.BUFFER), ("running_var", Role.BUFFER)):  # fmt: skip
        if op.get(leaf) is not None:
            mine = op.axes(leaf)[d]
            op.role(mine, role)
            op.tie(axis, mine)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_native_batch_norm_legit_functional", "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm")  # fmt: skip
def batch_norm(op: Op) -> list[Axes]:
    x = op.axes("input")
    affine(op, x[1])
    if op.get("training", op.get("train", False)):
        mix(op, [x[0], *x[2:]], "{} normalises over this width")
    return [x]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(op: Op) -> list[Axes]:
    x = op.axes("input")
    shape = op["normalized_shape"]
    for d, axis in enumerate(x[-len(shape) :]):
        affine(op, axis, d)
    mix(op, x[-len(shape) :], "{} normalises over this width")
    return [x]


@rule("native_group_norm")
def group_norm(op: Op) -> list[Axes]:
    x = op.axes("input")
    affine(op, x[1])
    try:
        count, width = divide(x[1], int(op["group"]))
    except Misaligned:
        op.refuse([x[1]], "is cut into groups that do not fit by")
        return [x]
    if isinstance(op.module, nn.GroupNorm):
        op.trace.groups[op.module] = count
    mix(op, [width], "{} normalises over this width")
    if count.size > 1:  # whole groups can go exactly
        for atom in leaves(width):
            atom.count = True
    return [x]


@rule("_weight_norm_interface")
def weight_norm(op: Op) -> list[Axes]:
    v, g, d = op.axes("v"), op.axes("g"), int(op["dim"])
    op.tie(v[d], g[d])
    return [v]


# -------------------------------------------------------------------------------------------------- reductions

#: Zeros do not change these, so positions that are zero can go.
_ADDITIVE = {"sum", "nansum", "linalg_vector_norm", "norm", "any", "count_nonzero"}
_MEANS = {"mean", "var", "std", "var_mean", "std_mean"}


@rule("sum", "nansum", "linalg_vector_norm", "norm", "any", "count_nonzero", "mean", "var", "std", "var_mean", "std_mean",
      "amax", "amin", "max", "min", "prod", "logsumexp", "argmax", "argmin", "all", "median", "aminmax", "mode")  # fmt: skip
def reduction(op: Op) -> Axes | list[Axes]:
    x = op.axes(op.inputs[0])
    if len(op.inputs) > 1:  # the larger of two
        return elementwise(op)
    over = dims(op.get("dim"), len(x))
    along = [x[d] for d in over]
    if op.name in _MEANS and op.module is not None and "norm" in type(op.module).__name__.lower():
        mix(op, along, "{} normalises over this width")
    elif op.name not in _ADDITIVE:
        op.refuse(along, "is mixed by", name=f"the {op.name}")
    if op.get("keepdim"):
        return [Atom(1) if d in over else axis for d, axis in enumerate(x)]
    return [axis for d, axis in enumerate(x) if d not in over]


@rule(
    "_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "flip",
    "roll",
    "sort",
    "cummax",
    "cummin",
    "argsort",
)
def along_dimension(op: Op) -> Axes:
    x = op.axes(op.inputs[0])
    over = dims(op.get("dim", op.get("dims")), len(x))
    op.refuse([x[d] for d in over], "is mixed by", name=op.name.strip("_"))
    return x


@rule("topk", "kthvalue", "_fft_r2c", "_fft_c2r", "_fft_c2c", "unfold")
def resized_dimension(op: Op) -> Axes:
    x = op.axes(op.inputs[0])
    over = dims(op.get("dim", op.get("dimension")), len(x))
    op.refuse([x[d] for d in over], "is mixed by", name=op.name.strip("_"))
    return [
        axis if d < len(x) and d not in over else op.fixed(int(n))
        for d, (axis, n) in enumerate(zip([*x, Atom(1)], op.output.shape, strict=False))
    ]


@rule("tril", "triu")
def triangle(op: Op) -> Axes:
    x = op.axes("self")
    op.refuse(x[-2:], "is cut to a triangle by")
    return x


# ------------------------------------------------------------------------------------------------------- views


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
                mark(op, taken)  # the size may stand in the code as a number
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
            mark(op, parts)
        out += parts
    found = iter(out)
    return [Atom(1) if n == 1 else next(found) for n in shape]


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


# ------------------------------------------------------------------------------------------- parts and wholes


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
            fix(count, Reason(UNIT, f"counts equal parts{at(site())}"))
            mark(op, [part])
            return [part] * len(sizes)
    except Misaligned:
        pass
    try:
        parts: Axes = []
        rest = axis
        for size in sizes[:-1]:
            part, rest = split(rest, size) if 0 < size < rest.size else (Atom(size), rest)
            parts.append(part)
        mark(op, [*parts, rest])
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
        fix(x[d], Reason(UNIT, f"is read by position in {op.name}{at(site())}"))
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
            fix(phase, Reason(UNIT, f"is read in steps{at(site())}"))
            mark(op, [part])
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


@rule("index", "index_select", "gather", "take_along_dim")
def index(op: Op) -> Axes:
    x = op.axes("self")
    if op.name == "index":
        at_dims = [d for d, i in enumerate(op["indices"]) if i is not None]
        given = [i for i in op["indices"] if i is not None]
        op.refuse([x[d] for d in at_dims], "is read by position in")
        for tensor in given:
            op.refuse(op.axes(tensor), "is an index of")
        rest = [axis for d, axis in enumerate(x) if d not in at_dims]
        new = [op.fixed(int(n)) for n in torch.broadcast_shapes(*(i.shape for i in given))]
        if any(i.dtype in (torch.bool, torch.uint8) for i in given):
            op.refuse(x, "is read by a mask in")
            return [op.fixed(int(n)) for n in op.output.shape]
        together = at_dims == list(range(at_dims[0], at_dims[-1] + 1))
        where = at_dims[0] if together else 0
        return [*rest[:where], *new, *rest[where:]]
    d = op["dim"] % max(len(x), 1)
    op.refuse([x[d]], "is read by position in")
    if op.name == "index_select":
        return [*x[:d], op.fixed(int(op.output.shape[d])), *x[d + 1 :]]
    places = op.axes("index")
    op.refuse(places, "is an index of")
    for k, axis in enumerate(x):
        if axis.size != places[k].size or k == d:
            op.refuse([axis], "is read by position in")
        else:
            op.tie(axis, places[k])
    return places


# ------------------------------------------------------------------------------------------------------- space


def spatial(op: Op) -> Axes:
    """Pooling, padding, resizing: the last dimensions change, the others are kept."""
    x = op.axes(op.inputs[0])
    count = next((int(c) for c in op.name if c in "123"), 1)
    for tensor in op.inputs[1:]:
        op.refuse(op.axes(tensor), "is a position for")
    op.refuse(x[-count:], "is slid over by")
    return [*x[:-count], *(op.fixed(int(n)) for n in op.output.shape[-count:])]


for _name in dir(torch.ops.aten):
    if _name.lstrip("_").startswith(
        ("max_pool", "avg_pool", "adaptive_", "upsample_", "reflection_pad", "replication_pad", "grid_sampler_", "fractional_max")
    ) and "backward" not in _name:  # fmt: skip
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
        mark(op, [width])
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
