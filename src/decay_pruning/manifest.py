"""Manifest: a pruned model in one safetensors file, without pickle.

The file holds the weights; its description says, for every tensor, which shape it had in the original model and which
positions were kept. `load` cuts a fresh model of the original class to these positions and fills it. Names are those
of the model itself: wrappers (`torch.compile`, data parallelism) around it or inside it are looked through.
"""

from __future__ import annotations

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from decay_pruning import archive, surgery, widths
from decay_pruning.errors import ManifestError, SurgeryError
from decay_pruning.structures import Place

#: Class → the child that it wraps, which alone counts.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's weights, original shapes and kept positions. The file appears whole or not at all.

    What `load` could not take is refused. The same model gives the same bytes, whatever it is wrapped in.

    Args:
        model: a model that `surgery` has cut as a whole or in parts, or an unpruned one.
        path: the file; its folder must exist.

    Raises:
        ManifestError: the model holds something that a file cannot, a host is still at work on it, it was narrowed
            by other means, or the file cannot be written.
    """
    inner = _unwrapped(model)
    _check_plain(inner)
    view = _View(inner)
    content = _Content.of(view)
    past = _history(view, content)
    description = {
        "kind": "model",
        "class": _class_name(inner),
        "tensors": {
            name: {"shape": list(t.shape), "original": _original_shape(name, t, past.original)}
            for name, t in content.tensors.items()
        },
        "aliases": content.aliases,
        "extra": content.extra,
        "versions": content.versions,
        "kept": past.state_dict(),
    }
    archive.write(path, content.tensors, description)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Cut a fresh model of the original class to the saved shape and fill in the saved weights, in place.

    Args:
        model: a model built like the original one, before pruning; on any device.
        path: a file that `save` wrote.

    Returns:
        The same model.

    Raises:
        ManifestError: the file is missing, damaged, foreign or newer, or does not fit; the model is as it was.
    """
    meta, tensors = archive.read(path)
    try:
        _check_form(meta)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"{path} has a damaged description: {error}") from error
    inner = _unwrapped(model)
    view = _View(inner)
    _check_fit(view, meta, tensors, path)
    kept = {
        (view.full(row["tensor"]), row["dim"]): torch.tensor(row["kept"], dtype=torch.int64)
        for row in meta["kept"]
    }
    before = view.copied()
    try:
        undo = surgery.shrink(inner, kept)
    except SurgeryError as error:
        raise ManifestError(f"{path} does not fit this model: {error}") from error
    try:
        inner.load_state_dict(view.filled(meta, tensors))
    except BaseException as error:
        undo()
        view.put_back(before)
        if not isinstance(error, Exception):
            raise
        raise ManifestError(f"{path} does not fit this model: {error}") from error
    return model


# -------------------------------------------------------------------------------------------------- names


def _unwrapped(model: nn.Module) -> nn.Module:
    while (child := _WRAPPERS.get(type(model).__name__)) in model._modules:
        model = model.get_submodule(str(child))
    return model


class _View:
    """A model's state by plain names, that is, without the wrappers inside of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._wrappers = {
            path: child
            for path, module in model.named_modules(remove_duplicate=False)
            if (child := _WRAPPERS.get(type(module).__name__)) in module._modules and child is not None
        }
        #: as the model itself names it
        self.state: dict[str, Any] = model.state_dict(keep_vars=True)
        self.versions = {
            self.plain(path): entry.get("version")
            for path, entry in getattr(self.state, "_metadata", {}).items()
        }
        for key, value in self.state.items():
            if is_lazy(value):
                raise ManifestError(f"{key!r} is not initialised yet; run the model once before")
        self.keys = {self.plain(key): key for key in self.state}

    def plain(self, name: str) -> str:
        path: list[str] = []
        found = []
        for part in name.split("."):
            if self._wrappers.get(".".join(path)) != part:
                found.append(part)
            path.append(part)
        return ".".join(found)

    def full(self, name: str) -> str:
        """A plain name with the wrappers put in."""
        path: list[str] = []
        for part in name.split("."):
            while (wrapped := self._wrappers.get(".".join(path))) is not None:
                path.append(wrapped)
            path.append(part)
        return ".".join(path)

    def get(self, name: str) -> Any:
        """Value in the state, by its plain name; None if there is none."""
        return self.state.get(self.keys.get(name, ""))

    def copied(self) -> dict[str, Any]:
        """The values of the state, as it names them."""
        return {
            k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v)
            for k, v in self.state.items()
        }

    @torch.no_grad()
    def put_back(self, values: Mapping[str, Any]) -> None:
        """Undo a `load_state_dict` that failed halfway."""
        for key, value in values.items():
            owner, _, leaf = key.rpartition(".")
            if leaf == "_extra_state":
                with suppress(Exception):  # it may be what failed
                    self.model.get_submodule(self.full(self.plain(owner))).set_extra_state(value)
            else:
                self.state[key].copy_(value)

    def filled(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> OrderedDict[str, Any]:
        """The state dict for `load_state_dict`, with the versions of modules."""
        values = {**tensors, **meta["extra"]}
        values |= {alias: tensors[name] for alias, name in meta["aliases"].items()}
        state = OrderedDict((key, values[name]) for name, key in self.keys.items())
        own = getattr(self.state, "_metadata", {})
        metadata = {path: dict(entry) for path, entry in own.items()}
        for path, entry in metadata.items():
            if (version := meta["versions"].get(self.plain(path))) is not None:
                entry["version"] = version
        state._metadata = metadata  # type: ignore[attr-defined]
        return state


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


# -------------------------------------------------------------------------------------------------- saving


def _check_plain(model: nn.Module) -> None:
    """The model is one that `load` can build upon.

    Raises:
        ManifestError: it is not; the message says the way out.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ManifestError(
            "a scripted model does not know what was cut; save the model that it was made from"
        )
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ == "FullyShardedDataParallel":
            raise ManifestError(f"{name or 'the model'!r} is sharded over several processes; gather it first")
        if kind.__module__.startswith("decay_pruning.hosts"):
            raise ManifestError(
                f"{name!r} is in the form that its host prunes it in ({kind.__name__}), which a fresh model is not: "
                "call pruner.finish() first"
            )


@dataclass
class _Content:
    """What of a model's state goes into a file, by plain names.

    Attributes:
        tensors: each tensor object once.
        aliases: further name of a tied one → its name in `tensors`.
        extra: what `get_extra_state` returned, where it is plain values.
        versions: module → version of its state, where it has one.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, view: _View) -> _Content:
        found = cls(versions={path: v for path, v in view.versions.items() if type(v) is int})
        first: dict[int, str] = {}
        for name, key in view.keys.items():
            value = view.state[key]
            if not isinstance(value, Tensor):
                if not _survives(value):
                    raise ManifestError(
                        f"{name!r} in the model's state is a {type(value).__name__}, and only tensors and plain "
                        "values (numbers, texts, lists, and mappings by text) are saved"
                    )
                found.extra[name] = value
            elif id(value) in first:
                found.aliases[name] = first[id(value)]
            else:
                first[id(value)] = name
                found.tensors[name] = value
        return found


def _survives(value: Any) -> bool:
    """Whether JSON gives back the same value."""
    try:
        return repr(json.loads(json.dumps(value, allow_nan=False))) == repr(value)
    except (TypeError, ValueError, RecursionError):
        return False


def _history(view: _View, content: _Content) -> surgery.History:
    """What was cut, by plain names, as far as it is still there.

    Raises:
        ManifestError: it does not explain the shapes that the model has now.
    """
    past = surgery.history(view.model)
    found = surgery.History()
    for (name, dim), keep in past.positions.items():
        try:
            thing = surgery.lookup(view.model, name)
        except SurgeryError:
            continue  # a layer that was fused into another one, for example
        if thing is None or isinstance(thing, nn.Module):
            continue
        plain = view.plain(name)
        if isinstance(thing, Tensor) and surgery.registered(view.model, name) is not thing:
            raise ManifestError(
                f"{plain!r} was cut and is now computed from other tensors (a parametrization or a mask), which "
                "load() could not follow; save the model before, or take it off"
            )
        size = surgery.size_of(view.model, (name, dim))
        if size != keep.numel():
            raise ManifestError(
                f"{plain!r} was cut to {keep.numel()} and is now {size}, so what was kept is not known; "
                "cut it with a Pruner only, or load() it from the file of a model that was"
            )
        found.original[plain, dim], found.positions[plain, dim] = past.original[name, dim], keep
    _explain(view, content, found)
    return found


def _explain(view: _View, content: _Content, past: surgery.History) -> None:
    """See that the numbers of layers agree with their tensors, today and in the original model.

    A bias that came later, when a batch-norm was fused into its layer, is as wide as its layer.

    Raises:
        ManifestError: they do not.
    """
    for path, module in view.model.named_modules():
        if not type(module).__module__.startswith("torch.nn."):
            continue
        prefix = f"{view.plain(path)}." if path else ""
        bias = prefix + "bias", 0
        for leaf in ("out_channels", "out_features"):
            width = prefix + leaf, 0
            if width in past.positions and isinstance(view.get(bias[0]), Tensor):
                past.original.setdefault(bias, past.original[width])
                past.positions.setdefault(bias, past.positions[width])
        for sizes in ({}, past.original):
            if what := widths.problem(module, *_sizes(view, module, prefix, sizes)):
                raise ManifestError(
                    f"the layer {prefix[:-1]!r} was narrowed without a note of what was kept ({what}), so load() "
                    "could not follow; load() the pruned model in place of load_state_dict(), or build it anew"
                )


def _sizes(view: _View, module: nn.Module, prefix: str, sizes: Mapping[Place, int]) -> tuple[Any, Any]:
    """Numbers and tensor shapes of a module where these places have these sizes; see `widths.problem`."""

    def number(leaf: str) -> Any:
        value = getattr(module, leaf)
        if isinstance(value, tuple):
            return tuple(sizes.get((prefix + leaf, i), n) for i, n in enumerate(value))
        return sizes.get((prefix + leaf, 0), value)

    def shape(leaf: str) -> tuple[int, ...] | None:
        value = view.get(prefix + leaf)
        return tuple(_original_shape(prefix + leaf, value, sizes)) if isinstance(value, Tensor) else None

    return number, shape


def _original_shape(name: str, tensor: Tensor, original: Mapping[Place, int]) -> list[int]:
    return [original.get((name, dim), size) for dim, size in enumerate(tensor.shape)]


# -------------------------------------------------------------------------------------------------- loading


def _check_form(meta: dict[str, Any]) -> None:
    """The description has the parts that `save` writes; what version 1 did not have is filled in.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it has not.
    """
    if meta.get("kind", "model") != "model":
        raise ValueError(f"it is of a {meta['kind']!r}, not of a model")
    meta.setdefault("extra", {})
    meta.setdefault("versions", {})
    str(meta["class"])
    for name, row in meta["tensors"].items():
        if len(row["shape"]) != len(row["original"]):
            raise ValueError(f"shapes of {name!r}")
        _check_numbers([*row["shape"], *row["original"]], f"shapes of {name!r}")
    places = set()
    for row in meta["kept"]:
        if type(row["tensor"]) is not str or type(row["dim"]) is not int:
            raise ValueError("a place without name or dimension")
        _check_numbers([row["original"], *row["kept"]], f"kept positions of {row['tensor']!r}")
        if (row["tensor"], row["dim"]) in places:
            raise ValueError(f"{row['tensor']!r} is cut twice")
        places.add((row["tensor"], row["dim"]))
    for alias, name in meta["aliases"].items():
        if name not in meta["tensors"]:
            raise ValueError(f"{alias!r} is tied to {name!r}, which is not there")
    _check_numbers(meta["versions"].values(), "versions")
    meta["extra"].keys()


def _check_numbers(values: Iterable[Any], what: str) -> None:
    if not all(type(n) is int and 0 <= n < 2**63 for n in values):
        raise ValueError(what)


def _check_fit(
    view: _View, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """The file is complete and was made from a model like this one.

    Raises:
        ManifestError: it is not; nothing was touched.
    """
    wanted = f"{path} was saved from {archive.short(meta['class'])} and does not fit this {_class_name(view.model)}"
    theirs = {*meta["tensors"], *meta["aliases"], *meta["extra"]}
    if missing := sorted(theirs - view.keys.keys()):
        raise ManifestError(f"{wanted}: the model has no {_some(missing)}")
    if missing := sorted(view.keys.keys() - theirs):
        raise ManifestError(f"{wanted}: the file has no {_some(missing)}")
    cut = {(row["tensor"], row["dim"]): len(row["kept"]) for row in meta["kept"]}
    for name in view.keys:
        if name not in meta["tensors"]:
            continue
        row, mine = meta["tensors"][name], view.get(name)
        shape, original = row["shape"], row["original"]
        if name not in tensors or list(tensors[name].shape) != shape:
            raise ManifestError(f"{path} is incomplete: {name!r} is missing or not of shape {shape}")
        if name.rpartition(".")[2] == "_extra_state":
            continue
        if not isinstance(mine, Tensor) or list(mine.shape) != original:
            found = list(mine.shape) if isinstance(mine, Tensor) else type(mine).__name__
            hint = ""
            if surgery.history(view.model).positions:
                hint = "; load into a fresh model, not a pruned one"
            raise ManifestError(f"{wanted}: {name!r} is {found}, the original was {original}{hint}")
        if shape != [cut.get((name, dim), size) for dim, size in enumerate(original)]:
            raise ManifestError(
                f"{path} is inconsistent: {name!r} is {shape}, but its kept positions say otherwise"
            )
    _check_ties(view, meta, tensors, wanted)
    _check_places(view, meta, wanted, path)
    _check_widths(view, cut, path)


def _check_ties(view: _View, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], wanted: str) -> None:
    """What is one tensor in the model has one value in the file."""
    first: dict[int, str] = {}
    for name, key in view.keys.items():
        if not isinstance(view.state[key], Tensor) or name in meta["extra"]:
            continue
        other = first.setdefault(id(view.state[key]), name)
        a, b = (tensors[meta["aliases"].get(each, each)] for each in (other, name))
        if a is not b and not (a.shape == b.shape and bool((a.eq(b) | (a.ne(a) & b.ne(b))).all())):
            raise ManifestError(f"{wanted}: {other!r} and {name!r} are one tensor in it, and two in the file")


def _check_places(view: _View, meta: Mapping[str, Any], wanted: str, path: str | os.PathLike[str]) -> None:
    """Kept positions are of places that surgery cuts, and fit them.

    Raises:
        ManifestError: they are not, or do not.
    """
    cut = _owners(
        row["tensor"] for row in meta["kept"] if row["tensor"].rpartition(".")[2] not in widths.ATTRIBUTES
    )
    filled = _owners(meta["tensors"])
    for row in meta["kept"]:
        name = row["tensor"]
        place = view.full(name), row["dim"]
        try:
            module, leaf = surgery.parent(view.model, place[0])
            if surgery.registered(view.model, place[0]) is None:
                owner = name.rpartition(".")[0]
                is_width = leaf in widths.ATTRIBUTES and leaf in module.__dict__
                if not is_width or (owner in filled and owner not in cut):
                    raise ManifestError(f"{path} would set {name!r}, which is no width that a removal cuts")
            size = surgery.size_of(view.model, place)
            surgery.check_positions(place, torch.tensor(row["kept"], dtype=torch.int64), row["original"])
        except SurgeryError as error:
            raise ManifestError(f"{wanted}: {error}") from error
        if size != row["original"]:
            raise ManifestError(f"{wanted}: {name!r} is {size}, the original was {row['original']}")


def _owners(names: Iterable[str]) -> set[str]:
    """The modules that these belong to, and the modules around those."""
    found: set[str] = set()
    for name in names:
        while name and (name := name.rpartition(".")[0]) not in found:
            found.add(name)
    return found


def _check_widths(view: _View, cut: Mapping[Place, int], path: str | os.PathLike[str]) -> None:
    """Layers whose numbers agree with their tensors still do so after the cut.

    Raises:
        ManifestError: they do not.
    """
    owners = {name.rpartition(".")[0] for name, _ in cut}
    for name, module in view.model.named_modules():
        layer = view.plain(name)
        prefix = f"{layer}." if layer else ""
        if layer in owners and not widths.problem(module, *_sizes(view, module, prefix, {})):
            what = widths.problem(module, *_sizes(view, module, prefix, cut))
            if what is None and isinstance(module, nn.GroupNorm):
                number, _ = _sizes(view, module, prefix, cut)
                if number("num_channels") * module.num_groups != module.num_channels * number("num_groups"):
                    what = "groups of channels would be of another size"
            if what:
                raise ManifestError(f"{path} is inconsistent: in the layer {layer!r}, {what}")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
