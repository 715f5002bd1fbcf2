"""State: what a model's file consists of, by the names that the model itself gives, without wrappers."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from decay_pruning.errors import ManifestError
from decay_pruning.structures import Place

#: Class → the child that it wraps, which alone counts.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of the wrappers around it."""
    while (child := _WRAPPERS.get(type(model).__name__)) in model._modules:
        model = model.get_submodule(str(child))
    return model


class View:
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
        """A name with the wrappers left out."""
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


def class_name(model: nn.Module) -> str:
    """With its module, for messages."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


@dataclass
class Content:
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
    def of(cls, view: View) -> Content:
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


def sizes_of(view: View, module: nn.Module, prefix: str, sizes: Mapping[Place, int]) -> tuple[Any, Any]:
    """Numbers and tensor shapes of a module where these places have these sizes; see `widths.problem`."""

    def number(leaf: str) -> Any:
        value = getattr(module, leaf)
        if isinstance(value, tuple):
            return tuple(sizes.get((prefix + leaf, i), n) for i, n in enumerate(value))
        return sizes.get((prefix + leaf, 0), value)

    def shape(leaf: str) -> tuple[int, ...] | None:
        value = view.get(prefix + leaf)
        return tuple(shape_with(prefix + leaf, value, sizes)) if isinstance(value, Tensor) else None

    return number, shape


def shape_with(name: str, tensor: Tensor, sizes: Mapping[Place, int]) -> list[int]:
    """The shape of a tensor where its places have these sizes; others are as they are."""
    return [sizes.get((name, dim), size) for dim, size in enumerate(tensor.shape)]
