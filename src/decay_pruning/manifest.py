"""Manifest: a pruned model in one safetensors file, without pickle.

The file holds the weights; its description says, for every tensor, which shape it had in the original model and which
positions were kept. `load` cuts a fresh model of the original class to these positions and fills it. Names are those
of the model itself: wrappers (`torch.compile`, data parallelism) around it or inside it are looked through.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from decay_pruning import archive, fit, surgery, widths
from decay_pruning.errors import ManifestError, SurgeryError
from decay_pruning.state import Content, View, class_name, shape_with, sizes_of, unwrapped


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
    inner = unwrapped(model)
    _check_plain(inner)
    view = View(inner)
    content = Content.of(view)
    past = _history(view, content)
    description: dict[str, Any] = {
        "kind": "model",
        "class": class_name(inner),
        "tensors": {
            name: {"shape": list(t.shape), "original": shape_with(name, t, past.original)}
            for name, t in content.tensors.items()
        },
        "aliases": content.aliases,
        "extra": content.extra,
        "versions": content.versions,
        "kept": past.state_dict(),
    }
    if past.factors:
        description["scaled"] = fit.scaled_rows(past.factors)
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
        fit.check_form(meta)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"{path} has a damaged description: {error}") from error
    inner = unwrapped(model)
    view = View(inner)
    fit.check_fit(view, meta, tensors, path)
    kept = {
        (view.full(row["tensor"]), row["dim"]): torch.tensor(row["kept"], dtype=torch.int64)
        for row in meta["kept"]
    }
    before = view.copied()
    scaled = {(view.full(name), dim): factor for (name, dim), factor in fit.scaled(meta).items()}
    try:
        undo = surgery.shrink(inner, kept, scaled=scaled)
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


def _history(view: View, content: Content) -> surgery.History:
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
    for (name, dim), factor in past.factors.items():
        with suppress(SurgeryError):  # a layer that was fused into another one
            thing = surgery.lookup(view.model, name)
            if isinstance(thing, float) or surgery.registered(view.model, name) is thing is not None:
                found.factors[view.plain(name), dim] = factor
    _explain(view, content, found)
    return found


def _explain(view: View, content: Content, past: surgery.History) -> None:
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
            if what := widths.problem(module, *sizes_of(view, module, prefix, sizes)):
                raise ManifestError(
                    f"the layer {prefix[:-1]!r} was narrowed without a note of what was kept ({what}), so load() "
                    "could not follow; load() the pruned model in place of load_state_dict(), or build it anew"
                )
