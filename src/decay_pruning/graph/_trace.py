"""Tracing: torch-pruning's dependency graph of a model, with its index mappings mended, and a walk over it.

torch-pruning infers the sizes of the parts of a concatenation, split or flatten from the layers around them. Autograd
knows them exactly, and which part goes where, so these mappings are replaced by exact ones where autograd tells.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping

from decay_pruning import proof, surgery
from decay_pruning.errors import GraphError

log = logging.getLogger(__name__)

Indices = NDArray[np.int64]
#: (channel of one layer, channel of the root), parallel (n,) → the same pairs one operation further.
Mapping = Callable[[Indices, Indices], tuple[Indices, Indices]]

#: Node types that are layers, which have a width of their own. All others are operations between them.
TYPES_OF_LAYERS = frozenset(
    {
        *(ops.OPTYPE.CONV, ops.OPTYPE.DEPTHWISE_CONV, ops.OPTYPE.LINEAR, ops.OPTYPE.EMBED, ops.OPTYPE.MHA),
        *(ops.OPTYPE.BN, ops.OPTYPE.IN, ops.OPTYPE.LN, ops.OPTYPE.GN, ops.OPTYPE.PRELU, ops.OPTYPE.PARAMETER),
    }
)
#: Nodes whose width says nothing about the indices that come there, or that have a better reason of their own.
_LOOSE = (ops.OPTYPE.LSTM, ops.OPTYPE.CUSTOMIZED, ops.OPTYPE.OUTPUT, ops.OPTYPE.DEPTHWISE_CONV)
#: More often than this no sound walk comes to one side of one layer: a wide concatenation brings a span at a time.
_VISITS = 2000
_EVERYTHING = 1 << 62


class Untraceable(Exception):
    """Why a layer group cannot be described; becomes its reason in `unprunable`."""


# --------------------------------------------------------------------------------------------------- tracing


def trace(model: nn.Module, example_inputs: Any) -> Any:
    """torch-pruning's dependency graph; the model is left as it was.

    Raises:
        GraphError: the model does not run, or its output does not depend on its parameters.
    """

    def outputs(result: Any) -> list[Tensor]:
        # One more operation after every output: torch-pruning marks it as an output, whatever made it.
        given = list(surgery.leaves(result))
        found = [leaf * 1 for leaf in given if leaf.grad_fn is not None]
        if not found:
            raise GraphError(f"{_speechless(result, given)}, so its layers cannot be traced")
        return found

    graph = tp.DependencyGraph()
    with (
        surgery.untouched(model),
        _all_trainable(model),
        _own_eval_not_called(model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(
                model, example_inputs, forward_fn=surgery.call, output_transform=outputs, verbose=False
            )
        except GraphError:
            raise
        except Exception as error:
            if not getattr(graph, "module2node", None):
                raise GraphError(
                    f"the model cannot be traced with these example inputs: {type(error).__name__}: {error}"
                ) from error
            log.debug("torch-pruning could not infer all index mappings (%r); going on with our own", error)
        _mend(graph)
        _note_rooms(graph)
        for node in graph.module2node.values():
            node.grad_fn = None  # or it would hold all activations, and weights that surgery has replaced
            if node.type == ops.OPTYPE.SLICE:
                node.module.grad_fn = None
    return graph


def _speechless(result: Any, given: list[Tensor]) -> str:
    """Why no gradient comes out of a model, in words."""
    if not given:
        return f"the model returns no tensor (a {type(result).__name__})"
    if not any(leaf.is_floating_point() or leaf.is_complex() for leaf in given):
        return f"the model's output holds no floating tensor ({proof.WAY_OUT})"
    return (
        "no gradient leads from the model's output to its parameters "
        "(it does not depend on them, or there is a detach() or no_grad() between)"
    )


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Gradient recording on, for every parameter: tracing follows autograd, also through frozen layers."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for p in frozen:
                p.requires_grad_(True)
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)


@contextmanager
def _own_eval_not_called(model: nn.Module) -> Iterator[None]:
    """torch-pruning calls `model.eval()`, and a user's `train()` may do more than set flags (LoRA merges weights)."""
    own = model.__dict__.get("eval")
    model.__dict__["eval"] = lambda: model
    try:
        yield
    finally:
        del model.__dict__["eval"]
        if own is not None:
            model.__dict__["eval"] = own


def _note_rooms(graph: Any) -> None:
    """Give every node its `room` (in, out): the width of the place where an index stands there.

    Operations have no width of their own; an index there belongs to some layer, or to a dimension it was flattened to.
    """
    nodes = list(graph.module2node.values())
    for node in nodes:
        try:
            sides = graph.get_in_channels(node), graph.get_out_channels(node)
        except Exception:  # a layer that torch-pruning misreads; whoever walks there is refused
            sides = None, None
        node.room = tuple(None if n is None else int(n) for n in sides)
    widest = max((n for node in nodes for n in node.room if n is not None), default=0)
    for node in nodes:
        if None in node.room or node.type in _LOOSE:
            extents = [n for shape in _shapes_around(node.grad_fn) for n in shape]
            node.room = (4 * max([widest, *extents]),) * 2  # some way off still ends in a layer's own reason


def _shapes_around(function: Any) -> Iterator[list[int]]:
    """Shapes of what an autograd node makes and of what it reads."""
    pairs = [(function, 0), *getattr(function, "next_functions", ())]
    for each, output in pairs:
        if getattr(each, "_input_metadata", None):
            yield _shape(each, output)


# -------------------------------------------------------------------------------------------- index mappings


@dataclass(frozen=True)
class _Shift:
    """Keep the channels in [first, last), and count them from `to`: one part of a split or concatenation."""

    first: int
    last: int
    to: int = 0

    def __call__(self, index: Indices, root: Indices) -> tuple[Indices, Indices]:
        inside = (index >= self.first) & (index < self.last)
        return index[inside] - self.first + self.to, root[inside]


@dataclass(frozen=True)
class _Slice:
    """Channels first, first + step, … below last; and back."""

    first: int
    last: int
    step: int
    back: bool = False

    def __call__(self, index: Indices, root: Indices) -> tuple[Indices, Indices]:
        if self.back:
            return index * self.step + self.first, root
        inside = (index >= self.first) & (index < self.last) & ((index - self.first) % self.step == 0)
        return (index[inside] - self.first) // self.step, root[inside]


@dataclass(frozen=True)
class _Flatten:
    """Channel i of (B, C, …) → positions of (B, C·stride), or of (B, …, C) → (B, times·C); and back."""

    stride: int = 1  # neighbours that one channel becomes
    period: int = 0  # distance between the copies of one channel
    times: int = 1  # how many copies
    back: bool = False

    def __call__(self, index: Indices, root: Indices) -> tuple[Indices, Indices]:
        if self.back:
            return (index % self.period if self.period else index // self.stride), root
        step = np.arange(self.times) * self.period if self.period else np.arange(self.stride)
        start = index if self.period else index * self.stride
        return (start[:, None] + step).reshape(-1), np.repeat(root, step.size)


def _mend(graph: Any) -> None:
    """Replace the index mappings whose sizes autograd knows."""
    nodes = list(graph.module2node.values())
    for kind, mend in (
        (ops.OPTYPE.SLICE, _mend_slice),
        (ops.OPTYPE.RESHAPE, _mend_reshape),
        (ops.OPTYPE.SPLIT, _mend_split),
        (ops.OPTYPE.CONCAT, _mend_concat),
    ):
        for node in nodes:
            if node.type == kind and getattr(node.grad_fn, "_input_metadata", None):
                mend(graph, node)


def _shape(function: Any, output: int = 0) -> list[int]:
    """Shape of one output of an autograd node."""
    return [int(n) for n in function._input_metadata[output].shape]


def _width(graph: Any, node: Any, seen: set[int] | None = None) -> int | None:
    """Number of channels that come out of a node: the layer's own, or those of the layers before it."""
    own = graph.get_out_channels(node)
    if own is not None:
        return int(own)
    shape = _shape(node.grad_fn) if getattr(node.grad_fn, "_input_metadata", None) else []
    if len(shape) == 2:
        return shape[1]
    seen = {id(node)} if seen is None else seen
    for source in node.inputs:
        if id(source) in seen:
            continue
        seen.add(id(source))
        width = _width(graph, source, seen)
        if source.type == ops.OPTYPE.SPLIT and width is not None:
            part = next((k for f, k in node.grad_fn.next_functions if f is source.grad_fn), 0)
            sizes = _sizes(source.grad_fn)
            width = sizes[part] if sum(sizes) == width else width
        if width is not None and node.type == ops.OPTYPE.CONCAT:
            dim = _dim(node.grad_fn, len(shape))
            mine = next(
                (_shape(f, k)[dim] for f, k in node.grad_fn.next_functions if f is source.grad_fn), None
            )
            return shape[dim] if mine == width else width
        if width is not None:
            return width
    return None


def _sizes(split: Any) -> list[int]:
    """Sizes of the parts of a split along its dimension."""
    dim = _dim(split, len(_shape(split)))
    return [_shape(split, part)[dim] for part in range(len(split._input_metadata))]


def _dim(function: Any, ndim: int) -> int:
    """Dimension that a split or concatenation works on (saved as an unsigned number)."""
    return _signed(function._saved_dim) % ndim


def _signed(number: Any) -> int:
    """Autograd saves dimensions and the ends of slices as unsigned numbers, also the negative ones."""
    return (int(number) + (1 << 63)) % (1 << 64) - (1 << 63)


def _edges(source: Any, target: Any) -> list[Any]:
    return [dep for dep in source.dependencies if dep.target is target]


def _mend_slice(graph: Any, node: Any) -> None:
    """Ends that are counted from the end, along the channels only."""
    function = node.grad_fn
    sizes = [int(n) for n in getattr(function, "_saved_self_sym_sizes", ())]
    if not sizes or not node.inputs:
        return
    dim = _dim(function, len(sizes))
    along = _is_along(sizes, dim, _width(graph, node.inputs[0]))
    first, last, step = slice(
        _signed(function._saved_start), _signed(function._saved_end), int(function._saved_step)
    ).indices(sizes[dim])
    for neighbour in node.inputs:
        for back, deps in ((False, _edges(neighbour, node)), (True, _edges(node, neighbour))):
            for dep in deps:
                dep.index_mapping[0] = _Slice(first, last, step, back) if along else None


def _is_along(shape: list[int], dim: int, width: int | None) -> bool:
    """Whether a dimension holds the channels: the usual one where its size fits, else the first that does."""
    usual = 2 if len(shape) == 3 else min(1, len(shape) - 1)
    wide = [d for d, size in enumerate(shape) if size == width]
    return dim == usual if usual in wide or not wide else dim == wide[0]


def _mend_reshape(graph: Any, node: Any) -> None:
    """Flatten (B, C, …) or (B, …, C) to (B, N), and the way back."""
    function, _ = node.grad_fn.next_functions[0]
    if function is None or not node.inputs:
        return
    before, after = _shape(function), _shape(node.grad_fn)
    wide, flat = (before, after) if len(before) > len(after) else (after, before)
    if len(flat) != 2 or len(wide) < 3 or flat[0] != wide[0] or flat[1] != math.prod(wide[1:]):
        return
    width = _width(graph, node.inputs[0]) if wide is before else None
    if wide[1] == width or (width is None and len(wide) == 4):
        forward, backward = _Flatten(flat[1] // wide[1]), _Flatten(flat[1] // wide[1], back=True)
    elif wide[-1] == width:
        forward = _Flatten(period=wide[-1], times=flat[1] // wide[-1])
        backward = _Flatten(period=wide[-1], back=True)
    else:
        return
    if wide is before:
        pairs = [(node.inputs, forward, backward)]
        others = node.outputs
    else:
        pairs = [(node.outputs, forward, backward)]
        others = node.inputs
    for neighbours, towards, away in pairs:
        for neighbour in neighbours:
            for dep in _edges(neighbour, node):
                dep.index_mapping[0] = towards
            for dep in _edges(node, neighbour):
                dep.index_mapping[0] = away
    for neighbour in others:
        for dep in [*_edges(neighbour, node), *_edges(node, neighbour)]:
            if isinstance(dep.index_mapping[0], index_mapping._FlattenIndexMapping):
                dep.index_mapping[0] = None


def _mend_split(graph: Any, node: Any) -> None:
    """Give each consumer its own part."""
    function, _ = node.grad_fn.next_functions[0]
    if function is None:
        return
    sizes = _sizes(node.grad_fn)
    part = _shape(node.grad_fn)
    dim = _dim(node.grad_fn, len(part))
    if len(part) > 2:
        width = _width(graph, node.inputs[0])
        whole = [sum(sizes) if d == dim else size for d, size in enumerate(part)]
        if width != sum(sizes) or not _is_along(whole, dim, width):
            return  # along another dimension than the channels
    node.module.split_sizes = sizes
    first = np.cumsum([0, *sizes]).tolist()
    for consumer in dict.fromkeys(node.outputs):
        read = [part for source, part in consumer.grad_fn.next_functions if source is node.grad_fn]
        for part, dep in zip(read, _edges(node, consumer), strict=False):
            dep.index_mapping[0] = _Shift(first[part], first[part + 1])
        for part, dep in zip(read, _edges(consumer, node), strict=False):
            dep.index_mapping[0] = _Shift(0, sizes[part], first[part])


def _mend_concat(graph: Any, node: Any) -> None:
    """Give each input its own span, also beside inputs that depend on no parameter."""
    functions = node.grad_fn.next_functions
    whole = _shape(node.grad_fn)
    dim = _dim(node.grad_fn, len(whole))
    known = [None if f is None else _shape(f, part)[dim] for f, part in functions]
    if known.count(None) > 1:
        return
    rest = whole[dim] - sum(size for size in known if size is not None)
    sizes = [rest if size is None else size for size in known]
    first = np.cumsum([0, *sizes]).tolist()
    parameters = {id(p) for p, _ in graph.unwrapped_parameters}
    traced = [k for k, (f, _) in enumerate(functions) if f is not None and _is_traced(f, parameters)]
    if len(traced) != len(node.inputs):
        return
    if len(whole) > 2:
        for k, source in zip(traced, node.inputs, strict=True):
            width = None if source.type == ops.OPTYPE.SPLIT else _width(graph, source)
            part = [sizes[k] if d == dim else size for d, size in enumerate(whole)]
            if width is not None and (width != sizes[k] or not _is_along(part, dim, width)):
                return  # along another dimension than the channels
    for source in dict.fromkeys(node.inputs):
        spans = [k for k, each in zip(traced, node.inputs, strict=True) if each is source]
        for k, dep in zip(spans, _edges(source, node), strict=False):
            dep.index_mapping[1] = _Shift(0, sizes[k], first[k])
        for k, dep in zip(spans, _edges(node, source), strict=False):
            # Out of the concatenation first, then back through the split or flatten before it.
            dep.index_mapping[:] = [_Shift(first[k], first[k + 1]), dep.index_mapping[0]]


def _is_traced(function: Any, parameters: set[int]) -> bool:
    """Whether torch-pruning makes a node of an autograd node: all but leaves that are no bare parameters."""
    return not hasattr(function, "variable") or id(function.variable) in parameters


def _apply(mapping: Any, index: Indices, root: Indices) -> tuple[Indices, Indices]:
    """An index mapping on arrays: ours, or torch-pruning's, which take lists of pairs."""
    if isinstance(mapping, _Shift | _Slice | _Flatten):
        return mapping(index, root)
    if isinstance(mapping, index_mapping._FlattenIndexMapping):
        return _Flatten(int(mapping._stride), back=mapping.reverse)(index, root)
    if isinstance(mapping, index_mapping._ConcatIndexMapping | index_mapping._SplitIndexMapping):
        first, last = mapping.offset
        narrows = mapping.reverse == isinstance(mapping, index_mapping._ConcatIndexMapping)
        return _Shift(first, last)(index, root) if narrows else _Shift(0, _EVERYTHING, first)(index, root)
    if isinstance(mapping, index_mapping._SliceIndexMapping):
        ends = _signed(mapping.start), _signed(mapping.end), int(mapping.step)
        return _Slice(*ends, back=bool(mapping.reverse))(index, root)
    pairs = mapping([_HybridIndex(idx=int(i), root_idx=int(r)) for i, r in zip(index, root, strict=True)])
    return (
        np.array([pair.idx for pair in pairs], dtype=np.int64),
        np.array([-1 if pair.root_idx is None else pair.root_idx for pair in pairs], dtype=np.int64),
    )


# --------------------------------------------------------------------------------------------------- walking


@dataclass
class Item:
    """One side of one layer that a layer group touches.

    Attributes:
        dep: torch-pruning's dependency that led here first.
        index, root: parallel (n,): channel of this layer, channel of the root that it goes with.
        beyond: there are channels among them that this layer does not have.
    """

    dep: Any
    index: Indices
    root: Indices
    beyond: bool = False

    @property
    def node(self) -> Any:
        return self.dep.target

    @property
    def outward(self) -> bool:
        """The output side of a layer, or both sides where they are one (norms, depthwise convolutions)."""
        return _outward(self.dep)


def _outward(dep: Any) -> bool:
    return bool(dep.handler.__name__ == "prune_out_channels")


def _place(node: Any) -> str:
    """A node in words for the user."""
    name = str(node.name).split(" ")[0]
    kind = name.strip("_").partition("(")[0].rstrip("0123456789").strip("_")
    if node.type == ops.OPTYPE.OUTPUT:
        return "the model's output"
    return repr(name) if node.type in TYPES_OF_LAYERS else f"an operation ({kind})"


def walk(node: Any, handler: Any, width: int) -> list[Item]:
    """Everything coupled to the `width` output channels of a node, the root itself first.

    Raises:
        Untraceable: an index lies beyond the place where it stands, or the walk does not settle: an index mapping
            that is wrong runs round a cycle and finds new indices at every turn.
    """
    start = tp.dependency.Dependency(handler, handler, source=node, target=node)
    everything = np.arange(width, dtype=np.int64)
    found: dict[tuple[Any, Any], Item] = {}
    seen: dict[tuple[Any, Any], Indices] = {}
    visits: Counter[tuple[Any, Any]] = Counter()
    todo = [(start, everything, everything)]
    while todo:
        dep, index, root = todo.pop()
        key = (dep.target, dep.handler)
        visits[key] += 1
        beyond = bool(index.max() >= dep.target.room[int(_outward(dep))])
        lost = index.min() < 0 or root.min() < 0 or visits[key] > _VISITS
        if lost or (beyond and dep.target.type not in TYPES_OF_LAYERS):
            raise Untraceable(f"torch-pruning loses track of its channels at {_place(dep.target)}")
        code = np.unique(index * width + root)
        if key in seen:
            code = np.setdiff1d(code, seen[key], assume_unique=True)
        if not code.size:
            continue
        index, root = code // width, code % width
        if key in seen:
            seen[key] = np.union1d(seen[key], code)
            item = found[key]
            item.beyond |= beyond
            item.index, item.root = np.append(item.index, index), np.append(item.root, root)
        else:
            seen[key], found[key] = code, Item(dep, index, root, beyond)
        if beyond:
            continue  # the layer itself says so, and nothing that is true lies behind it
        for onward in dep.target.dependencies:
            if onward.is_triggered_by(dep.handler):
                i, r = index, root
                for mapping in onward.index_mapping:
                    if mapping is not None:
                        i, r = _apply(mapping, i, r)
                if i.size:
                    todo.append((onward, i, r))
    return list(found.values())
