"""The multiply-accumulates of every operator that multiplies, and the widths that they grow with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from decay_pruning.counting._makers import CONSTANT, Axes, Axis, Makers, joined


@dataclass(frozen=True)
class Product:
    """One product of two tensors.

    Attributes:
        path: the innermost module in which it took place; "" is the model itself.
        macs: its multiply-accumulates.
        makers: to which power they grow with the size of a parameter's dimension.
    """

    path: str
    macs: int
    makers: Makers


class Ledger:
    """All products so far, and the dimensions of every tensor that is alive."""

    def __init__(self, model: nn.Module) -> None:
        self.products: list[Product] = []
        self.path = [""]  #: the modules that are running, innermost last
        self._axes = WeakTensorKeyDictionary()
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            self._axes[tensor] = [Axis(((n, {(name, d): 1.0}),)) for d, n in enumerate(tensor.shape)]

    def axes(self, tensor: Tensor) -> Axes:
        """Its dimensions, and what made them."""
        found: Axes | None = self._axes.get(tensor)
        return found if found is not None and len(found) == tensor.ndim else [CONSTANT] * tensor.ndim

    def note(self, tensor: Tensor, axes: Axes) -> None:
        """From now on these are its dimensions."""
        self._axes[tensor] = axes

    def add(self, macs: int, axes: Iterable[Axis]) -> None:
        """Note a product over all of these."""
        self.products.append(Product(self.path[-1], int(macs), joined(axes)))

    def multiply(self, a: Tensor, b: Tensor, spec: str) -> Axes:
        """Note the product of two tensors in Einstein's notation; the axes of its result."""
        left, right, result = spelled(spec, a.ndim)
        size: dict[str, int] = {}
        axes: dict[str, Axis] = {}
        for letters, tensor in ((left, a), (right, b)):
            for letter, extent, axis in zip(letters, tensor.shape, self.axes(tensor), strict=True):
                size[letter] = max(size.get(letter, 1), extent)
                axes[letter] = axis or axes.get(letter, CONSTANT)
        self.add(math.prod(size.values()) if a.numel() and b.numel() else 0, axes.values())
        return [axes[letter] for letter in result]


def spelled(spec: str, ndim: int) -> tuple[str, str, str]:
    """The three parts of a product's notation, with "..." spelled out for a first operand of so many dimensions."""
    left, _, right = spec.partition("->")[0].partition(",")
    more = "zyxwuts"[: ndim - len(left.replace("...", ""))]
    a, b, c = (part.replace("...", more) for part in (left, right, spec.partition("->")[2]))
    return a, b, c


#: Operator → positions of both operands, and the product in Einstein's notation.
EINSTEIN: dict[str, tuple[int, int, str]] = {
    "aten::mm": (0, 1, "mk,kn->mn"),
    "aten::addmm": (1, 2, "mk,kn->mn"),
    "aten::_addmm_activation": (1, 2, "mk,kn->mn"),
    "aten::_scaled_mm": (0, 1, "mk,kn->mn"),
    "aten::_int_mm": (0, 1, "mk,kn->mn"),
    "aten::bmm": (0, 1, "bmk,bkn->bmn"),
    "aten::baddbmm": (1, 2, "bmk,bkn->bmn"),
    "aten::addbmm": (1, 2, "bmk,bkn->mn"),
    "aten::mv": (0, 1, "mk,k->m"),
    "aten::addmv": (1, 2, "mk,k->m"),
    "aten::dot": (0, 1, "k,k->"),
    "aten::vdot": (0, 1, "k,k->"),
    "aten::linear": (0, 1, "...k,nk->...n"),
}
_ATTENTION = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "flex_attention",
)
_CONVOLUTIONS = ("aten::convolution", "aten::_convolution", "aten::convolution_overrideable")
_RECURRENT = ("aten::mkldnn_rnn_layer", "aten::_cudnn_rnn", "aten::miopen_rnn", "aten::_lstm_mps")
_GROUPED = ("aten::_grouped_mm", "aten::_scaled_grouped_mm")


def _product(first: int, second: int, spec: str) -> Callable[..., Axes]:
    def rule(ledger: Ledger, out: Tensor, *args: Any, **_: Any) -> Axes:
        return ledger.multiply(args[first], args[second], spec)

    return rule


def attention(
    ledger: Ledger, out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Axes:
    """q kᵀ, and the scores times v; masked places count, as they do in a plain product."""
    heads = ledger.axes(query)[:-2]
    *batch, length, width = query.shape
    keys, value_width = value.shape[-2:]
    q, k, v = (ledger.axes(t) for t in (query, key, value))
    pairs = math.prod(batch) * length * keys
    ledger.add(pairs * width, [*heads, q[-2], k[-2], q[-1]])
    ledger.add(pairs * value_width, [*v[:-2], q[-2], k[-2], v[-1]])
    return [*v[:-2], q[-2], v[-1]] if value.ndim == query.ndim else [*heads, q[-2], v[-1]]


def _convolution(ledger: Ledger, out: Tensor, x: Tensor, weight: Tensor, *args: Any, **_: Any) -> Axes:
    """Every weight is used once per position: of the output, or of the input where that is what is spread out."""
    transposed = bool(args[4]) if len(args) > 4 else False
    at, w = ledger.axes(x), ledger.axes(weight)
    positions = x if transposed else out
    ledger.add(positions.shape[0] * math.prod(positions.shape[2:]) * weight.numel(), [at[0], *at[2:], *w])
    return [at[0], w[1] if transposed else w[0], *at[2:]]


def _recurrent(ledger: Ledger, out: Tensor, x: Tensor, *args: Any, **_: Any) -> Axes:
    """Every matrix is used once per token; packed sequences have their tokens in one dimension."""
    tokens = math.prod(x.shape[:-1])
    lists = [
        each for each in args if isinstance(each, list | tuple) and any(isinstance(t, Tensor) for t in each)
    ]
    for weight in tree_leaves(lists or args[:2]):
        if isinstance(weight, Tensor) and weight.ndim == 2:
            ledger.add(tokens * weight.numel(), [*ledger.axes(x)[:-1], *ledger.axes(weight)])
    return [CONSTANT] * out.ndim


def _grouped(ledger: Ledger, out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> Axes:
    """Products of experts: each row meets one of the matrices, each column, or each slice of the inner dimension."""
    rows, columns = ledger.axes(a), ledger.axes(b)
    stacked = a.ndim == b.ndim == 3
    macs = (a.shape[0] if stacked else 1) * a.shape[-2] * a.shape[-1] * b.shape[-1]
    batch = [columns[0]] if stacked else []
    ledger.add(macs, [*batch, rows[-2], columns[-2] or rows[-1], columns[-1]])
    return [CONSTANT] * (out.ndim - 2) + [rows[-2], columns[-1]]


def _bilinear(ledger: Ledger, out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Axes:
    """xᵀ W y, as it is done for `F.bilinear`: every weight is used once per row."""
    rows = math.prod(x.shape) // max(1, weight.shape[-2])
    ledger.add(rows * weight.numel(), ledger.axes(weight)[-3:])
    return [CONSTANT] * out.ndim


def _deformable(ledger: Ledger, out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Axes:
    """A convolution at learned positions."""
    w = ledger.axes(weight)
    ledger.add(out.shape[0] * math.prod(out.shape[2:]) * weight.numel(), w)
    return [CONSTANT, w[0], *[CONSTANT] * (out.ndim - 2)]


def _embedding(ledger: Ledger, out: Tensor, weight: Tensor, ids: Tensor, *_: Any, **__: Any) -> Axes:
    return [*ledger.axes(ids), ledger.axes(weight)[-1]]


#: Operator → (ledger, result, arguments) → axes of the result. Those that this torch does not have do no harm.
RULES: dict[str, Callable[..., Axes]] = {
    **{name: _product(*how) for name, how in EINSTEIN.items()},
    **dict.fromkeys(_ATTENTION, attention),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_RECURRENT, _recurrent),
    **dict.fromkeys(_GROUPED, _grouped),
    "aten::_trilinear": _bilinear,
    "torchvision::deform_conv2d": _deformable,
    "aten::embedding": _embedding,
}
