"""The graph: layers that share a width → structures, and torch-pruning's scores for them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch_pruning import ops
from torch_pruning._helpers import GroupItem

from decay_pruning import surgery
from decay_pruning.checks import shown
from decay_pruning.errors import ConfigError, GraphError
from decay_pruning.graph import _reasons
from decay_pruning.graph._layers import MIXES, TABLE, Layer, Slice
from decay_pruning.graph._trace import Indices, Item, Untraceable, trace, walk
from decay_pruning.graph._verify import demote, verified
from decay_pruning.structures import Coupling, LayerGroup, Place, Role, StructureSet

log = logging.getLogger(__name__)

#: One of torch-pruning's importances, or any callable on its groups → one score per root channel, or None.
Importance = Callable[[Any], Tensor | None]

_ROOTS = (ops.TORCH_CONV, ops.TORCH_LINEAR, ops.TORCH_EMBED, ops.TORCH_MHA)


@dataclass
class _Traced:
    """One width as torch-pruning sees it: the channels of a root layer and all that goes with them."""

    name: str
    width: int
    items: list[Item]
    slices: list[Slice] = field(default_factory=list)
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
                raise GraphError(
                    f"{name!r} is not initialised yet; run the model once before building the pruner"
                )
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._modules = {module: name for name, module in model.named_modules()}
        skip = _resolve_ignored(model, ignored)
        dependencies = trace(model, example_inputs)
        self._traced = self._enumerate(dependencies, skip)
        self._given = tuple(heads)
        label, sizes = self._tie(heads)
        structures = self._assemble(label, sizes)
        if verify:
            structures = verified(model, structures, example_inputs, allow_inexact)
        if not allow_inexact:
            structures = demote(structures)
        structures = self._explained(structures, example_inputs)
        if not structures.groups:
            reasons = "\n".join(
                f"  {name or type(model).__name__}: {why}" for name, why in structures.unprunable.items()
            )
            raise GraphError(
                f"nothing in this model can be pruned:\n{reasons or '  it has no prunable layer'}"
            )
        touched = {c.place for group in structures.groups.values() for c in group.couplings}
        self.structures = replace(
            structures, sizes={p: n for p, n in structures.sizes.items() if p in touched}
        )

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
                group.items = walk(node, pruner.prune_out_channels, width)
                for item in group.items:
                    if item.outward:
                        covered.setdefault(item.node, set()).update(item.index.tolist())
                group.refused = self._refusal(group, skip)
                for item in group.items:
                    group.slices += self._slices(item)
                    group.inexact = group.inexact or self._mixing(item.node)
            except Untraceable as error:
                group.refused = group.refused or str(error)
            except (
                Exception
            ) as error:  # whatever torch-pruning's graph holds there, it costs this layer group only
                log.debug("layer group %r cannot be traced", name, exc_info=True)
                group.refused = (
                    group.refused or f"the trace fails on its way ({type(error).__name__}: {error})"
                )
        return traced

    def _refusal(self, group: _Traced, skip: set[int]) -> str | None:
        """Why a layer group is not to be pruned, seen from the layers in it."""
        for item in group.items:
            node = item.node
            if id(node.module) in skip and item.outward:
                return "ignored, as asked"
        for item in group.items:
            node = item.node
            if node.type == ops.OPTYPE.OUTPUT:
                return _reasons.OUTPUT
            if node.type in (ops.OPTYPE.LSTM, ops.OPTYPE.CUSTOMIZED):
                return f"is coupled to {self._modules[node.module]!r}, a layer type that is not supported"
        parameters = [
            p
            for item in group.items
            if isinstance(item.node.module, nn.Module) and not _is_op(item.node)
            for p in item.node.module.parameters(recurse=False)
        ]
        if parameters and not any(p.requires_grad for p in parameters):
            return "all its parameters are frozen"
        return None

    def _slices(self, item: Item) -> list[Slice]:
        """Places of one layer's channels.

        Raises:
            Untraceable: the layer cannot be cut, or the channels lie outside of it.
        """
        node = item.node
        if node.type == ops.OPTYPE.PARAMETER:
            layer = self._bare(node, item)
        elif node.type in TABLE:
            layer = Layer(self._modules[node.module], node.module, item.root, self._names)
            TABLE[node.type](layer, item.index, item.outward)
        elif node.type == ops.OPTYPE.SPLIT and len(set(node.module.split_sizes or ())) == 1:
            part = int(node.module.split_sizes[0])  # equal parts stay equal
            return [Slice(repr(node.module), 0, None, item.index % part, item.root)]
        else:
            return []
        for each in layer.slices:
            if each.role is None or not each.position.size:
                continue
            size = surgery.size_of(self._model, (each.tensor, each.dim))
            if each.position.max() >= size:
                raise Untraceable(
                    f"torch-pruning finds {int(each.position.max()) + 1} channels at {each.tensor!r}, which has {size}"
                )
        if item.beyond:
            raise Untraceable(f"torch-pruning finds channels at {layer.name!r} that it does not have")
        return layer.slices

    def _bare(self, node: Any, item: Item) -> Layer:
        """A parameter that belongs to no layer type known to torch-pruning."""
        name = self._names[id(node.module)]
        owner, leaf = surgery.parent(self._model, name)
        layer = Layer(name.rpartition(".")[0], owner, item.root, self._names)
        norm = _is_norm(owner)
        layer.tensor(leaf, node.pruning_dim, Role.SCALE if norm else Role.OTHER, item.index)
        if norm and isinstance(getattr(owner, "normalized_shape", None), tuple):
            layer.attribute("normalized_shape", item.index)
        return layer

    def _mixing(self, node: Any) -> str | None:
        """Why taking a channel away from this layer changes its other channels, or None where it does not."""
        if node.type == ops.OPTYPE.PARAMETER:
            name = self._names[id(node.module)]
            owner, _ = surgery.parent(self._model, name)
            return f"{type(owner).__name__} {name!r} normalises over this width" if _is_norm(owner) else None
        why = MIXES.get(node.type)
        return why.format(self._modules[node.module]) if why else None

    def _shared(self) -> dict[str, str]:
        """Layer → the layer group that its width belongs to, prunable or not."""
        found: dict[str, str] = {}
        for head, members in self._heads.items():
            for item in (item for each in members for item in each.items if item.outward):
                module = item.node.module
                if item.node.type == ops.OPTYPE.PARAMETER:
                    found.setdefault(self._names[id(module)].rpartition(".")[0], head)
                elif module in self._modules:
                    found.setdefault(self._modules[module], head)
        return found

    def _explained(self, structures: StructureSet, example_inputs: Any) -> StructureSet:
        """Every layer that is not prunable named, and advice about heads where there may be some."""
        said = dict(structures.unprunable)
        views = [name for name, why in said.items() if "is invalid for input of size" in why]
        if views:
            shared, given = self._shared(), self._given
            scored = {shared.get(name, name) for name in _reasons.scored(self._model, example_inputs)}
            for name in scored & set(views) - {shared.get(each, each) for each in given}:
                said[name] += _reasons.HEADS
        known = {name for module, name in self._modules.items() if isinstance(module, _ROOTS)}
        said = _reasons.named(
            self._model, replace(structures, unprunable=said), example_inputs, self._shared(), known
        )
        return replace(structures, unprunable=said)

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
        channels = label  # heads are counted in these: queries, keys and values may each be named
        for name, count in heads.items():
            label = self._tie_heads(label, channels, start, name, count)
        return label, sizes

    def _tie_heads(self, label: Indices, channels: Indices, start: Indices, name: str, count: int) -> Indices:
        """Join the same offset of every head of one layer, whose channels are those before any heads were joined."""
        for first, group in zip(start, self._traced, strict=False):
            for item in group.items:
                if self._modules.get(item.node.module) != name or not item.outward:
                    continue
                key = item.root[np.argsort(item.index, kind="stable")] + first
                found, rank = np.unique(channels[key], return_inverse=True)
                if count < 1 or found.size % count:
                    raise ConfigError(
                        f"heads[{name!r}] = {count} does not divide its {found.size} structures"
                    )
                return _components(label, key, rank % (found.size // count))
        if name in self._modules.values():
            refused = next(
                (each.refused for each in self._traced if each.name == name and each.refused), None
            )
            if refused is not None:
                raise ConfigError(f"heads: {name!r} cannot be pruned: it {refused}")
            kind = type(self._model.get_submodule(name)).__name__
            raise ConfigError(
                f"heads: {name!r} ({kind}) is no layer whose outputs can be told apart by heads"
            )
        raise ConfigError(f"heads: no prunable layer {name!r}{_nearest(name, self._modules.values())}")

    def _assemble(self, label: Indices, sizes: dict[Place, int]) -> StructureSet:
        """Layer groups from labelled channels. Groups that share a structure become one."""
        start = np.cumsum([0, *(group.width for group in self._traced)])
        of_key = np.repeat(np.arange(len(self._traced)), [group.width for group in self._traced])
        joined = _components(np.arange(len(self._traced)), of_key, label) if label.size else of_key
        self._members: dict[str, list[tuple[_Traced, Indices]]] = {}
        self._heads: dict[str, list[_Traced]] = {}
        groups: dict[str, LayerGroup] = {}
        unprunable: dict[str, str] = {}
        for g, head in enumerate(self._traced):
            if joined[g] != g:
                continue
            members = [m for m in range(len(self._traced)) if joined[m] == g]
            self._heads[head.name] = [self._traced[m] for m in members]
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
        return StructureSet(groups, sizes, unprunable)

    # ---------------------------------------------------------------------------------------------- scores

    def scores(self, importance: Importance, structures: StructureSet) -> dict[str, Tensor]:
        """Let one of torch-pruning's importances (or any callable on its groups) score all structures.

        Args:
            importance: torch-pruning group → 1-d tensor with one value per channel of the group's root, or None.
            structures: the structures that are there now (after any removals by `surgery`).

        Returns:
            layer group → shape (S,), float32, CPU: the mean over the channels of each structure, in the order of
            `ids`. NaN, which a normaliser makes of a layer group without any importance, reads as 0. Layer groups
            that the importance has nothing to say about (it returns None) are left out, with a warning in the log.

        Raises:
            GraphError: the importance fails.
            ConfigError: it returns something else than one number per channel.
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
                        f"{type(importance).__name__} cannot score layer group {name!r}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                if value is None:
                    break
                if not isinstance(value, Tensor) or value.shape != owner.shape or value.is_complex():
                    what = f"{tuple(value.shape)} values" if isinstance(value, Tensor) else shown(value)
                    raise ConfigError(
                        f"{type(importance).__name__} returned {what} for layer group {name!r}, which has "
                        f"{owner.numel()} channels: one real number for each is needed, in a tensor"
                    )
                total.index_add_(0, owner, value.detach().to("cpu", total.dtype).nan_to_num(nan=0.0))
                count.index_add_(0, owner, torch.ones(owner.numel()))
            else:
                found[name] = total / count
                continue
            log.warning(
                "%s gives no score to layer group %r: it is never picked", type(importance).__name__, name
            )
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
                    if axis is None or _misread(item):
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

    def _axis(self, item: Item) -> Place | None:
        """The place whose positions are the channels of this layer, or None for an operation without tensors."""
        node, out = item.node, item.outward
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


def _is_norm(module: nn.Module) -> bool:
    """A norm over its last dimension that torch-pruning does not know (RMSNorm)."""
    shape = getattr(module, "normalized_shape", None)
    own = [p.ndim for p in module.parameters(recurse=False)]
    return (isinstance(shape, tuple) and len(shape) == 1) or (
        "rmsnorm" in type(module).__name__.lower() and own == [1]
    )


def _misread(item: Item) -> bool:
    """Whether torch-pruning's importances index this layer wrongly: some grouped convolutions."""
    m = item.node.module
    if item.node.type != ops.OPTYPE.CONV or m.groups == 1:
        return False
    return bool(m.transposed or (m.groups == m.in_channels and not item.outward))


def _is_op(node: Any) -> bool:
    return node.type not in TABLE and node.type not in (ops.OPTYPE.PARAMETER, ops.OPTYPE.LSTM)


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
            Coupling(
                tensor, dim, role, torch.from_numpy(np.concatenate(owners)[first]), torch.from_numpy(position)
            )
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


def _resolve_ignored(model: nn.Module, ignored: Sequence[str | nn.Module | type]) -> set[int]:
    """Identities of all modules and bare parameters that are ignored.

    Raises:
        ConfigError: a name or module that the model does not have.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    found: set[int] = set()
    roots: list[nn.Module]
    for each in ignored:
        if isinstance(each, str) and each in parameters:
            found.add(id(parameters[each]))
            continue
        if isinstance(each, str) and each not in modules:
            raise ConfigError(f"ignored: the model has no layer {each!r}{_nearest(each, modules)}")
        if isinstance(each, str):
            roots = [modules[each]]
        elif isinstance(each, nn.Module):
            if not any(each is module for module in modules.values()):
                raise ConfigError(f"ignored: this {type(each).__name__} is no part of the model")
            roots = [each]
        else:
            kind: Any = each
            roots = [module for module in modules.values() if isinstance(module, kind)]
        for root in roots:
            found.update(id(module) for module in root.modules())
            found.update(id(parameter) for parameter in root.parameters())
    return found


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [n for n in names if n], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
