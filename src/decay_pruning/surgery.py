"""Surgery: cut structures out of a model that is being trained, and prove that nothing else changed.

A removal is four steps: set the structures to zero, run the model, cut, run it again. Both outputs must agree, or
the model is put back as it was. Training goes on with the same `Parameter` objects: their gradients and the state
that the optimizer keeps for them are cut along, so parameter groups, schedulers and hooks stay valid.

This room knows tensors, dimensions and positions; it does not know layer types (those come as
`Role.ATTRIBUTE` couplings) nor why something is removed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer
from torch.overrides import TorchFunctionMode

from decay_pruning.errors import SurgeryError
from decay_pruning.folds import Factor, Factors, factors
from decay_pruning.proof import TOLERANCE, Output, Settings, call, leaves, observe, untouched
from decay_pruning.structures import NOT_PARAMETERS, Picks, Place, StructureSet
from decay_pruning.valueless import is_valueless

__all__ = [  # what was here before the proof had a room of its own is still found here
    "TOLERANCE", "History", "Kept", "Optimizers", "Output", "Verdict", "call", "check_picks", "check_positions",
    "history", "leaves", "lookup", "observe", "parent", "remove", "shrink", "size_of", "trial", "untouched", "zero_",
]  # fmt: skip
log = logging.getLogger(__name__)

#: Place → the current positions that stay there, ascending int64.
Kept = Mapping[Place, Tensor]
Optimizers = Optimizer | Sequence[Optimizer] | None

_HISTORY = "_decay_pruning_history"
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


# ---------------------------------------------------------------------------------------------- history


@dataclass
class History:
    """Which original positions are still there, for every place that surgery has cut.

    Attributes:
        original: place → its size in the original model.
        positions: place → the original positions that are left, ascending int64.
        factors: place → what its values were multiplied with by now, in original positions (see `folds`).
    """

    original: dict[Place, int] = field(default_factory=dict)
    positions: dict[Place, Tensor] = field(default_factory=dict)
    factors: dict[Place, Factor] = field(default_factory=dict)

    def update(self, kept: Kept, sizes: Mapping[Place, int], scaled: Mapping[Place, Factor] = {}) -> None:
        """Note one cut: `kept` are positions before the cut, `sizes` the sizes before it; `scaled` is multiplied."""
        for place, factor in scaled.items():
            size, before = factor.values.numel(), self.positions.get(place)
            known = before is not None and before.numel() == size
            past = self.factors.get(place) if known or before is None else None
            values = torch.ones(self.original[place] if known else size, dtype=torch.float64)
            if past is not None and past.values.numel() == values.numel():
                values = past.values.clone()
            values[before if known else slice(None)] *= factor.values
            self.factors[place] = replace(factor, values=values)
        for place, keep in kept.items():
            before = self.positions.get(place)
            if before is None or before.numel() != sizes[place]:  # not known, or out of date
                self.original[place], before = sizes[place], torch.arange(sizes[place])
            self.positions[place] = before[keep.cpu()]

    def copy(self) -> History:
        return History(dict(self.original), dict(self.positions), dict(self.factors))

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain lists and numbers, fit for JSON, in the order of names."""
        return [
            {"tensor": name, "dim": dim, "original": self.original[name, dim], "kept": keep.tolist()}
            for (name, dim), keep in sorted(self.positions.items(), key=lambda entry: entry[0])
        ]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]]) -> None:
        self.original = {(row["tensor"], row["dim"]): int(row["original"]) for row in state}
        self.positions = {
            (row["tensor"], row["dim"]): torch.tensor(row["kept"], dtype=torch.int64) for row in state
        }


def history(model: nn.Module) -> History:
    """What surgery has cut out of this model so far (a copy), be it as a whole or in parts.

    Each module notes its own part of it, which so travels with `copy.deepcopy`, into a larger model and out of one.
    The model that was given to surgery notes the whole, for modules that are replaced afterwards.
    """
    found, own = History(), History()
    for path, module in model.named_modules():
        past = module.__dict__.get(_HISTORY)
        if isinstance(past, History):
            prefix = f"{path}." if path else ""
            for (name, dim), keep in past.positions.items():
                target = found if "." in name else own
                target.original.setdefault((prefix + name, dim), past.original[name, dim])
                target.positions.setdefault((prefix + name, dim), keep)
            for (name, dim), factor in past.factors.items():
                (found if "." in name else own).factors.setdefault((prefix + name, dim), factor)
    return History(
        {**found.original, **own.original},
        {**found.positions, **own.positions},
        {**found.factors, **own.factors},
    )


def _noted(
    model: nn.Module, kept: Kept, sizes: Mapping[Place, int], scaled: Factors
) -> dict[nn.Module, History]:
    """What the modules will have noted after this cut. A tied tensor is noted with each module that holds it."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                holders.setdefault(id(tensor), []).append((module, leaf))
    whole = history(model)
    whole.update(kept, sizes, scaled)
    new = {model: whole}
    for place in {**kept, **scaled}:
        name, dim = place
        thing = lookup(model, name)
        for module, leaf in (
            holders.get(id(thing), []) if isinstance(thing, Tensor) else [parent(model, name)]
        ):
            past = module.__dict__.get(_HISTORY)
            own = new.setdefault(module, past.copy() if isinstance(past, History) else History())
            if place in kept:
                own.original[leaf, dim] = whole.original[place]
                own.positions[leaf, dim] = whole.positions[place]
            if place in scaled:
                own.factors[leaf, dim] = whole.factors[place]
    return new


# ------------------------------------------------------------------------------------------------ places


def parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns the dotted `name`, and the last part of the name.

    Raises:
        SurgeryError: no such module.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = model
        for part in path.split(".") if path else ():
            module = module._modules[part] if part in module._modules else module.get_submodule(part)  # type: ignore[assignment]
        return module, leaf
    except AttributeError:
        raise SurgeryError(f"the model has no module {path!r} (needed for {name!r})") from None


def lookup(model: nn.Module, name: str) -> Any:
    """The parameter, buffer or attribute with this dotted name.

    Raises:
        SurgeryError: no such name.
    """
    module, leaf = parent(model, name)
    if isinstance(module._parameters, dict) and (tensor := module._parameters.get(leaf)) is not None:
        return tensor  # the quick way
    if not hasattr(module, leaf):
        raise SurgeryError(f"the model has no parameter, buffer or attribute {name!r}")
    return getattr(module, leaf)


def size_of(model: nn.Module, place: Place) -> int:
    """Current size of a place: a tensor's extent, an element of a tuple or list, or the integer itself.

    Raises:
        SurgeryError: the place does not exist or holds something else.
    """
    name, dim = place
    thing = lookup(model, name)
    if isinstance(thing, int) and not isinstance(thing, bool) and dim == 0:
        return thing
    shape = thing.shape if isinstance(thing, Tensor) else thing
    if isinstance(shape, tuple | list) and 0 <= dim < len(shape) and isinstance(shape[dim], int):
        return int(shape[dim])
    raise SurgeryError(f"{name!r} has no dimension {dim} to cut (it is a {type(thing).__name__})")


# ------------------------------------------------------------------------------------------------- cutting


@dataclass
class _Cut:
    """One tensor and what stays of it."""

    names: list[str]
    tensor: Tensor
    kept: dict[int, Tensor]


def shrink(
    model: nn.Module, kept: Kept, optimizer: Optimizers = None, scaled: Mapping[Place, Factor] = {}
) -> Callable[[], None]:
    """Keep only `kept` at every place; cut gradients and optimizer state along.

    Everything is checked before anything is touched. `Parameter` and buffer objects stay the same objects, with
    their dtype, device, memory format, `requires_grad` and hooks; tied parameters are cut once.

    Args:
        model: the model.
        kept: place → ascending positions that stay; other places are left alone.
        optimizer: the optimizer or optimizers whose state follows.
        scaled: place → what is multiplied there, in positions before the cut (see `folds`). Gradients and optimizer
            state are not.

    Returns:
        A function that puts everything back as it was. It is valid until the next training step.

    Raises:
        SurgeryError: an unknown place, positions that do not fit, nothing left of a tensor, a distributed tensor, or
            optimizer state that cannot be cut.
    """
    sizes = {place: size_of(model, place) for place in kept}
    for place, keep in kept.items():
        check_positions(place, keep, sizes[place])
    cuts, attributes = _sort_places(model, kept)
    multiplied, numbers = _sort_factors(model, scaled, cuts)
    updates = [update for each in _as_list(optimizer) for update in _state_updates(each, cuts)]

    noted = _noted(model, kept, sizes, scaled)
    past = {module: module.__dict__.get(_HISTORY) for module in noted}
    undo: list[Callable[[], None]] = []

    def put_back() -> None:
        for step in reversed(undo):
            step()
        for module, before in past.items():
            if before is None:
                module.__dict__.pop(_HISTORY, None)
            else:
                module.__dict__[_HISTORY] = before

    try:
        for cut in cuts:
            data = cut.tensor.detach()
            for dim, factor in multiplied.get(id(cut.tensor), {}).items():
                data = factor.apply(data, dim)
            undo.append(_replace(cut.tensor, _take(data, cut.kept), cut.kept))
        for state, key, value in updates:
            undo.append(_setter(state, key, state[key]))
            state[key] = value
        for name, dims in attributes.items():
            module, leaf = parent(model, name)
            value = getattr(module, leaf)
            undo.append(_attribute_setter(module, leaf, value))
            setattr(module, leaf, _shorter(value, dims))
        for name, factor in numbers.items():
            module, leaf = parent(model, name)
            value = getattr(module, leaf)
            undo.append(_attribute_setter(module, leaf, value))
            setattr(module, leaf, factor.of(value))
        for module, now in noted.items():
            module.__dict__[_HISTORY] = now
    except BaseException:  # out of memory, interrupted: never leave half a cut behind
        put_back()
        raise
    return put_back


def _as_list(optimizer: Optimizers) -> list[Optimizer]:
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def check_positions(place: Place, keep: Tensor, size: int) -> None:
    """Kept positions ascend within the place and leave something.

    Raises:
        SurgeryError: they do not.
    """
    name, dim = place
    if keep.ndim != 1 or keep.dtype != torch.int64:
        raise SurgeryError(
            f"kept positions of {name!r} must be a 1-d int64 tensor, not {keep.dtype} {keep.ndim}-d"
        )
    if keep.numel() == 0:
        raise SurgeryError(
            f"nothing would be left of {name!r} along dimension {dim}; keep at least one structure"
        )
    if int(keep[0]) < 0 or int(keep[-1]) >= size or bool((keep[1:] <= keep[:-1]).any()):
        raise SurgeryError(f"kept positions of {name!r}, dimension {dim}, must ascend within 0 … {size - 1}")


def _sort_places(model: nn.Module, kept: Kept) -> tuple[list[_Cut], dict[str, dict[int, Tensor]]]:
    """Places → one cut per tensor object (ties merged), and the module attributes."""
    cuts: dict[int, _Cut] = {}
    attributes: dict[str, dict[int, Tensor]] = {}
    for (name, dim), keep in kept.items():
        thing = lookup(model, name)
        if not isinstance(thing, Tensor):
            attributes.setdefault(name, {})[dim] = keep
            continue
        if hasattr(thing, "full_tensor"):
            raise SurgeryError(
                f"{name!r} is a distributed tensor (DTensor); prune before the model is sharded, "
                "or use replicated data parallelism"
            )
        if is_lazy(thing):
            raise SurgeryError(f"{name!r} is not initialised yet; run the model once before pruning it")
        if thing.grad_fn is not None or registered(model, name) is not thing:
            raise SurgeryError(
                f"{name!r} is computed from other tensors (weight norm, a parametrization or a mask) and cannot be "
                "cut; make it a plain parameter first"
            )
        cut = cuts.setdefault(id(thing), _Cut([], thing, {}))
        cut.names.append(name)
        same = cut.kept.setdefault(dim, keep)
        if not torch.equal(same, keep):
            raise SurgeryError(f"{cut.names} are one tensor, but different positions of it would be kept")
    return list(cuts.values()), attributes


def _sort_factors(
    model: nn.Module, scaled: Factors, cuts: list[_Cut]
) -> tuple[dict[int, dict[int, Factor]], dict[str, Factor]]:
    """Factors by tensor (identity) and dimension, each tensor among the cuts; and those of numbers on modules."""
    tensors: dict[int, dict[int, Factor]] = {}
    numbers: dict[str, Factor] = {}
    known = {id(cut.tensor) for cut in cuts}
    for (name, dim), factor in scaled.items():
        thing = lookup(model, name)
        if isinstance(thing, float) or (thing is None and factor.value is not None):
            numbers[name] = factor
            continue
        if not isinstance(thing, Tensor) or factor.values.numel() != size_of(model, (name, dim)):
            raise SurgeryError(
                f"{name!r} is not what would be scaled: a {type(thing).__name__}, or of another size"
            )
        if id(thing) not in known:
            known.add(id(thing))
            cuts.append(_Cut([name], thing, {}))
        tensors.setdefault(id(thing), {})[dim] = factor
    return tensors, numbers


def scaled_by(model: nn.Module, structures: StructureSet, kept: Kept) -> dict[Place, Factor]:
    """What a removal multiplies, so that widths that the model divides by change nothing (see `folds`)."""

    def size(place: Place) -> int:
        thing = lookup(model, place[0])
        return int(thing.shape[place[1]]) if isinstance(thing, Tensor) else 1

    return factors(structures.folds, kept, size)


def registered(model: nn.Module, name: str) -> Tensor | None:
    module, leaf = parent(model, name)
    tables: tuple[Any, Any] = module._parameters, module._buffers  # no dicts where the module is a script
    return next((table[leaf] for table in tables if leaf in table), None)


def _take(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """A new tensor with only the kept positions, in the memory format of the old one."""
    new = tensor
    for dim, keep in kept.items():
        new = new.index_select(dim, keep.to(tensor.device))
    channels_last = _CHANNELS_LAST.get(tensor.ndim)
    if (
        channels_last
        and tensor.stride(1) < tensor.stride(-1)
        and tensor.is_contiguous(memory_format=channels_last)
    ):
        new = torch.empty(new.shape, dtype=new.dtype, device=new.device, memory_format=channels_last).copy_(
            new
        )
    return new


def _replace(tensor: Tensor, data: Tensor, kept: Mapping[int, Tensor]) -> Callable[[], None]:
    """Give a tensor other data (and its gradient the same cut). Returns what undoes it."""
    old, old_grad = tensor.data, tensor.grad
    grad = None if old_grad is None else _take(old_grad, kept)
    _set_data(tensor, data, grad)
    return lambda: _set_data(tensor, old, old_grad)


def _set_data(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Change data and gradient of a leaf to another shape.

    A graph that somebody still holds (`loss`) keeps the leaf's gradient accumulator alive, and that one remembers
    the old shape: the next backward would fail with "invalid gradient". Passing through another dtype makes torch
    forget it; hooks on the parameter survive.
    """
    tensor.grad = None
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
    tensor.grad = grad


def check_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Whether the state that an optimizer keeps of these parameters could be cut along any dimension.

    Raises:
        SurgeryError: it could not; the message names the parameter.
    """
    for name, p in parameters.items():
        kept = {dim: torch.arange(size) for dim, size in enumerate(p.shape)}
        _state_updates(optimizer, [_Cut([name], p, kept)], take=False)


class Still:
    """A model and its optimizers as they are, to be put back whatever happens to them in between.

    Tensors are remembered as objects, not copied (but for the short ones, of norms and biases): whoever changes the
    values of the others in place puts them back by himself.
    """

    def __init__(self, models: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> None:
        modules = [module for model in models for module in model.modules()]
        self._modules = [
            (m, m.__class__, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in modules
        ]
        tensors = [t for _, _, _, p, b in self._modules for t in (*p.values(), *b.values()) if t is not None]
        self._tensors = [
            (t, t.data, t.grad if t.is_leaf else None, t.data.clone() if t.ndim <= 1 else None)
            for t in {id(t): t for t in tensors}.values()
        ]
        self._states = [
            (o.state, {key: _shallow(value) for key, value in o.state.items()}) for o in optimizers
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything as it was."""
        for module, kind, attributes, parameters, buffers in self._modules:
            module.__class__ = kind
            for added in set(vars(module)) - set(attributes):
                del module.__dict__[added]
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        for tensor, data, grad, values in self._tensors:
            if (
                tensor.data_ptr() != data.data_ptr()
                or tensor.shape != data.shape
                or tensor.dtype != data.dtype
            ):
                _set_data(tensor, data, grad)
            elif tensor.grad is not grad:
                tensor.grad = grad
            if values is not None:
                tensor.data.copy_(values)
        for state, before in self._states:
            for key in set(state) - set(before):
                del state[key]
            for key, value in before.items():
                state[key] = value


def _shallow(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _state_updates(
    optimizer: Optimizer, cuts: Sequence[_Cut], *, take: bool = True
) -> list[tuple[dict[Any, Any], Any, Tensor]]:
    """The optimizer state that changes: (state of a parameter, key, new value). Touches nothing."""
    if isinstance(optimizer, LBFGS):
        raise SurgeryError(
            "LBFGS keeps one flat history of all parameters, which cannot be cut; use a first-order optimizer"
        )
    updates = []
    for cut in cuts:
        if cut.tensor not in optimizer.state:
            continue
        state = optimizer.state[cut.tensor]
        for key, value in state.items():
            if isinstance(value, Tensor):
                kept = _state_cut(optimizer, cut, key, value)
                if kept and take:
                    updates.append((state, key, _take(value, kept)))
            elif isinstance(value, list | tuple | dict | set) and value:
                raise SurgeryError(
                    f"{type(optimizer).__name__} keeps {key!r} of {cut.names[0]!r} as a {type(value).__name__}, "
                    "and it is not known how to cut that; use an optimizer whose state has the parameter's shape"
                )
    return updates


def _state_cut(optimizer: Optimizer, cut: _Cut, key: str, value: Tensor) -> dict[int, Tensor]:
    """Dimension → kept positions for one state tensor. Covers full and factored (row, column) state."""
    if value.numel() == 1:
        return {}
    shape = cut.tensor.shape
    if value.ndim != len(shape) or any(n not in (1, old) for n, old in zip(value.shape, shape, strict=True)):
        raise SurgeryError(
            f"{type(optimizer).__name__} keeps {key!r} of {cut.names[0]!r} in shape {tuple(value.shape)}, which does "
            f"not follow the parameter's {tuple(shape)}; use an optimizer whose state has the parameter's shape"
        )
    return {dim: keep for dim, keep in cut.kept.items() if value.shape[dim] == shape[dim]}


def _setter(state: dict[Any, Any], key: Any, value: Any) -> Callable[[], None]:
    return lambda: state.__setitem__(key, value)


def _attribute_setter(module: nn.Module, leaf: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(module, leaf, value)


def _shorter(value: Any, dims: Mapping[int, Tensor]) -> Any:
    if isinstance(value, int):
        return dims[0].numel()
    new = [dims[i].numel() if i in dims else n for i, n in enumerate(value)]
    return new if isinstance(value, list) else tuple(new)


# ------------------------------------------------------------------------------------------------ zeroing


def zero_(model: nn.Module, structures: StructureSet, picks: Picks) -> None:
    """Set every parameter slice of the picked structures to zero, in place.

    Raises:
        KeyError: an unknown layer group or structure.
    """
    _zero(model, structures, picks)


@torch.no_grad()
def _zero(model: nn.Module, structures: StructureSet, picks: Picks) -> Callable[[], None]:
    """`zero_`, and a function that puts the values back."""
    saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
    for name, ids in picks.items():
        group = structures.groups[name]
        gone = torch.zeros(len(group), dtype=torch.bool)
        gone[group.rows(ids)] = True
        for coupling in group.couplings:
            if coupling.role in NOT_PARAMETERS:
                continue
            tensor = lookup(model, coupling.tensor).data
            position = coupling.position[gone[coupling.owner]].to(tensor.device)
            saved.append((tensor, coupling.dim, position, tensor.index_select(coupling.dim, position)))
            tensor.index_fill_(coupling.dim, position, 0)

    def put_back() -> None:
        for tensor, dim, position, values in reversed(saved):
            tensor.index_copy_(dim, position, values)

    return put_back


# ------------------------------------------------------------------------------------------------ removal


def remove(
    model: nn.Module,
    structures: StructureSet,
    picks: Picks,
    *,
    example_inputs: Any,
    optimizer: Optimizers = None,
    tolerance: float | None = None,
) -> StructureSet:
    """Remove structures, proven by the output on the example inputs.

    Args:
        model: the model; its structures' slices are set to zero first, whatever they are.
        structures: the structures that are there now.
        picks: layer group → original indices to remove.
        example_inputs: a tensor, a tuple (positional) or a mapping (by keyword) to run the model on.
        optimizer: optimizer or optimizers whose state follows.
        tolerance: largest relative change of any element of the output. None: `proof.TOLERANCE` of the coarsest dtype
            in the model. Layer groups that are inexact by nature are compared with a model whose norms and attention
            scales see only what is left.

    Returns:
        The structures that are left.

    Raises:
        SurgeryError: refused or not proven; the message names the layer group and the model is as it was.
    """
    picks = {name: tuple(ids) for name, ids in picks.items() if len(ids)}
    if not picks:
        return structures
    check_picks(structures, picks)
    if is_valueless(model):
        raise SurgeryError(
            "the model is on the meta device, so no removal can be proven; shrink(model, structures.kept(picks)) cuts "
            "its shapes all the same"
        )
    settings = Settings.of(model, example_inputs)
    verdict = _try_remove(model, structures, picks, settings, optimizer, tolerance)
    if verdict.problem is None:
        left = structures.without(picks)
        log.debug("removed %s", {name: len(ids) for name, ids in picks.items()})
        return left
    guilty = {}
    if len(picks) > 1:
        for name, ids in picks.items():
            alone = trial(model, structures, {name: ids}, settings, tolerance=tolerance)
            if alone.problem is not None:
                guilty[name] = alone.problem
    guilty = guilty or {", ".join(picks): verdict.problem}
    raise SurgeryError(
        "removal undone, the model is as it was: "
        + "; ".join(f"layer group {name!r}: {reason}" for name, reason in guilty.items())
    )


def check_picks(structures: StructureSet, picks: Picks) -> None:
    """Refuse what surgery never does.

    Raises:
        SurgeryError: an unknown layer group or structure, a last structure, or a tensor that would be left empty.
    """
    for name, ids in picks.items():
        group = structures.groups.get(name)
        if group is None:
            reason = structures.unprunable.get(name, "there is no such layer group")
            raise SurgeryError(f"layer group {name!r} cannot be pruned: {reason}")
        try:
            rows = group.rows(ids)
        except KeyError as error:
            raise SurgeryError(str(error.args[0])) from None
        if rows.numel() >= len(group):
            raise SurgeryError(f"layer group {name!r} would lose its last structure ({len(group)} are left)")
    for (tensor, dim), keep in structures.kept(picks).items():
        if keep.numel() == 0:
            raise SurgeryError(
                f"nothing would be left of {tensor!r} along dimension {dim} (layer groups {', '.join(picks)})"
            )


@contextmanager
def only_what_is_left(
    model: nn.Module, kept: Kept, standardised: Collection[str] = (), scaled: Mapping[Place, Factor] = {}
) -> Iterator[None]:
    """Let norms and attention see only the channels that a cut keeps, in a model that still has its old widths.

    What they make of the rest is the narrower model's own; everything around them is as it was. So a cut that only
    changes the function by their nature gives the same output, and one that is wrong does not. What `scaled` takes
    back is as it was, too.
    """
    same = {name.rpartition(".")[0] for name, _ in scaled}
    inside: dict[str, dict[Place, Tensor]] = {}
    for (name, dim), keep in kept.items():
        owner = mixer(model, name)
        if name.rpartition(".")[0] in standardised and (name.rpartition(".")[2], dim) in _INPUTS:
            owner = name.rpartition(".")[0]
        if owner is not None and owner not in same:
            inside.setdefault(owner, {})[name[len(owner) + 1 if owner else 0 :], dim] = keep
    modules = {model.get_submodule(owner): places for owner, places in inside.items()}
    try:
        for module, places in modules.items():
            module.__dict__["forward"] = _narrow_forward(module, places)
        with ExitStack() as stack:
            if not any(
                bool((factor.values < 1).any()) for factor in scaled.values()
            ):  # no queries among them
                stack.enter_context(_ScaleByWhatIsLeft())
            yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def mixer(model: nn.Module, name: str) -> str | None:
    """The module that a place belongs to, if it may mix its whole width: an attention, or a leaf of vectors only."""
    path = name.rpartition(".")[0]
    above = path.rpartition(".")[0]
    if isinstance(model.get_submodule(above), nn.MultiheadAttention):
        path = above
    module = model.get_submodule(path)
    if "forward" in module.__dict__ or "parametrizations" in path:
        return None
    return path if isinstance(module, nn.MultiheadAttention) or mixes_alone(module) else None


def mixes_alone(module: nn.Module) -> bool:
    """Whether a module that mixes its width does nothing else: it has no others inside, and vectors only."""
    vectors = all(p.ndim == 1 for p in module.parameters(recurse=False))
    one_by_one = isinstance(module, nn.modules.batchnorm._NormBase | nn.PReLU)  # mixes no channels
    return vectors and not one_by_one and not any(True for _ in module.children())


#: What goes into a layer.
_INPUTS = (("weight", 1), ("in_channels", 0), ("in_features", 0))


def _narrow_forward(module: nn.Module, places: Kept) -> Callable[..., Any]:
    """The forward of this module cut to `places`, on inputs and outputs of the old width."""
    keep = max(places.values(), key=torch.Tensor.numel)
    inputs_only = ("weight", 1) in places  # a standardised weight: what comes out has its old width
    for (name, dim), each in places.items():
        if name in ("embed_dim", "normalized_shape", "num_channels", "weight") and dim == 0:
            keep = each
            break

    def forward(*args: Any, **kwargs: Any) -> Any:
        width = next(size_of(module, place) for place, each in places.items() if torch.equal(each, keep))
        small = copy.deepcopy(module)
        small.__dict__.pop("forward", None)
        shrink(small, places)
        channels = 1 if isinstance(module, nn.GroupNorm) else -1
        if inputs_only:
            channels = 1 - cast(Tensor, small.weight).ndim
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if first is not None and first.shape[channels] != width:
            channels = 1
        index = keep.to(first.device) if first is not None else keep

        def narrow(value: Any) -> Any:
            fits = (
                isinstance(value, Tensor)
                and value.ndim > abs(channels) - 1
                and value.shape[channels] == width
            )
            return value.index_select(channels, index) if fits else value

        def widen(value: Any) -> Any:
            if isinstance(value, tuple):  # attention: its output, and weights that have no channels
                return (widen(value[0]), *value[1:])
            shape = list(value.shape)
            shape[channels] = width
            return value.new_zeros(shape).index_copy_(channels, index, value)

        given = {key: narrow(value) if key in ("query", "key", "value", "input", "x") else value
                 for key, value in kwargs.items()}  # fmt: skip
        if inputs_only:
            return small(*(narrow(a) for a in args), **given)
        return widen(small(*(narrow(a) for a in args), **given))

    return forward


class _ScaleByWhatIsLeft(TorchFunctionMode):
    """Attention scores divided by the root of the head width that is not zero."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if (
            func is nn.functional.scaled_dot_product_attention
            and given.get("scale") is None
            and len(args) < 7
        ):
            query, key = (*args, *(given[name] for name in ("query", "key")[len(args) :]))[:2]
            left = (query != 0).flatten(0, -2).any(0) & (key != 0).flatten(0, -2).any(0)
            given["scale"] = max(1, int(left.sum())) ** -0.5
        return func(*args, **given)


@dataclass(frozen=True)
class Verdict:
    """What a removal did to the output.

    Attributes:
        change: largest relative change of an output; None where the smaller model does not run or returns other shapes.
        problem: why the removal is not accepted, in words for the user; None where it is.
    """

    change: float | None
    problem: str | None


def trial(
    model: nn.Module,
    structures: StructureSet,
    picks: Picks,
    example_inputs: Any,
    *,
    tolerance: float | None = None,
    natural: bool | None = None,
    only: Sequence[int] | None = None,
) -> Verdict:
    """Try a removal and undo it.

    Args:
        model, structures, picks, tolerance: as in `remove`.
        example_inputs: those of `remove`, or the `Settings` that were made of them.
        natural: compare with a model whose norms and attention scales see only what is left. None: where a layer
            group says that it is inexact.
        only: numbers of the settings to try; None for all.
    """
    return _try_remove(
        model, structures, picks, example_inputs, None, tolerance, keep=False, natural=natural, only=only
    )


def _try_remove(
    model: nn.Module,
    structures: StructureSet,
    picks: Picks,
    example_inputs: Any,
    optimizer: Optimizers,
    tolerance: float | None,
    *,
    keep: bool = True,
    natural: bool | None = None,
    only: Sequence[int] | None = None,
) -> Verdict:
    """Zero, run, cut, run, compare. Undone unless it worked and is to be kept.

    Single precision first; where that leaves a doubt, double precision decides.

    Raises:
        SurgeryError: the cut was refused before anything was touched.
    """
    settings = example_inputs if isinstance(example_inputs, Settings) else Settings.of(model, example_inputs)
    if natural is None:
        natural = any(structures.groups[name].inexact for name in picks)
    kept = structures.kept(picks)
    scaled = scaled_by(model, structures, kept)
    shown = structures.outputs.kept(structures.gone(picks))
    mixed = {name: ids for name, ids in picks.items() if structures.groups[name].inexact} or picks
    verdict = Verdict(None, None)
    zeroed = _zero(model, structures, picks)
    undo: Callable[[], None] | None = None
    done = False
    try:
        for dtype in settings.dtypes:
            try:
                with ExitStack() as stack:
                    if natural:
                        left = only_what_is_left(
                            model, structures.kept(mixed), structures.standardised, scaled
                        )
                        stack.enter_context(left)
                    before = [each.narrowed(shown) for each in settings.observe(model, dtype, only)]
            except SurgeryError as error:
                if verdict.problem is None:
                    return Verdict(None, f"the proof fails: {error}")
                return verdict  # it does not run in this dtype: the narrower one has decided
            undo = shrink(model, kept, optimizer, scaled)
            try:
                change, limit, where = settings.change(before, settings.observe(model, dtype, only), only)
            except SurgeryError as error:
                return Verdict(None, str(error))
            limit = limit if tolerance is None else tolerance
            if change <= limit:
                done = keep
                return Verdict(change, None)
            verdict = Verdict(
                change, f"the output changes by {change:.2g} (relative), more than {limit:.2g}, {where}"
            )
            undo()
            undo = None
        return verdict
    finally:
        if not done:
            if undo is not None:
                undo()
            zeroed()
