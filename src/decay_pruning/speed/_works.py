"""Works: what a model spends its time on, in a form that can be timed alone and at other widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from decay_pruning.counting import EINSTEIN, RULES, VIEWS, Ledger, Makers, Product, count, joined, spelled
from decay_pruning.structures import Place

#: Pairs of names and plain values, all that is the same at every width.
How = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        kind: "convolution", "matmul", "attention", "products" (any, by their number) or "elements" (any operator that
            is no product, by the elements that it writes).
        sizes: what changes with the widths.
        how: the rest: strides, batch, dtype, layout.
    """

    kind: str
    sizes: tuple[int, ...]
    how: How

    @property
    def name(self) -> str:
        """One line that is the same for the same work."""
        rest = " ".join(f"{name}={value}" for name, value in self.how)
        return f"{self.kind} {'x'.join(map(str, self.sizes))} {rest}"

    def get(self, name: str) -> Any:
        """One of the things that stay the same."""
        return dict(self.how)[name]


@dataclass(frozen=True)
class Use:
    """A work of a model, what each of its sizes grows with, and how often it is done."""

    work: Work
    makers: tuple[Makers, ...]
    times: int = 1

    def sizes(self, kept: Mapping[Place, float]) -> tuple[float, ...]:
        """Its sizes when places keep only a fraction of theirs."""
        return tuple(
            max(1.0, size * math.prod(kept[p] ** power for p, power in makers.items() if p in kept))
            for size, makers in zip(self.work.sizes, self.makers, strict=True)
        )


def uses(model: nn.Module, example_inputs: Any) -> list[Use]:
    """Everything that a forward pass spends time on; equal works are put together.

    Raises:
        GraphError: the model does not run on these inputs.
    """
    found: dict[Any, Use] = {}
    products = 0  # of the ledger that have been looked at

    def see(ledger: Ledger, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        nonlocal products
        new, products = ledger.products[products:], len(ledger.products)
        for use in _of(ledger, new, name, args, kwargs, out):
            key = use.work, tuple(tuple(sorted(makers.items())) for makers in use.makers)
            found[key] = replace(use, times=found[key].times + 1) if key in found else use

    count(model, example_inputs, see)
    return list(found.values())


def _of(
    ledger: Ledger,
    products: Sequence[Product],
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Any,
) -> Iterable[Use]:
    if name in VIEWS:
        return
    if name in ("aten::convolution", "aten::_convolution", "aten::convolution_overrideable"):
        yield _convolution(ledger, *args, **kwargs)
    elif name in EINSTEIN:
        first, second, spec = EINSTEIN[name]
        yield _matmul(ledger, args[first], args[second], spec)
    elif name == "attention":
        yield _attention(ledger, *[*args, *kwargs.values()][:3])
    elif name in RULES and name != "aten::embedding":  # of several matrices: recurrent layers, experts
        for product in products:
            yield _any(product, args)
    else:
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.numel() and not _is_view(each, args):
                work = Work("elements", (each.numel(),), (_dtype(each),))
                yield Use(work, (joined(ledger.axes(each)),))


def _convolution(
    ledger: Ledger, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool = False, output_padding: Any = (), groups: int = 1, *_: Any, **__: Any,
) -> Use:  # fmt: skip
    """In and out channels of each group, and how many groups."""
    axes = [joined([axis]) for axis in ledger.axes(weight)]
    if transposed and groups > 1:
        return _any(ledger.products[-1], weight)
    wide = (joined([ledger.axes(x)[1]]), *axes[:2]) if groups > 1 else axes[:2]
    sizes = (x.shape[1], *weight.shape[:2]) if groups > 1 else tuple(weight.shape[:2])
    if groups > 1 and weight.shape[1] == 1 and not transposed:  # depthwise: one width
        sizes, wide = (weight.shape[0],), axes[:1]
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    how = {
        "kernel": tuple(weight.shape[2:]),
        "positions": (x.shape[0], *x.shape[2:]),
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "transposed": bool(transposed),
        "output_padding": tuple(output_padding),
        "grouped": "no" if groups == 1 else "depthwise" if len(sizes) == 1 else "yes",
        "per_group": weight.shape[0] // groups if len(sizes) == 1 else 0,
        "bias": bias is not None,
        "channels_last": bool(last),
    }
    return Use(Work("convolution", sizes, (*how.items(), _dtype(weight))), tuple(wide))


def _matmul(ledger: Ledger, a: Tensor, b: Tensor, spec: str) -> Use:
    """Every letter of Einstein's notation that grows with a width."""
    left, right, result = spelled(spec, a.ndim)
    extent: dict[str, int] = {}
    makers: dict[str, Makers] = {}
    for names, tensor in ((left, a), (right, b)):
        for letter, size, axis in zip(names, tensor.shape, ledger.axes(tensor), strict=True):
            extent[letter] = max(size, extent.get(letter, 1))
            makers[letter] = joined([axis]) or makers.get(letter, {})
    wide = [letter for letter in extent if makers[letter]]
    how = {
        "product": f"{left},{right}->{result}",
        "wide": "".join(wide),
        "rest": tuple((letter, size) for letter, size in extent.items() if letter not in wide),
        "turned": tuple(t.ndim > 1 and t.stride(-1) != 1 and t.stride(-2) == 1 for t in (a, b)),
    }
    work = Work("matmul", tuple(extent[letter] for letter in wide), (*how.items(), _dtype(a)))
    return Use(work, tuple(makers[letter] for letter in wide))


def _attention(ledger: Ledger, query: Tensor, key: Tensor, value: Tensor) -> Use:
    """Heads and their width."""
    axes = ledger.axes(query)
    heads = query.shape[-3] if query.ndim > 3 else 1
    makers = (joined([axes[-3]]) if query.ndim > 3 else {}, joined([axes[-1]]))
    how = {
        "batch": math.prod(query.shape[:-3]) if query.ndim > 3 else math.prod(query.shape[:-2]),
        "queries": query.shape[-2],
        "keys": key.shape[-2],
    }
    return Use(Work("attention", (heads, query.shape[-1]), (*how.items(), _dtype(query))), makers)


def _any(product: Product, args: Any) -> Use:
    """A product by its number of multiply-accumulates."""
    return Use(Work("products", (max(1, product.macs),), (_dtype(args),)), (product.makers,))


def _dtype(values: Any) -> tuple[str, str]:
    tensor = next(t for t in tree_leaves(values) if isinstance(t, Tensor))
    return "dtype", str(tensor.dtype).removeprefix("torch.")


def _is_view(out: Tensor, args: Sequence[Any]) -> bool:
    """Whether nothing was written: another look at the memory of an argument."""
    tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    if any(t is out for t in tensors):
        return False
    return storage(out) in map(storage, tensors)


def storage(tensor: Tensor) -> int:
    """What is the same for tensors that share their memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # it has none: sparse
        return id(tensor)


# -- doing them ------------------------------------------------------------------------------------------------


def doing(work: Work, device: torch.device) -> Callable[[], Any]:
    """A call that does this work on tensors of its own."""
    dtype = getattr(torch, work.get("dtype"))

    def made(*shape: int) -> Tensor:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.rand(shape, device=device, dtype=torch.float32).to(dtype)
        return torch.ones(shape, device=device, dtype=dtype)

    return _DOING[work.kind](work, made)


Made = Callable[..., Tensor]


def _convolve(work: Work, made: Made) -> Callable[[], Any]:
    first, *rest = work.sizes
    batch, *space = work.get("positions")
    turned = work.get("transposed")
    if work.get("grouped") == "depthwise":
        channels = max(1, round(first / work.get("per_group")))
        groups, weight = channels, (channels * work.get("per_group"), 1)
    elif work.get("grouped") == "yes":
        groups = max(1, round(first / rest[1]))
        weight, channels = (groups * max(1, rest[0] // groups), rest[1]), groups * rest[1]
    else:
        groups, weight = 1, (first, rest[0])
        channels = first if turned else rest[0]
    x, w = made(batch, channels, *space), made(*weight, *work.get("kernel"))
    if work.get("channels_last"):
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    b = made(weight[1] * groups if turned else weight[0]) if work.get("bias") else None
    stride, padding, dilation, more = (
        list(work.get(name)) for name in ("stride", "padding", "dilation", "output_padding")
    )
    return lambda: torch.convolution(x, w, b, stride, padding, dilation, turned, more, groups)


def _multiply(work: Work, made: Made) -> Callable[[], Any]:
    size = dict(zip(work.get("wide"), work.sizes, strict=True)) | dict(work.get("rest"))
    left, right = work.get("product").partition("->")[0].split(",")
    a, b = (
        made(*[size[x] for x in names[:-2]], size[names[-1]], size[names[-2]]).mT
        if turned
        else made(*[size[x] for x in names])
        for names, turned in zip((left, right), work.get("turned"), strict=True)
    )
    if right == "nk":
        return lambda: F.linear(a, b)
    if work.get("product") in ("mk,kn->mn", "bmk,bkn->bmn"):
        return lambda: a @ b
    return lambda: torch.einsum(work.get("product"), a, b)


def _attend(work: Work, made: Made) -> Callable[[], Any]:
    heads, width = work.sizes
    q = made(work.get("batch"), heads, work.get("queries"), width)
    k, v = (made(work.get("batch"), heads, work.get("keys"), width) for _ in range(2))
    return lambda: F.scaled_dot_product_attention(q, k, v)


def _any_product(work: Work, made: Made) -> Callable[[], Any]:
    a, b = made(max(1, work.sizes[0] // 2**14), 128), made(128, 128)
    return lambda: a @ b


def _elements(work: Work, made: Made) -> Callable[[], Any]:
    x = made(work.sizes[0])
    return lambda: x + x


_DOING: Mapping[str, Callable[[Work, Made], Callable[[], Any]]] = {
    "convolution": _convolve,
    "matmul": _multiply,
    "attention": _attend,
    "products": _any_product,
    "elements": _elements,
}
