"""Manifest: a pruned model in one safetensors file, without pickle.

The file holds the weights; its metadata says, for every tensor, which shape it had in the original model and which
positions were kept. `load` cuts a fresh model of the original class to these positions and fills it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from decay_pruning import surgery
from decay_pruning.errors import ManifestError, SurgeryError
from decay_pruning.structures import Place

FORMAT = "decay-pruning"
VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's weights, original shapes and kept positions. The file appears whole or not at all.

    Args:
        model: a model that `surgery` has cut, or an unpruned one.
        path: the file; its folder must exist.

    Raises:
        ManifestError: the model's state holds something other than tensors, or the file cannot be written.
    """
    tensors, aliases = _distinct(model)
    past = surgery.history(model)
    meta = {
        "class": _class_name(model),
        "tensors": {
            name: {"shape": list(t.shape), "original": _original_shape(name, t, past.original)}
            for name, t in tensors.items()
        },
        "aliases": aliases,
        "kept": past.state_dict(),
    }
    header = {"format": FORMAT, "version": str(VERSION), "manifest": json.dumps(meta)}
    target = Path(path)
    try:
        handle, scratch = tempfile.mkstemp(prefix=target.name, suffix=".tmp", dir=target.parent)
        os.close(handle)
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch, header)
            with open(scratch, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(scratch, 0o666 & ~_umask())
            os.replace(scratch, target)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as error:
        raise ManifestError(f"cannot write {target}: {error.strerror or error}") from error


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Cut a fresh model of the original class to the saved shape and fill in the saved weights, in place.

    Args:
        model: a model built like the original one, before pruning; on any device.
        path: a file that `save` wrote.

    Returns:
        The same model.

    Raises:
        ManifestError: the file is missing, truncated, foreign or newer, or does not fit; the model is as it was.
    """
    meta, tensors = _read(Path(path))
    _check_fit(model, meta, tensors, path)
    past = surgery.History()
    past.load_state_dict(meta["kept"])
    state = {**tensors, **{alias: tensors[name] for alias, name in meta["aliases"].items()}}
    try:
        undo = surgery.shrink(model, past.positions)
    except SurgeryError as error:
        raise ManifestError(f"{path} does not fit this model: {error}") from error
    try:
        model.load_state_dict(state)
    except Exception as error:
        undo()
        raise ManifestError(f"{path} does not fit this model: {error}") from error
    return model


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State tensors, each object once, and the further names of tied ones (alias → name)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ManifestError(
                f"{name!r} in the model's state is a {type(value).__name__}, and only tensors are saved"
            )
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value
    return tensors, aliases


def _original_shape(name: str, tensor: Tensor, original: Mapping[Place, int]) -> list[int]:
    return [original.get((name, dim), size) for dim, size in enumerate(tensor.shape)]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and all tensors of a file.

    Raises:
        ManifestError: see `load`.
    """
    if not path.is_file():
        raise ManifestError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ManifestError(f"{path} is truncated or no safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise ManifestError(f"{path} was not written by decay-pruning (a plain safetensors file?)")
    if header.get("version") != str(VERSION):
        raise ManifestError(
            f"{path} has format version {header.get('version')}, this library reads {VERSION}; update decay-pruning"
        )
    try:
        meta = json.loads(header["manifest"])
        _check_form(meta)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"{path} has a damaged description: {error}") from error
    return meta, tensors


def _check_form(meta: Any) -> None:
    """The description has the parts that `save` writes.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it has not.
    """
    str(meta["class"])
    for name, row in meta["tensors"].items():
        if len(row["shape"]) != len(row["original"]) or not all(
            isinstance(n, int) for n in [*row["shape"], *row["original"]]
        ):
            raise ValueError(f"shapes of {name!r}")
    for row in meta["kept"]:
        if not isinstance(row["tensor"], str) or not isinstance(row["dim"], int):
            raise ValueError("a place without name or dimension")
        if not all(isinstance(n, int) for n in [row["original"], *row["kept"]]):
            raise ValueError(f"kept positions of {row['tensor']!r}")
    for alias, name in meta["aliases"].items():
        if name not in meta["tensors"]:
            raise ValueError(f"{alias!r} is tied to {name!r}, which is not there")


def _check_fit(
    model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """The file is complete and was made from a model like this one.

    Raises:
        ManifestError: it is not; nothing was touched.
    """
    wanted = f"{path} was saved from {meta['class']} and does not fit this {_class_name(model)}"
    mine = model.state_dict(keep_vars=True)
    theirs = {*meta["tensors"], *meta["aliases"]}
    if missing := sorted(theirs - mine.keys()):
        raise ManifestError(f"{wanted}: the model has no {_some(missing)}")
    if missing := sorted(mine.keys() - theirs):
        raise ManifestError(f"{wanted}: the file has no {_some(missing)}")
    cut = {(row["tensor"], row["dim"]): len(row["kept"]) for row in meta["kept"]}
    for name, row in meta["tensors"].items():
        shape, original = row["shape"], row["original"]
        if list(mine[name].shape) != original:
            hint = "; load into a fresh model, not a pruned one" if surgery.history(model).positions else ""
            raise ManifestError(
                f"{wanted}: {name!r} is {list(mine[name].shape)}, the original was {original}{hint}"
            )
        if name not in tensors or list(tensors[name].shape) != shape:
            raise ManifestError(f"{path} is incomplete: {name!r} is missing or not of shape {shape}")
        if shape != [cut.get((name, dim), size) for dim, size in enumerate(original)]:
            raise ManifestError(
                f"{path} is inconsistent: {name!r} is {shape}, but its kept positions say otherwise"
            )
    for row in meta["kept"]:
        place = row["tensor"], row["dim"]
        try:
            size = surgery.size_of(model, place)
            surgery.check_positions(place, torch.tensor(row["kept"], dtype=torch.int64), row["original"])
        except SurgeryError as error:
            raise ManifestError(f"{wanted}: {error}") from error
        if size != row["original"]:
            raise ManifestError(f"{wanted}: {row['tensor']!r} is {size}, the original was {row['original']}")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
