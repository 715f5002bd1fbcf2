"""Fit: whether a file's description is whole, and was made from a model like this one. Nothing is touched."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decay_pruning import archive, surgery, widths
from decay_pruning.errors import ManifestError, SurgeryError
from decay_pruning.folds import Factor, Factors
from decay_pruning.state import View, class_name, sizes_of
from decay_pruning.structures import Place


def check_form(meta: dict[str, Any]) -> None:
    """The description has the parts that `save` writes; what version 1 did not have is filled in.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it has not.
    """
    if meta.get("kind", "model") != "model":
        raise ValueError(f"it is of a {meta['kind']!r}, not of a model")
    meta.setdefault("extra", {})
    meta.setdefault("versions", {})
    meta.setdefault("scaled", [])
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
    scaled(meta)
    for alias, name in meta["aliases"].items():
        if name not in meta["tensors"]:
            raise ValueError(f"{alias!r} is tied to {name!r}, which is not there")
    _check_numbers(meta["versions"].values(), "versions")
    meta["extra"].keys()


def scaled_rows(factors: Factors) -> list[dict[str, Any]]:
    """What removals multiplied, as `scaled` reads it; one number where all factors of a place are equal."""
    return [
        {
            "tensor": name,
            "dim": dim,
            "offset": factor.offset,
            "value": factor.value,
            "size": factor.values.numel(),
            "factors": [float(factor.values[0])]
            if bool((factor.values == factor.values[0]).all())
            else factor.values.tolist(),
        }
        for (name, dim), factor in sorted(factors.items(), key=lambda entry: entry[0])
    ]


def scaled(meta: Mapping[str, Any]) -> dict[Place, Factor]:
    """What removals multiplied, in original positions.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the description is damaged.
    """
    found: dict[Place, Factor] = {}
    for row in meta["scaled"]:
        what = f"factors of {row['tensor']!r}"
        _check_numbers([row["dim"], row["size"]], what)
        numbers = [row["offset"], *row["factors"], *([] if row["value"] is None else [row["value"]])]
        if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers) or min(numbers[1:]) <= 0:
            raise ValueError(what)
        values = torch.tensor(row["factors"], dtype=torch.float64)
        if values.numel() == 1:
            values = values.expand(row["size"])
        if (
            type(row["tensor"]) is not str
            or values.numel() != row["size"]
            or (row["tensor"], row["dim"]) in found
        ):
            raise ValueError(what)
        found[row["tensor"], row["dim"]] = Factor(values, float(row["offset"]), row["value"])
    return found


def _check_numbers(values: Iterable[Any], what: str) -> None:
    if not all(type(n) is int and 0 <= n < 2**63 for n in values):
        raise ValueError(what)


def check_fit(
    view: View, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """The file is complete and was made from a model like this one.

    Raises:
        ManifestError: it is not; nothing was touched.
    """
    wanted = (
        f"{path} was saved from {archive.short(meta['class'])} and does not fit this {class_name(view.model)}"
    )
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
            elif not meta["kept"]:
                hint = "; the file knows of no removal: a state dict alone, in narrow layers, tells of none"
            raise ManifestError(f"{wanted}: {name!r} is {found}, the original was {original}{hint}")
        if shape != [cut.get((name, dim), size) for dim, size in enumerate(original)]:
            raise ManifestError(
                f"{path} is inconsistent: {name!r} is {shape}, but its kept positions say otherwise"
            )
    _check_ties(view, meta, tensors, wanted)
    _check_scaled(view, meta, path)
    _check_places(view, meta, wanted, path)
    _check_widths(view, cut, path)


def _check_ties(view: View, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], wanted: str) -> None:
    """What is one tensor in the model has one value in the file."""
    first: dict[int, str] = {}
    for name, key in view.keys.items():
        if not isinstance(view.state[key], Tensor) or name in meta["extra"]:
            continue
        other = first.setdefault(id(view.state[key]), name)
        a, b = (tensors[meta["aliases"].get(each, each)] for each in (other, name))
        if a is not b and not (a.shape == b.shape and bool((a.eq(b) | (a.ne(a) & b.ne(b))).all())):
            raise ManifestError(f"{wanted}: {other!r} and {name!r} are one tensor in it, and two in the file")


def _check_scaled(view: View, meta: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Factors are of parameters, along a dimension, and of the numbers of norms beside them.

    Raises:
        ManifestError: they are not.
    """
    factors = scaled(meta)
    owners = {name.rpartition(".")[0] for name, _ in factors if isinstance(view.get(name), Tensor)}
    for (name, dim), factor in factors.items():
        thing, size = view.get(name), factor.values.numel()
        good = isinstance(thing, Tensor) and dim < thing.ndim and thing.shape[dim] == size
        if thing is None and name.rpartition(".")[0] in owners and (dim, size) == (0, 1):
            owner, _, leaf = view.full(name).rpartition(".")
            module = view.model.get_submodule(owner)
            number = vars(module).get(leaf)
            unset = number is None and isinstance(module, nn.RMSNorm) and leaf == "eps"
            good = type(number) is float or (unset and bool(factor.value))
        if not good:
            raise ManifestError(f"{path} would multiply {name!r}, which is nothing that a removal scales")


def _check_places(view: View, meta: Mapping[str, Any], wanted: str, path: str | os.PathLike[str]) -> None:
    """Kept positions are of places that surgery cuts, and fit them.

    Raises:
        ManifestError: they are not, or do not.
    """
    known = meta["tensors"].keys() | meta["aliases"].keys()
    cut = _owners(row["tensor"] for row in meta["kept"] if row["tensor"] in known)
    filled = _owners(meta["tensors"])
    for row in meta["kept"]:
        name = row["tensor"]
        place = view.full(name), row["dim"]
        try:
            module, leaf = surgery.parent(view.model, place[0])
            if surgery.registered(view.model, place[0]) is None:
                owner = name.rpartition(".")[0]
                beside = owner in cut or (leaf in widths.ATTRIBUTES and owner not in filled)
                if not widths.is_width(module, leaf) or not beside:
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


def _check_widths(view: View, cut: Mapping[Place, int], path: str | os.PathLike[str]) -> None:
    """Layers whose numbers agree with their tensors still do so after the cut.

    Raises:
        ManifestError: they do not.
    """
    owners = {name.rpartition(".")[0] for name, _ in cut}
    for name, module in view.model.named_modules():
        layer = view.plain(name)
        prefix = f"{layer}." if layer else ""
        if layer in owners and not widths.problem(module, *sizes_of(view, module, prefix, {})):
            what = widths.problem(module, *sizes_of(view, module, prefix, cut))
            if what is None and isinstance(module, nn.GroupNorm):
                number, _ = sizes_of(view, module, prefix, cut)
                if number("num_channels") * module.num_groups != module.num_channels * number("num_groups"):
                    what = "groups of channels would be of another size"
            if what:
                raise ManifestError(f"{path} is inconsistent: in the layer {layer!r}, {what}")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
