"""Copies of a model that live beside it, averages above all, and how they follow its cuts."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from decay_pruning import surgery
from decay_pruning.errors import ConfigError, SurgeryError
from decay_pruning.structures import Place

logger = logging.getLogger("decay_pruning")


def prune_like(copy: nn.Module | MutableMapping[str, Any], model: nn.Module) -> None:
    """Cut a copy of a model as the model has been cut: the same structures, wherever the copy was left behind.

    Args:
        copy: a model with the same names (an average, a momentum encoder, or a fresh one of the original shapes), or a
            state dict of the original shapes, whose tensors are replaced.
        model: the model that has been pruned, as a whole.

    Raises:
        SurgeryError: the copy has other names or shapes than the model had, or other cuts; the copy is as it was.
    """
    if isinstance(copy, nn.Module):
        _cut_module(copy, model)
    else:
        copy.update(_cut_tensors(copy, model))


def _cut_module(copy: nn.Module, model: nn.Module) -> None:
    kept: dict[Place, Tensor] = {}
    theirs, own = surgery.history(model), surgery.history(copy)
    for place, left in theirs.positions.items():
        here = own.positions.get(place, torch.arange(theirs.original[place]))
        size = surgery.size_of(copy, place)
        at = torch.searchsorted(here, left)
        if size != here.numel() or bool((here[at.clamp(max=size - 1)] != left).any()):
            raise SurgeryError(
                f"{place[0]!r} has size {size} along dimension {place[1]} in the copy, and it is not known which of "
                "the model's structures these are; give a copy that was made before the pruning, or while it went on"
            )
        if left.numel() < size:
            kept[place] = at
    if kept:
        surgery.shrink(copy, kept)


def _cut_tensors(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state dict that are cut, as they will be."""
    history, cut = surgery.history(model), dict[str, Tensor]()
    names = model.state_dict().keys()
    for (name, dim), left in history.positions.items():
        if name not in names:
            continue  # an attribute of a module
        tensor, original = cut.get(name, state.get(name)), history.original[name, dim]
        if not isinstance(tensor, Tensor):
            raise SurgeryError(
                f"the state dict has no tensor {name!r}, which was pruned; it is of another model"
            )
        if tensor.dim() <= dim or tensor.shape[dim] != original:
            raise SurgeryError(
                f"{name!r} is of shape {tuple(tensor.shape)} in the state dict, and the model had {original} along "
                f"dimension {dim} before it was pruned; give a state dict that was made before the pruning"
            )
        cut[name] = tensor.index_select(dim, left.to(tensor.device))
    return cut


def given(copies: Iterable[Any], model: nn.Module) -> list[nn.Module]:
    """The modules of which the parameters correspond to the model's: each copy itself, or its `module` or `ema`.

    Raises:
        ConfigError: a copy has no such module.
    """
    found = []
    for each in copies:
        inside = [each, getattr(each, "module", None), getattr(each, "ema", None)]
        alike = [m for m in inside if isinstance(m, nn.Module) and _alike(m, model)]
        if not alike:
            raise ConfigError(
                f"also: {type(each).__name__} is no copy of the model: its parameters have other names or shapes"
            )
        found.append(alike[0])
    return found


def let_averages_follow(model: nn.Module) -> None:
    """Averages (`AveragedModel`) of this model are cut when they are updated from it for the next time.

    An average does not know what it is an average of before that, and another model of the same shape may have one.
    """
    names = {name for name, _ in model.named_parameters()}
    for each in [o for o in gc.get_objects() if type(o) is AveragedModel]:
        waits = isinstance(vars(each).get("update_parameters"), partial)
        if not waits and {name for name, _ in each.module.named_parameters()} == names:
            object.__setattr__(each, "update_parameters", partial(_update, each))


def _update(average: AveragedModel, model: nn.Module) -> None:
    if surgery.history(model).positions:
        prune_like(average.module, model)
        logger.info("the average of %s follows its cuts", type(model).__name__)
    del average.__dict__["update_parameters"]
    average.update_parameters(model)


def _alike(copy: nn.Module, model: nn.Module) -> bool:
    theirs = {name: p.shape for name, p in model.named_parameters()}
    return bool(theirs) and {name: p.shape for name, p in copy.named_parameters()} == theirs
