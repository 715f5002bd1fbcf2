"""Rules of what multiplies: matrix products, attention, convolutions, look-ups, recurrent layers."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn

from decay_pruning.graph.axes import (
    OPERATION,
    UNIT,
    Axes,
    Axis,
    Misaligned,
    Reason,
    divide,
    factors,
    find,
    fix,
    is_fixed,
    leaves,
    product,
    terms,
)
from decay_pruning.graph.op import Op
from decay_pruning.graph.rules._table import rule
from decay_pruning.graph.scales import Scores
from decay_pruning.graph.sites import at
from decay_pruning.structures import Role


def multiply(op: Op, a: Axes, b: Axes) -> Axes:
    """Sum over products along an axis that both matrices have: the last one of `a`, the first one of `b`."""
    apart = op.derived and not op.trace.is_layer(
        b
    )  # both are weights, and so is what comes out: its use will show
    if not apart or find(a[-1]) is not find(b[0]):  # a weight times itself says nothing of its rows
        op.role(a[-1], Role.COLUMN if apart or not op.derived else Role.ROW)
        op.role(b[0], Role.ROW if apart else Role.COLUMN)
    op.tie(a[-1], b[0])
    out = [*a[:-1], *b[1:]]
    for axis in out if not apart else ():
        op.role(axis, Role.ROW)
    return out


def contract(op: Op, a: Axis, b: Axis) -> None:
    op.role(a, Role.COLUMN)
    op.role(b, Role.COLUMN)
    op.tie(a, b)


def add_bias(op: Op, argument: str, out: Axes) -> Axes:
    if op.get(argument) is not None:
        for mine, axis in zip(reversed(out), reversed(op.axes(argument)), strict=False):
            if axis.size != 1:
                op.role(axis, Role.BIAS)
                op.tie(mine, axis)
    return out


@rule("mm", "addmm", "_grouped_mm", "mv", "addmv", "dot", "vdot", "linear", "_sparse_mm", "_sparse_addmm")
def matrix_product(op: Op) -> Axes:
    first, second = {
        "mm": ("self", "mat2"),
        "addmm": ("mat1", "mat2"),
        "_grouped_mm": ("self", "mat2"),
        "mv": ("self", "vec"),
        "addmv": ("mat", "vec"),
        "dot": ("self", "tensor"),
        "vdot": ("self", "other"),
        "linear": ("input", "weight"),
        "_sparse_mm": ("sparse", "dense"),
        "_sparse_addmm": ("mat1", "mat2"),
    }[op.name]
    a, b = op.axes(first), op.axes(second)
    if op.name == "linear":
        b = b[::-1]
    if op.name == "_grouped_mm":
        if len(a) != 2 or len(b) != 3:
            op.refuse([*a, *b], "goes through")
            return [op.fixed(int(n)) for n in op.output.shape]
        fix(b[0], Reason(OPERATION, "counts experts"))
        b = b[1:]
        _steps(op, a[-1], *b)
    out = multiply(op, a, b)
    return add_bias(op, {"linear": "bias"}.get(op.name, "self" if "add" in op.name else "bias"), out)


def _steps(op: Op, *axes: Axis) -> None:
    """Rows of a grouped product start at multiples of 16 bytes: 8 neighbours stay together, in any dtype."""
    for term in (term for axis in axes for term in terms(axis)):
        parts, step = factors(term), 8
        while parts and is_fixed(parts[-1]):
            step //= math.gcd(step, parts.pop().size)
        if not parts or step == 1:
            continue
        count, rest = divmod(parts[-1].size, step)
        wants = f"steps of {step}, which {op.name} wants{at(op.site())}"
        if rest or count == 1:
            fix(parts[-1], Reason(OPERATION, f"cannot be cut in {wants}"))
        else:
            fix(divide(parts[-1], count)[1], Reason(UNIT, f"is cut in {wants}"))


@rule("bmm", "baddbmm")
def batched_product(op: Op) -> Axes:
    first, second = ("self", "mat2") if op.name == "bmm" else ("batch1", "batch2")
    a, b = op.axes(first), op.axes(second)
    op.tie(a[0], b[0])
    op.trace.heads.append(a[0])
    derived = [op.value(op[name]).derived for name in (first, second)]
    if not any(derived):  # torch's own attention divides by the width of its heads
        surely = op.scaled or isinstance(op.module, nn.MultiheadAttention)
        note_scores(op, a[-1], op[first], op[second], surely=surely, across=True)
    out = [a[0], *multiply(op, a[1:], b[1:])]
    return add_bias(op, "self", out) if op.name == "baddbmm" else out


@rule("_trilinear")
def three_factors(op: Op) -> Axes:
    """A product of three tensors along all dimensions at once, some of which are summed over (nn.Bilinear)."""
    out: list[Axis | None] = [None] * (op.output.ndim + len(op["sumdim"]))
    for k in "123":
        axes = iter(op.axes(f"i{k}"))
        for d in range(len(out)):
            if d in op[f"expand{k}"]:
                continue
            axis, mine = next(axes), out[d]
            op.role(axis, Role.COLUMN if d in op["sumdim"] else Role.ROW)
            if mine is not None:
                op.tie(mine, axis)
            out[d] = axis
    return [axis for d, axis in enumerate(out) if axis is not None and d not in op["sumdim"]]


@rule("_cdist_forward")
def distances(op: Op) -> Axes:
    a, b = op.axes("x1"), op.axes("x2")
    op.tie(a[-1], b[-1])
    return [*a[:-1], b[-2]]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "scaled_dot_product_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
    "flex_attention",
)
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
    for tensor in (t for t in op.inputs if all(t is not op[name] for name in ("query", "key", "value"))):
        if op.name == "flex_attention":
            op.refuse(op.axes(tensor), "is read by position in")
    plain = op.name == "flex_attention" and op["scale"] == op["query"].shape[-1] ** -0.5
    scale = None if plain else op.get("scale")
    note_scores(op, q[-1], op["query"], op["key"], surely=scale is None)
    return [[*q[:-1], v[-1]]]


def note_scores(
    op: Op, width: Axis, query: Tensor, key: Tensor, *, surely: bool, across: bool = False
) -> None:
    """Queries meet keys along a width, by the root of which the scores may be divided (`scales`)."""
    module = None if op.module is None else op.trace.modules.get(op.module)
    rows, keys = op.value(query).rows, op.value(key).rows
    if across and keys is not None:
        keys = replace(keys, labels=keys.labels.transpose(-1, -2))
    op.trace.scores.append(Scores(width, rows or keys, keys, module, surely))


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def convolution(op: Op) -> Axes:
    x, w = op.axes("input"), op.axes("weight")
    groups, rows = int(op["groups"]), 0
    if op.get("transposed"):
        w, rows = [w[1], w[0], *w[2:]], 1  # rows first
    space = _space(op, x[2:], w[2:])
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
    inner = divide(out, groups)[1]
    for atom in leaves(count if per_group.size > 1 else inner):
        atom.count = True
    return _with_bias(op, [x[0], out, *space])


def _space(op: Op, x: Axes, w: Axes) -> Axes:
    """The dimensions that a kernel slides over. One of a single position leaves them as they are."""
    still = {"stride": 1, "padding": 0, "output_padding": 0}
    out: Axes = []
    for d, (axis, n) in enumerate(zip(x, op.output.shape[2:], strict=True)):
        steps = {name: values[d % len(values)] for name in still if (values := op.get(name))}
        if w[d].size == 1 and all(still[name] == n for name, n in steps.items()):
            out.append(axis)
        else:
            op.refuse([axis, w[d]], "is slid over by")
            out.append(op.fixed(int(n)))
    return out


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
