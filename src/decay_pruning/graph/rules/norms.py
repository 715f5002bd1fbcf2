"""Rules of norms and reductions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from decay_pruning import surgery
from decay_pruning.graph.axes import OPERATION, Atom, Axes, Axis, Misaligned, Reason, divide, fix, leaves
from decay_pruning.graph.op import Op
from decay_pruning.graph.rules._table import dims, elementwise, mark_mixed, mix, rule
from decay_pruning.graph.scales import Norm
from decay_pruning.graph.sites import at
from decay_pruning.structures import Role


def affine(op: Op, axis: Axis, d: int = 0) -> None:
    for leaf, role in (
        ("weight", Role.SCALE),
        ("bias", Role.SHIFT),
        ("running_mean", Role.BUFFER),
        ("running_var", Role.BUFFER),
    ):
        if op.get(leaf) is not None:
            mine = op.axes(leaf)[d]
            op.role(mine, role)
            op.tie(axis, mine)


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "miopen_batch_norm",
)
def batch_norm(op: Op) -> list[Axes]:
    x = op.axes("input")
    affine(op, x[1])
    if op.get("training", op.get("train", False)):
        mix(op, [x[0], *x[2:]], "{} normalises over this width")
    return [x]


@rule("_fused_rms_norm", "rms_norm")
def rms_norm(op: Op) -> list[Axes]:
    """γ and ε take the change of the width (`scales`), if there is one γ and the layer is known."""
    x = op.axes("input")
    shape = op["normalized_shape"]
    for d, axis in enumerate(x[-len(shape) :]):
        affine(op, axis, d)
    along = x[-len(shape) :]
    if op.derived:
        mix(op, along, "{} normalises over this width")
        return [x]
    norm = _norm(op, along)
    norm.epsilon = epsilon_of(op["input"].dtype) if op.get("eps") is None else op["eps"]
    norm.level = None if op["input"].is_meta else float(op["input"].double().square().mean())
    weight = op.get("weight")
    if weight is not None:
        value = op.value(weight)
        names = value.names() if value.derived else set()
        norm.gammas = dict.fromkeys(names, value.shift)
    return [x]


def epsilon_of(dtype: torch.dtype) -> float:
    """What `nn.RMSNorm(eps=None)` adds, which computes narrow dtypes in single precision."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _norm(op: Op, along: Axes, *, surely: bool = True) -> Norm:
    """A root mean square begins. What it does to the width is said when it is known whether a fold is possible."""
    module = None if op.module is None else op.trace.modules.get(op.module)
    norm = Norm(along[0], module, surely, _unfit(op, along) if surely else lambda why: None)
    if len(along) != 1:
        norm.broken = "goes over several dimensions"
    op.trace.norms.append(norm)
    return norm


def _unfit(op: Op, along: Axes) -> Callable[[str], None]:
    """Says what a mean of squares does to a width if nothing takes its scale. Holds no tensors of the run."""
    whole = op.name != "mean" or "norm" in type(op.module).__name__.lower()
    alone = op.module is not None and whole and surgery.mixes_alone(op.module)
    where = op.trace.name(op.module)
    name = "the mean" if op.name == "mean" else op.name.removeprefix("_")
    mixed = f"is mixed by {name}{at(op.site())}"

    def say(why: str) -> None:
        if alone:
            mark_mixed(along, f"{where} normalises over this width{why}")
        else:
            for axis in along:
                fix(axis, Reason(OPERATION, mixed + why))

    return say


@rule("native_layer_norm")
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


@rule("embedding_renorm")
def shorten(op: Op) -> Axes:
    """Rows are shortened to a largest norm, to which zeros add nothing."""
    return op.axes("self")


#: Zeros do not change these, so positions that are zero can go.
_ADDITIVE = {"sum", "nansum", "linalg_vector_norm", "norm", "any", "count_nonzero"}
_MEANS = {"mean", "var", "std", "var_mean", "std_mean"}


@rule(
    "sum",
    "nansum",
    "linalg_vector_norm",
    "norm",
    "any",
    "count_nonzero",
    "mean",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "amax",
    "amin",
    "max",
    "min",
    "prod",
    "logsumexp",
    "argmax",
    "argmin",
    "all",
    "median",
    "aminmax",
    "mode",
)
def reduction(op: Op) -> Axes | list[Axes]:
    x = op.axes(op.inputs[0])
    if len(op.inputs) > 1:  # the larger of two
        return elementwise(op)
    over = dims(op.get("dim"), len(x))
    along = [x[d] for d in over]
    square = op.value(op.inputs[0]).stage
    squares = square is not None and square.kind == "square" and op.name in ("mean", "sum")
    length = op.name == "linalg_vector_norm" and op["ord"] == 2
    if (squares or length) and not op.derived:
        op.norm = _norm(op, along, surely=op.name == "mean")
    else:
        _mixed(op, along)
    if op.get("keepdim"):
        return [Atom(1) if d in over else axis for d, axis in enumerate(x)]
    return [axis for d, axis in enumerate(x) if d not in over]


def _mixed(op: Op, along: Axes) -> None:
    norm = op.module is not None and "norm" in type(op.module).__name__.lower()
    if op.name in _MEANS and (norm or op.derived):
        mix(op, along, "{} normalises over this width")
    elif op.name not in _ADDITIVE:
        op.refuse(along, "is mixed by", name=f"the {op.name}")


@rule(
    "_softmax",
    "_safe_softmax",
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
