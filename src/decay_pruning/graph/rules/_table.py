"""The table of rules, the rule of all elementwise operators, and what rules have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from decay_pruning import surgery
from decay_pruning.graph.axes import Axes, Axis, leaves
from decay_pruning.graph.op import Op, Rule, name_of

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function for operators, by their names in ATen."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def rule_of(function: Any) -> Rule | None:
    """The rule of an operator: its own, that of its in-place form, or the one of all elementwise operators."""
    name = name_of(function)
    found = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in getattr(function, "tags", ()):
        return elementwise
    return found


def dims(value: Any, ndim: int) -> list[int]:
    """Dimensions as positive numbers; none given means all."""
    if value is None or value == []:
        return list(range(ndim))
    return [d % max(ndim, 1) for d in (value if isinstance(value, list | tuple) else [value])]


@rule(
    "alias",
    "detach",
    "clone",
    "_to_copy",
    "contiguous",
    "copy",
    "native_dropout",
    "bernoulli",
    "fill",
    "zero",
    "zeros_like",
    "ones_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "full_like",
    "normal",
    "uniform",
    "dropout",
    "masked_fill",
    "where",
    "_prelu_kernel",
    "lerp",
    "_to_dense",
    "lift",
    "lift_fresh",
    "lift_fresh_copy",
    "to",
    "resolve_conj",
    "_conj",
    "real",
    "imag",
    "exponential",
    "rrelu_with_noise",
    "_fused_dropout",
    "polar",
    "complex",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "new_empty_strided",
    "hardswish",
    "log_sigmoid_forward",
    "rsub",
    "floor_divide",
    "isclose",
    "fake_quantize_per_tensor_affine_cachemask",
    "nan_to_num",
)
def elementwise(op: Op) -> Axes:
    """Dimensions from the last on are one, where neither has size 1."""
    if op.name.startswith("new_"):
        return op.made(op.output)
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


def mix(op: Op, axes: Sequence[Axis], text: str) -> None:
    """Removal along these axes changes the function by its nature, if a layer of its own does nothing else."""
    if op.derived and op.module in op.trace.modules:
        op.trace.standardised.add(op.trace.modules[op.module])
    elif op.module is None or not surgery.mixes_alone(op.module):
        op.refuse(axes, "is mixed by", name=op.name.removeprefix("native_").removeprefix("_"))
        return
    mark_mixed(axes, text.format(op.trace.name(op.module)))


def mark_mixed(axes: Sequence[Axis], text: str) -> None:
    """Removal along these axes changes the function by its nature, for this reason."""
    for axis in axes:
        for atom in leaves(axis):
            if atom.reason is None and atom.size > 1 and atom.mixed is None:
                atom.mixed = text
