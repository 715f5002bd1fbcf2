"""Graph: a model and example inputs → its `StructureSet`. The only room that imports torch-pruning's graph.

torch-pruning traces which layers share a width. From its graph we derive what it has no API for: which positions
of which tensor belong to which structure. One rule decides what a structure is: *channels that share a position
of any tensor or attribute must go together*. A flattened channel, a residual stream, a fused qkv, the equal parts
of a grouped convolution and the channels of one GroupNorm group are all cases of it.

Nothing is believed: every layer group is tried on the model itself, with random values in its weights, before it
is offered. What fails is listed as unprunable with the reason.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch_pruning import ops
from torch_pruning._helpers import GroupItem, _HybridIndex
from torch_pruning.dependency import index_mapping

from decay_pruning import surgery
from decay_pruning.errors import ConfigError, GraphError, SurgeryError
from decay_pruning.structures import NOT_PARAMETERS, Coupling, LayerGroup, Place, Role, StructureSet

log = logging.getLogger(__name__)

Importance = Callable[[Any], Tensor | None]
Indices = NDArray[np.int64]

_ROOTS = (ops.TORCH_CONV, ops.TORCH_LINEAR, ops.TORCH_EMBED, ops.TORCH_MHA)
#: Beyond this a traced index can only come from an index mapping that runs away.
_LIMIT = 1 << 24


class _Untraceable(Exception):
    """Why a layer group cannot be described; becomes its reason in `unprunable`."""


# ------------------------------------------------------------------------------------------- walking the graph


@dataclass
class _Item:
    """One layer (and side of it) that a layer group touches.

    Attributes:
        dep: torch-pruning's dependency that led here first.
        index, root: parallel (n,): channel of this layer, channel of the root that it goes with.
    """

    dep: Any
    index: Indices
    root: Indices


def _walk(node: Any, handler: Any, width: int) -> list[_Item]:
    """Everything coupled to the `width` output channels of a node, the root itself first.

    Raises:
        _Untraceable: an index mapping leaves the range of sensible indices.
    """
    start = tp.dependency.Dependency(handler, handler, source=node, target=node)
    everything = np.arange(width, dtype=np.int64)
    found: dict[tuple[Any, Any], _Item] = {}
    seen: dict[tuple[Any, Any], Indices] = {}
    todo = [(start, everything, everything)]
    while todo:
        dep, index, root = todo.pop()
        if index.size and (index.min() < 0 or index.max() >= _LIMIT or root.min() < 0):
            raise _Untraceable(f"torch-pruning loses track of its channels at {_describe(dep.target)}")
        key = (dep.target, dep.handler)
        code = np.unique(index * width + root)
        before = seen.get(key)
        if before is not None:
            code = np.setdiff1d(code, before, assume_unique=True)
        if not code.size:
            continue
        index, root = code // width, code % width
        if before is None:
            seen[key], found[key] = code, _Item(dep, index, root)
        else:
            seen[key] = np.union1d(before, code)
            item = found[key]
            item.index, item.root = np.append(item.index, index), np.append(item.root, root)
        for onward in dep.target.dependencies:
            if onward.is_triggered_by(dep.handler):
                i, r = index, root
                for mapping in onward.index_mapping:
                    if mapping is not None:
                        i, r = _map(mapping, i, r)
                if i.size:
                    todo.append((onward, i, r))
    return list(found.values())


def _map(mapping: Any, index: Indices, root: Indices) -> tuple[Indices, Indices]:
    """torch-pruning's index mappings on arrays instead of lists of pairs."""
    if isinstance(mapping, index_mapping._FlattenIndexMapping):
        stride = int(mapping._stride)
        if mapping.reverse:
            return index // stride, root
        spread = (index[:, None] * stride + np.arange(stride)).reshape(-1)
        return spread, np.repeat(root, stride)
    if isinstance(mapping, index_mapping._ConcatIndexMapping | index_mapping._SplitIndexMapping):
        first, last = mapping.offset
        if mapping.reverse == isinstance(mapping, index_mapping._ConcatIndexMapping):
            inside = (index >= first) & (index < last)
            return index[inside] - first, root[inside]
        return index + first, root
    if isinstance(mapping, index_mapping._SliceIndexMapping):
        first, last, step = int(mapping.start), int(mapping.end), int(mapping.step)
        if mapping.reverse:
            return index * step + first, root
        inside = (index >= first) & (index < last) & ((index - first) % step == 0)
        return (index[inside] - first) // step, root[inside]
    pairs = mapping([_HybridIndex(idx=int(i), root_idx=int(r)) for i, r in zip(index, root, strict=True)])
    return (
        np.array([pair.idx for pair in pairs], dtype=np.int64),
        np.array([-1 if pair.root_idx is None else pair.root_idx for pair in pairs], dtype=np.int64),
    )


def _describe(node: Any) -> str:
    return repr(node.name.split(" ")[0])


# ------------------------------------------------------------------------------------ layers → tensor slices


@dataclass
class _Slice:
    """Where the channels `index` of one layer lie: position of `tensor` along `dim`. `root` runs parallel."""

    tensor: str
    dim: int
    role: Role | None  # None: a tie only, nothing is cut here
    position: Indices
    root: Indices


@dataclass
class _Layer:
    """Collects the slices of one layer, skipping tensors that it does not have."""

    name: str
    module: Any
    root: Indices
    parameters: Mapping[int, str]
    slices: list[_Slice] = field(default_factory=list)

    def tensor(self, leaf: str, dim: int, role: Role, position: Indices, root: Indices | None = None) -> None:
        value = self.module
        for part in leaf.split("."):
            value = getattr(value, part, None)
        if value is None:
            return
        name = self.path(leaf)
        if role is not Role.BUFFER:
            if id(value) not in self.parameters:
                raise _Untraceable(
                    f"{name!r} is computed from other tensors (weight norm, a parametrization or a mask); "
                    "make it a plain parameter first"
                )
            name = self.parameters[id(value)]
        self.slices.append(_Slice(name, dim % value.ndim, role, position, self.root if root is None else root))

    def attribute(self, leaf: str, position: Indices, dim: int = 0) -> None:
        self.slices.append(_Slice(self.path(leaf), dim, Role.ATTRIBUTE, position, self.root))

    def tie(self, leaf: str, position: Indices) -> None:
        self.slices.append(_Slice(self.path(leaf), 0, None, position, self.root))

    def path(self, leaf: str) -> str:
        return f"{self.name}.{leaf}" if self.name else leaf


def _conv(layer: _Layer, i: Indices, out: bool) -> None:
    m = layer.module
    rows = int(m.transposed)
    if out:
        per_group = m.out_channels // m.groups
        layer.tensor("weight", rows, Role.ROW, i % per_group if m.transposed else i)
        layer.tensor("bias", 0, Role.BIAS, i)
        layer.attribute("out_channels", i)
    else:
        per_group = m.in_channels // m.groups
        layer.tensor("weight", 1 - rows, Role.COLUMN, i if m.transposed else i % per_group)
        layer.attribute("in_channels", i)
    if m.groups > 1:
        layer.tie("(out groups)" if out else "(in groups)", i % per_group)


def _depthwise(layer: _Layer, i: Indices, out: bool) -> None:
    m = layer.module
    if m.in_channels != m.groups:
        raise _Untraceable(
            f"grouped convolution {layer.name!r} with {m.in_channels} inputs in {m.groups} groups of one output each "
            "is not supported"
        )
    layer.tensor("weight", 0, Role.ROW, i)
    layer.tensor("bias", 0, Role.BIAS, i)
    for leaf in ("in_channels", "out_channels", "groups"):
        layer.attribute(leaf, i)


def _linear(layer: _Layer, i: Indices, out: bool) -> None:
    if out:
        layer.tensor("weight", 0, Role.ROW, i)
        layer.tensor("bias", 0, Role.BIAS, i)
        layer.attribute("out_features", i)
    else:
        layer.tensor("weight", 1, Role.COLUMN, i)
        layer.attribute("in_features", i)


def _batch_norm(layer: _Layer, i: Indices, out: bool) -> None:
    layer.tensor("weight", 0, Role.SCALE, i)
    layer.tensor("bias", 0, Role.SHIFT, i)
    layer.tensor("running_mean", 0, Role.BUFFER, i)
    layer.tensor("running_var", 0, Role.BUFFER, i)
    layer.attribute("num_features", i)


def _layer_norm(layer: _Layer, i: Indices, out: bool) -> None:
    if len(layer.module.normalized_shape) != 1:
        raise _Untraceable(f"LayerNorm {layer.name!r} normalises over several dimensions at once")
    layer.tensor("weight", 0, Role.SCALE, i)
    layer.tensor("bias", 0, Role.SHIFT, i)
    layer.attribute("normalized_shape", i)


def _group_norm(layer: _Layer, i: Indices, out: bool) -> None:
    m = layer.module
    layer.tensor("weight", 0, Role.SCALE, i)
    layer.tensor("bias", 0, Role.SHIFT, i)
    layer.attribute("num_channels", i)
    layer.attribute("num_groups", i // (m.num_channels // m.num_groups))


def _prelu(layer: _Layer, i: Indices, out: bool) -> None:
    if layer.module.num_parameters > 1:
        layer.tensor("weight", 0, Role.OTHER, i)
        layer.attribute("num_parameters", i)


def _embedding(layer: _Layer, i: Indices, out: bool) -> None:
    layer.tensor("weight", 1, Role.ROW, i)
    layer.attribute("embedding_dim", i)


def _attention(layer: _Layer, i: Indices, out: bool) -> None:
    m = layer.module
    if not m._qkv_same_embed_dim:
        raise _Untraceable(f"attention {layer.name!r} has keys or values of another width than its queries")
    width, root = m.embed_dim, layer.root
    three, roots = np.concatenate([i, i + width, i + 2 * width]), np.tile(root, 3)
    layer.attribute("embed_dim", i)
    layer.tensor("in_proj_weight", 0, Role.ROW, three, roots)
    layer.tensor("in_proj_weight", 1, Role.COLUMN, i)
    layer.tensor("in_proj_bias", 0, Role.BIAS, three, roots)
    layer.tensor("bias_k", 2, Role.OTHER, i)
    layer.tensor("bias_v", 2, Role.OTHER, i)
    layer.tensor("out_proj.weight", 0, Role.ROW, i)
    layer.tensor("out_proj.weight", 1, Role.COLUMN, i)
    layer.tensor("out_proj.bias", 0, Role.BIAS, i)
    for leaf in ("kdim", "vdim", "out_proj.in_features", "out_proj.out_features"):
        layer.attribute(leaf, i)
    layer.attribute("head_dim", i % m.head_dim)


_TABLE: dict[Any, Callable[[_Layer, Indices, bool], None]] = {
    ops.OPTYPE.CONV: _conv,
    ops.OPTYPE.DEPTHWISE_CONV: _depthwise,
    ops.OPTYPE.LINEAR: _linear,
    ops.OPTYPE.BN: _batch_norm,
    ops.OPTYPE.IN: _batch_norm,
    ops.OPTYPE.LN: _layer_norm,
    ops.OPTYPE.GN: _group_norm,
    ops.OPTYPE.PRELU: _prelu,
    ops.OPTYPE.EMBED: _embedding,
    ops.OPTYPE.MHA: _attention,
}

#: Layers that mix their whole width, so that taking one channel away changes the others by their nature.
_MIXES: dict[Any, str] = {
    ops.OPTYPE.LN: "LayerNorm {!r} normalises over this width",
    ops.OPTYPE.MHA: "attention {!r} scales its scores by the head width",
}


# --------------------------------------------------------------------------------------------------- the graph


@dataclass
class _Traced:
    """One width as torch-pruning sees it: the channels of a root layer and all that goes with them."""

    name: str
    width: int
    items: list[_Item]
    slices: list[_Slice] = field(default_factory=list)
    inexact: str | None = None
    refused: str | None = None


class Graph:
    """The structures of a model, traced once and tried out.

    Attributes:
        structures: layer groups as traced and verified, in the order of the model, and what is unprunable.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        ignored: Sequence[str | nn.Module | type] = (),
        heads: Mapping[str, int] = {},
        allow_inexact: bool = False,
        verify: bool = True,
    ) -> None:
        """Trace the model.

        The model is left as it was: training flags, buffers, gradients, `requires_grad`, random number generators.

        Args:
            model: any module that runs on the example inputs; on any device.
            example_inputs: a tensor (`model(x)`), a tuple or list (`model(*x)`) or a mapping (`model(**x)`).
            ignored: layers whose width stays: module names, modules (each with all inside), or types.
            heads: name of a layer whose outputs are attention heads → number of heads; the same offset in every
                head is then one structure.
            allow_inexact: offer layer groups whose removal changes the function by its nature (LayerNorm over a
                residual width, attention scores scaled by the head width).
            verify: try every layer group on the model before it is offered.

        Raises:
            GraphError: the model cannot be traced, or nothing in it can be pruned (with all reasons).
            ConfigError: an unknown name in `ignored` or `heads`.
        """
        self._model = model
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if is_lazy(tensor):
                raise GraphError(f"{name!r} is not initialised yet; run the model once before building the pruner")
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._modules = {module: name for name, module in model.named_modules()}
        skip = _resolve_ignored(model, ignored)
        dependencies = _trace(model, example_inputs)
        self._traced = self._enumerate(dependencies, skip)
        self._missing = self._unreached(dependencies)
        label, sizes = self._tie(heads)
        structures = self._assemble(label, sizes, allow_inexact or not verify)
        if verify:
            structures = _verified(model, structures, example_inputs, allow_inexact)
        if not allow_inexact:
            structures = _demote(structures)
        if not structures.groups:
            reasons = "\n".join(f"  {name}: {why}" for name, why in structures.unprunable.items())
            raise GraphError(f"nothing in this model can be pruned:\n{reasons or '  it has no prunable layer'}")
        self.structures = structures

    # ------------------------------------------------------------------------------------------- enumeration

    def _enumerate(self, dependencies: Any, skip: set[int]) -> list[_Traced]:
        """One `_Traced` per root layer that no earlier one covers, in the order of the model."""
        traced: list[_Traced] = []
        covered: dict[Any, set[int]] = {}
        for module, name in self._modules.items():
            node = dependencies.module2node.get(module)
            if node is None or not isinstance(module, _ROOTS):
                continue
            pruner = dependencies.get_pruner_of_module(module)
            width = int(pruner.get_out_channels(module))
            if len(covered.get(node, ())) == width:
                continue
            group = _Traced(name, width, [])
            traced.append(group)
            try:
                group.items = _walk(node, pruner.prune_out_channels, width)
            except _Untraceable as error:
                group.refused = str(error)
                continue
            for item in group.items:
                if _outward(item):
                    covered.setdefault(item.dep.target, set()).update(item.index.tolist())
            group.refused = self._refusal(group, skip)
            try:
                for item in group.items:
                    group.slices += self._slices(item)
                    why = _MIXES.get(item.dep.target.type)
                    group.inexact = group.inexact or (why and why.format(self._modules[item.dep.target.module]))
            except _Untraceable as error:
                group.refused = group.refused or str(error)
        return traced

    def _refusal(self, group: _Traced, skip: set[int]) -> str | None:
        """Why a layer group is not to be pruned, seen from the layers in it."""
        for item in group.items:
            node = item.dep.target
            if id(node.module) in skip and _outward(item):
                return "ignored, as asked"
        for item in group.items:
            node = item.dep.target
            if node.type == ops.OPTYPE.OUTPUT:
                return "feeds the model's output"
            if node.type in (ops.OPTYPE.LSTM, ops.OPTYPE.CUSTOMIZED):
                return f"is coupled to {self._modules[node.module]!r}, a layer type that is not supported"
        parameters = [
            p
            for item in group.items
            if isinstance(item.dep.target.module, nn.Module) and not _is_op(item.dep.target)
            for p in item.dep.target.module.parameters(recurse=False)
        ]
        if parameters and not any(p.requires_grad for p in parameters):
            return "all its parameters are frozen"
        return None

    def _slices(self, item: _Item) -> list[_Slice]:
        """Places of one layer's channels.

        Raises:
            _Untraceable: the layer cannot be cut, or the channels lie outside of it.
        """
        node = item.dep.target
        if node.type == ops.OPTYPE.PARAMETER:
            layer = self._bare(node, item)
        elif node.type in _TABLE:
            layer = _Layer(self._modules[node.module], node.module, item.root, self._names)
            _TABLE[node.type](layer, item.index, _outward(item))
        else:
            return []
        for each in layer.slices:
            if each.role is None or not each.position.size:
                continue
            size = surgery.size_of(self._model, (each.tensor, each.dim))
            if each.position.max() >= size:
                raise _Untraceable(
                    f"torch-pruning finds {int(each.position.max()) + 1} channels at {each.tensor!r}, which has {size}"
                )
        return layer.slices

    def _bare(self, node: Any, item: _Item) -> _Layer:
        """A parameter that belongs to no layer type known to torch-pruning."""
        parameter = node.module
        name = self._names[id(parameter)]
        owner, leaf = surgery.parent(self._model, name)
        layer = _Layer(name.rpartition(".")[0], owner, item.root, self._names)
        shape = getattr(owner, "normalized_shape", None)
        norm = isinstance(shape, tuple) and len(shape) == 1 and parameter.ndim == 1
        layer.tensor(leaf, node.pruning_dim, Role.SCALE if norm else Role.OTHER, item.index)
        if norm:
            layer.attribute("normalized_shape", item.index)
        return layer

    def _unreached(self, dependencies: Any) -> dict[str, str]:
        """Layers that the example inputs do not lead through."""
        return {
            name: "is not reached from the example inputs"
            for module, name in self._modules.items()
            if isinstance(module, _ROOTS)
            and module not in dependencies.module2node
            and not any(isinstance(owner, ops.TORCH_MHA) for owner in self._owners(name))
        }

    def _owners(self, name: str) -> Iterator[nn.Module]:
        while name:
            name = name.rpartition(".")[0]
            yield self._model.get_submodule(name)

    # ------------------------------------------------------------------------------- channels → structures

    def _tie(self, heads: Mapping[str, int]) -> tuple[Indices, dict[Place, int]]:
        """Label (smallest member) of the structure of every channel of every root, and the size of every place."""
        start = np.cumsum([0, *(group.width for group in self._traced)])
        places: dict[Place, list[tuple[Indices, Indices]]] = {}
        sizes: dict[Place, int] = {}
        for first, group in zip(start, self._traced, strict=False):
            for each in group.slices:
                place = each.tensor, each.dim
                places.setdefault(place, []).append((each.position, each.root + first))
                if each.role is not None and place not in sizes:
                    sizes[place] = surgery.size_of(self._model, place)
        offset, position, key = 0, [], []
        for pairs in places.values():
            extent = 0
            for p, k in pairs:
                position.append(p + offset)
                key.append(k)
                extent = max(extent, int(p.max(initial=-1)) + 1)
            offset += extent
        label = np.arange(start[-1], dtype=np.int64)
        if key:
            label = _components(label, np.concatenate(key), np.concatenate(position))
        for name, count in heads.items():
            label = self._tie_heads(label, start, name, count)
        return label, sizes

    def _tie_heads(self, label: Indices, start: Indices, name: str, count: int) -> Indices:
        """Join the same offset of every head of one layer."""
        for first, group in zip(start, self._traced, strict=False):
            for item in group.items:
                if self._modules.get(item.dep.target.module) != name or not _outward(item):
                    continue
                key = item.root[np.argsort(item.index, kind="stable")] + first
                found, rank = np.unique(label[key], return_inverse=True)
                if count < 1 or found.size % count:
                    raise ConfigError(f"heads[{name!r}] = {count} does not divide its {found.size} structures")
                return _components(label, key, rank % (found.size // count))
        raise ConfigError(f"heads: no prunable layer {name!r}{_nearest(name, self._modules.values())}")

    def _assemble(self, label: Indices, sizes: dict[Place, int], keep_inexact: bool) -> StructureSet:
        """Layer groups from labelled channels. Groups that share a structure become one."""
        start = np.cumsum([0, *(group.width for group in self._traced)])
        of_key = np.repeat(np.arange(len(self._traced)), [group.width for group in self._traced])
        joined = _components(np.arange(len(self._traced)), of_key, label) if label.size else of_key
        self._members: dict[str, list[tuple[_Traced, Indices]]] = {}
        groups: dict[str, LayerGroup] = {}
        unprunable: dict[str, str] = {}
        for g, head in enumerate(self._traced):
            if joined[g] != g:
                continue
            members = [m for m in range(len(self._traced)) if joined[m] == g]
            keys = np.concatenate([np.arange(start[m], start[m + 1]) for m in members])
            ids, row = np.unique(label[keys], return_inverse=True)
            rows = np.full(label.size, -1, dtype=np.int64)
            rows[keys] = row
            traced = [(self._traced[m], rows[start[m] : start[m + 1]]) for m in members]
            refused = next((each.refused for each, _ in traced if each.refused), None)
            if refused is None and ids.size < 2:
                refused = "has a single structure, and a layer never loses its last one"
            if refused is not None:
                unprunable[head.name] = refused
                continue
            self._members[head.name] = traced
            groups[head.name] = LayerGroup(
                name=head.name,
                ids=torch.arange(ids.size),
                couplings=_couplings(traced),
                inexact=next((each.inexact for each, _ in traced if each.inexact), None),
            )
        touched = {c.place for group in groups.values() for c in group.couplings}
        sizes = {place: size for place, size in sizes.items() if place in touched}
        return StructureSet(groups, sizes, {**unprunable, **self._missing})

    # ---------------------------------------------------------------------------------------------- scores

    def scores(self, importance: Importance, structures: StructureSet) -> dict[str, Tensor]:
        """Let one of torch-pruning's importances (or any callable on its groups) score all structures.

        Args:
            importance: torch-pruning group → 1-d tensor with one value per channel of the group's root, or None.
            structures: the structures that are there now (after any removals by `surgery`).

        Returns:
            layer group → shape (S,): the mean over the channels of each structure, in the order of `ids`. Layer groups
            that the importance has nothing to say about (it returns None) are left out, with a warning in the log.

        Raises:
            GraphError: the importance fails or returns another number of values.
        """
        found = {}
        for name, groups in self._current(structures).items():
            total = torch.zeros(len(structures.groups[name]))
            count = torch.zeros_like(total)
            for group, owner in groups:
                try:
                    value = importance(group)
                except Exception as error:
                    raise GraphError(
                        f"{type(importance).__name__} cannot score layer group {name!r}: {type(error).__name__}: {error}"
                    ) from error
                if value is None:
                    break
                if value.shape != owner.shape:
                    raise GraphError(
                        f"{type(importance).__name__} returned {tuple(value.shape)} values for layer group {name!r}, "
                        f"which has {owner.numel()} channels"
                    )
                total.index_add_(0, owner, value.detach().to("cpu", total.dtype))
                count.index_add_(0, owner, torch.ones(owner.numel()))
            else:
                found[name] = total / count
                continue
            log.warning("%s gives no score to layer group %r: it is never picked", type(importance).__name__, name)
        return found

    def _current(self, structures: StructureSet) -> dict[str, list[tuple[Any, Tensor]]]:
        """torch-pruning groups of the model as it is now, each with the structure (row) of every root channel."""
        where = _moved(self.structures, structures)
        current: dict[str, list[tuple[Any, Tensor]]] = {}
        for name, layer_group in structures.groups.items():
            row = np.full(len(self.structures.groups[name]), -1, dtype=np.int64)
            row[layer_group.ids.numpy()] = np.arange(len(layer_group))
            current[name] = []
            for traced, owner in self._members[name]:
                alive = row[owner] >= 0
                renumbered = np.cumsum(alive) - 1
                group = tp.dependency.Group()
                for item in traced.items:
                    axis = self._axis(item)
                    if axis is None:
                        continue
                    stays = alive[item.root]
                    index, first = np.unique(item.index[stays], return_index=True)
                    order = np.argsort(first, kind="stable")
                    moved = where.get(axis)
                    index = index[order] if moved is None else moved[index[order]]
                    entry = GroupItem(dep=item.dep, idxs=index.tolist())
                    entry.root_idxs = renumbered[item.root[stays][first[order]]].tolist()
                    group._group.append(entry)
                current[name].append((group, torch.from_numpy(row[owner[alive]])))
        return current

    def _axis(self, item: _Item) -> Place | None:
        """The place whose positions are the channels of this layer, or None for an operation without tensors."""
        node, out = item.dep.target, _outward(item)
        if node.type == ops.OPTYPE.PARAMETER:
            return self._names[id(node.module)], node.pruning_dim % node.module.ndim
        leaf = {
            ops.OPTYPE.CONV: "out_channels" if out else "in_channels",
            ops.OPTYPE.DEPTHWISE_CONV: "out_channels",
            ops.OPTYPE.LINEAR: "out_features" if out else "in_features",
            ops.OPTYPE.BN: "num_features",
            ops.OPTYPE.IN: "num_features",
            ops.OPTYPE.LN: "normalized_shape",
            ops.OPTYPE.GN: "num_channels",
            ops.OPTYPE.PRELU: "num_parameters",
            ops.OPTYPE.EMBED: "embedding_dim",
            ops.OPTYPE.MHA: "embed_dim",
        }.get(node.type)
        if leaf is None:
            return None
        name = self._modules[node.module]
        return (f"{name}.{leaf}" if name else leaf), 0


def _outward(item: _Item) -> bool:
    return bool(item.dep.handler.__name__ == "prune_out_channels")


def _is_op(node: Any) -> bool:
    return node.type not in _TABLE and node.type not in (ops.OPTYPE.PARAMETER, ops.OPTYPE.LSTM)


def _components(label: Indices, key: Indices, position: Indices) -> Indices:
    """Smallest member of each component, when keys that share a position belong together."""
    _, position = np.unique(position, return_inverse=True)
    lowest = np.empty(int(position.max(initial=-1)) + 1, dtype=np.int64)
    while True:
        lowest.fill(label.size)
        np.minimum.at(lowest, position, label[key])
        new = label.copy()
        np.minimum.at(new, key, lowest[position])
        np.minimum.at(new, label[key], lowest[position])
        new = new[new]
        if np.array_equal(new, label):
            return label
        label = new


def _couplings(traced: Iterable[tuple[_Traced, Indices]]) -> tuple[Coupling, ...]:
    """One coupling per place, each (structure, position) once."""
    found: dict[Place, tuple[Role, list[Indices], list[Indices]]] = {}
    for group, owner in traced:
        for each in group.slices:
            if each.role is not None and each.position.size:
                _, owners, positions = found.setdefault((each.tensor, each.dim), (each.role, [], []))
                owners.append(owner[each.root])
                positions.append(each.position)
    couplings = []
    for (tensor, dim), (role, owners, positions) in found.items():
        position, first = np.unique(np.concatenate(positions), return_index=True)
        couplings.append(
            Coupling(tensor, dim, role, torch.from_numpy(np.concatenate(owners)[first]), torch.from_numpy(position))
        )
    return tuple(couplings)


def _moved(then: StructureSet, now: StructureSet) -> dict[Place, Indices]:
    """Place → original position → current position, for every place that a coupling touches."""
    found: dict[Place, Indices] = {}
    for name, group in now.groups.items():
        before = then.groups[name]
        stays = torch.isin(before.ids, group.ids)
        for old, new in zip(before.couplings, group.couplings, strict=True):
            table = found.setdefault(old.place, np.full(then.sizes[old.place], -1, dtype=np.int64))
            table[old.position[stays[old.owner]].numpy()] = new.position.numpy()
    return found


# -------------------------------------------------------------------------------------------------- tracing


def _trace(model: nn.Module, example_inputs: Any) -> Any:
    """torch-pruning's dependency graph; the model is left as it was.

    Raises:
        GraphError: the model does not run, or its output does not depend on its parameters.
    """

    def outputs(result: Any) -> list[Tensor]:
        # One more operation after every output: torch-pruning marks it as an output, whatever made it.
        found = [leaf * 1 for leaf in surgery.leaves(result) if leaf.grad_fn is not None]
        if not found:
            raise GraphError("no output of the model depends on its parameters, so its layers cannot be traced")
        return found

    graph = tp.DependencyGraph()
    with surgery.untouched(model), _all_trainable(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(
                model, example_inputs, forward_fn=surgery.call, output_transform=outputs, verbose=False
            )
        except GraphError:
            raise
        except Exception as error:
            raise GraphError(
                f"the model cannot be traced with these example inputs: {type(error).__name__}: {error}"
            ) from error
    return graph


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


def _resolve_ignored(model: nn.Module, ignored: Sequence[str | nn.Module | type]) -> set[int]:
    """Identities of all modules and bare parameters that are ignored.

    Raises:
        ConfigError: a name that the model does not have.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    found: set[int] = set()
    for each in ignored:
        if isinstance(each, str) and each in parameters:
            found.add(id(parameters[each]))
            continue
        if isinstance(each, str) and each not in modules:
            raise ConfigError(f"ignored: the model has no layer {each!r}{_nearest(each, modules)}")
        if isinstance(each, type):
            roots = [module for module in modules.values() if isinstance(module, each)]
        else:
            roots = [modules[each] if isinstance(each, str) else each]
        for root in roots:
            found.update(id(module) for module in root.modules())
            found.update(id(parameter) for parameter in root.parameters())
    return found


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [n for n in names if n], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---------------------------------------------------------------------------------------------- verification


def _demote(structures: StructureSet) -> StructureSet:
    """Inexact layer groups become unprunable."""
    inexact = {
        name: f"removal is not exact: {group.inexact} (allow_inexact=True prunes it all the same)"
        for name, group in structures.groups.items()
        if group.inexact is not None
    }
    groups = {name: group for name, group in structures.groups.items() if name not in inexact}
    return replace(structures, groups=groups, unprunable={**structures.unprunable, **inexact})


def _verified(
    model: nn.Module, structures: StructureSet, example_inputs: Any, allow_inexact: bool
) -> StructureSet:
    """Try every layer group: what does not run becomes unprunable, what changes the output becomes inexact."""
    groups = dict(structures.groups)
    unprunable = dict(structures.unprunable)
    with _random_values(model, structures):
        for declared in (False, True) if allow_inexact else (False,):
            names = [name for name, group in structures.groups.items() if (group.inexact is not None) == declared]
            for name, verdict in _failures(model, structures, names, example_inputs).items():
                if verdict.change is None:
                    unprunable[name] = f"removing a structure fails: {verdict.problem}"
                    del groups[name]
                else:
                    groups[name] = replace(groups[name], inexact=verdict.problem)
    return replace(structures, groups=groups, unprunable=unprunable)


def _failures(
    model: nn.Module, structures: StructureSet, names: Sequence[str], example_inputs: Any
) -> dict[str, surgery.Verdict]:
    """The layer groups among `names` whose removal fails. All at once first, then by halves."""
    if not names:
        return {}
    verdict = _try(model, structures, names, example_inputs)
    if verdict.problem is None:
        return {}
    if len(names) == 1:
        return {names[0]: verdict}
    half = len(names) // 2
    found = _failures(model, structures, names[:half], example_inputs)
    found |= _failures(model, structures, names[half:], example_inputs)
    if not found:  # each half works alone and both together do not: give up the second
        return dict.fromkeys(names[half:], verdict)
    return found


def _try(
    model: nn.Module, structures: StructureSet, names: Sequence[str], example_inputs: Any
) -> surgery.Verdict:
    """Remove one structure of every layer group, then about a third of all."""
    one = {name: [len(structures.groups[name]) // 3] for name in names}
    third = {name: range(0, len(structures.groups[name]) - 1, 3) for name in names}
    verdict = surgery.Verdict(0.0, None)
    for picks in (one, third):
        try:
            surgery.check_picks(structures, picks)
            verdict = surgery.trial(model, structures, picks, example_inputs)
        except SurgeryError as error:
            verdict = surgery.Verdict(None, str(error))
        if verdict.problem is not None:
            break
    return verdict


@contextmanager
def _random_values(model: nn.Module, structures: StructureSet) -> Iterator[None]:
    """Perturb all weights and running statistics for a while, so that no zero hides a wrong trace.

    A branch that starts at zero (γ = 0, LoRA, adaLN-zero) would make any removal in it look exact.
    """
    buffers = {
        c.tensor for group in structures.groups.values() for c in group.couplings if c.role is Role.BUFFER
    }
    tensors = [p for p in model.parameters() if p.is_floating_point()]
    tensors += [buffer for name, buffer in model.named_buffers() if name in buffers]
    saved = [(tensor, tensor.data) for tensor in tensors]
    generator = torch.Generator().manual_seed(0)
    try:
        for tensor, data in saved:
            tensor.data = _perturbed(data, generator)
        yield
    finally:
        for tensor, data in saved:
            tensor.data = data


def _perturbed(data: Tensor, generator: torch.Generator) -> Tensor:
    """Every value scaled by 1 ± 0.2, and a zero tensor filled with small values. Signs stay (variances)."""
    noise = torch.empty(data.shape).uniform_(-0.2, 0.2, generator=generator).to(data.device, data.dtype)
    small = data.abs().mean() * 0.5 if bool(data.any()) else 0.1
    return torch.where(data == 0, noise * 5 * small, data * (1 + noise))
