"""Widths: the numbers on a module that a removal cuts, and whether they agree with the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

#: Attributes of torch's modules that stand for a width. Of these, nothing else is ever set from a file.
ATTRIBUTES = frozenset(
    {
        *("in_channels", "out_channels", "groups", "in_features", "out_features"),
        *("num_features", "normalized_shape", "num_channels", "num_groups", "num_parameters"),
        *("embedding_dim", "embed_dim", "kdim", "vdim", "num_heads", "head_dim"),
        *("input_size", "hidden_size", "proj_size", "in1_features", "in2_features"),
    }
)


def is_width(module: nn.Module, leaf: str) -> bool:
    """Whether an attribute can stand for a width: a known one of torch's, or whole numbers on a user's own module."""
    value = vars(module).get(leaf)
    if leaf in ATTRIBUTES:
        return value is not None
    own = not type(module).__module__.startswith("torch.") and not leaf.startswith("_")
    numbers = value if isinstance(value, tuple | list) else (value,)
    return own and leaf != "training" and all(type(number) is int for number in numbers)


def problem(
    module: nn.Module, number: Callable[[str], Any], shape: Callable[[str], tuple[int, ...] | None]
) -> str | None:
    """What does not agree between the numbers and the tensors of a module of torch; None where all does.

    Args:
        module: the module; of other kinds than those below nothing is known.
        number: attribute → its value, now or at another time.
        shape: tensor → its shape at that time, or None if there is none.
    """
    for divisor, dividend in _divides(module):
        if number(dividend) % number(divisor):
            return f"{dividend} = {number(dividend)} cannot be divided by {divisor} = {number(divisor)}"
    if isinstance(module, nn.MultiheadAttention):
        heads, width, all_heads = (number(leaf) for leaf in ("num_heads", "head_dim", "embed_dim"))
        if heads * width != all_heads:
            return f"{heads} heads of {width} are not embed_dim = {all_heads}"
    for leaf, wanted in _shapes(module, number).items():
        found = shape(leaf)
        if found is not None and found != wanted:
            return f"{leaf} is {list(found)}, but its numbers say {list(wanted)}"
    return None


def _divides(module: nn.Module) -> list[tuple[str, str]]:
    """Pairs of numbers of which the first divides the second."""
    if isinstance(module, _ConvNd):
        return [("groups", "in_channels"), ("groups", "out_channels")]
    if isinstance(module, nn.GroupNorm):
        return [("num_groups", "num_channels")]
    return []


def _shapes(module: nn.Module, number: Callable[[str], Any]) -> dict[str, tuple[int, ...]]:
    """The shapes that a module's numbers ask for."""
    if isinstance(module, _ConvNd):
        first, second = number("out_channels"), number("in_channels")
        if module.transposed:
            first, second = second, first
        kernel = module.kernel_size
        weight = (first, second // number("groups"), *kernel)
        return {"weight": weight, "bias": (number("out_channels"),)}
    if isinstance(module, nn.Linear):
        return {
            "weight": (number("out_features"), number("in_features")),
            "bias": (number("out_features"),),
        }
    if isinstance(module, _NormBase):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (number("num_features"),))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return dict.fromkeys(("weight", "bias"), tuple(number("normalized_shape")))
    if isinstance(module, nn.GroupNorm):
        return dict.fromkeys(("weight", "bias"), (number("num_channels"),))
    if isinstance(module, nn.Bilinear):
        out, *rest = (number(leaf) for leaf in ("out_features", "in1_features", "in2_features"))
        return {"weight": (out, *rest), "bias": (out,)}
    if isinstance(module, nn.PReLU):
        return {"weight": (number("num_parameters"),)}
    if isinstance(module, nn.Embedding):
        return {"weight": (module.num_embeddings, number("embedding_dim"))}
    if isinstance(module, nn.MultiheadAttention):
        width = number("embed_dim")
        return {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)}
    return {}
