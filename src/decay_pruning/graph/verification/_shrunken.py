"""A shrunken twin: a small copy of a model without values, with values of its own, on which removals can be tried.

Every width that was found is cut down to a handful of structures, and what is left of the weights is filled at random.
A layer group that was traced wrongly shows there as it would on the whole model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from decay_pruning import proof, surgery
from decay_pruning.folds import Scaled
from decay_pruning.structures import Picks, StructureSet

log = logging.getLogger(__name__)

#: Structures that the twin keeps of a layer group, in turn: widths that only a shape ties would pass if all were equal.
_KEPT = (7, 5, 9, 6, 8)
#: Parameters of the largest twin that is worth its memory and time.
_LARGEST = 30_000_000


@dataclass(frozen=True)
class Twin:
    """A small copy of a model.

    Attributes:
        model: the copy, with random values, on the CPU.
        structures: what is left of each layer group there.
        inputs: example inputs for it.
    """

    model: nn.Module
    structures: StructureSet
    inputs: Any


def twin(model: nn.Module, structures: StructureSet, example_inputs: Any) -> Twin | str:
    """The twin of a model, or why there is none, in words."""
    last = "nothing in it can be made smaller"
    # In double precision, so that no depth makes noise of rounding; where the code wants its own dtype, in that.
    for kept, wide in ((_KEPT, True), (_KEPT, False), ((8,), True), ((8,), False)):
        picks = _all_but(structures, kept)
        small = copied(model, without_value)
        try:
            surgery.shrink(small, structures.kept(picks))
            size = sum(p.numel() for p in small.parameters())
            if size > _LARGEST:
                return f"even the smallest twin of it has {size:,} parameters"
            full = copied(small, _Filled(wide))
            inputs = proof.mapped(example_inputs, partial(_input, wide=wide))
            proof.observe(full, inputs)
        except Exception as error:
            last = f"a small twin of it does not run ({proof.first_line(error)})"
            log.debug("no shrunken twin: %s", last, exc_info=True)
            continue
        left = structures.without(picks)
        return Twin(full, _in_double(left) if wide else left, inputs)
    return last


def _in_double(structures: StructureSet) -> StructureSet:
    """With what the model takes in double precision where no ε is given."""
    epsilon = torch.finfo(torch.float64).eps

    def scaled(each: Scaled) -> Scaled:
        return each if each.value is None else replace(each, value=epsilon)

    folds = tuple(replace(fold, scaled=tuple(map(scaled, fold.scaled))) for fold in structures.folds)
    return replace(structures, folds=folds)


def copied(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model with other tensors in the place of its own; what is tied stays tied.

    Raises:
        TypeError: a part of it keeps its tensors to itself.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("a script cannot be copied with other tensors")
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = [value for value in vars(module).values() if isinstance(value, Tensor) and value.is_meta]
        for value in (*module._parameters.values(), *module._buffers.values(), *own):
            if value is not None and id(value) not in memo:
                new = change(value)
                wanted = isinstance(value, nn.Parameter)
                memo[id(value)] = nn.Parameter(new, value.requires_grad) if wanted else new
    found: nn.Module = copy.deepcopy(model, memo)
    return found


def _all_but(structures: StructureSet, kept: tuple[int, ...]) -> Picks:
    """Structures to take away: those that stay are spread over each layer group."""
    picks = {}
    for k, (name, group) in enumerate(structures.groups.items()):
        stay = min(len(group), kept[k % len(kept)])
        rows = {j * len(group) // stay for j in range(stay)}
        picks[name] = [i for row, i in enumerate(group.ids.tolist()) if row not in rows]
    return {name: ids for name, ids in picks.items() if ids}


def without_value(tensor: Tensor) -> Tensor:
    """A tensor on the meta device in the place of a parameter or a statistic; positions and masks stay."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.layout != torch.strided:
        return torch.empty_like(tensor, device="meta")
    return tensor.detach().clone()


class _Filled:
    """Random values in the place of none: of a size at which signals neither die nor explode, none of them zero."""

    def __init__(self, wide: bool) -> None:
        self._generator, self._wide = torch.Generator().manual_seed(0), wide

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return _as_wide(tensor, self._wide).detach().clone()
        new = torch.empty(tensor.shape)
        if not tensor.is_floating_point():
            return torch.full(tensor.shape, tensor.dtype == torch.bool, dtype=tensor.dtype)
        if tensor.ndim > 1:
            new.normal_(0, (new[0].numel() or 1) ** -0.5, generator=self._generator)
        else:  # norms, biases, running variances
            new.uniform_(0.5, 1.5, generator=self._generator)
        return new.to(torch.float64 if self._wide else tensor.dtype)


def _as_wide(tensor: Tensor, wide: bool) -> Tensor:
    return tensor.double() if wide and tensor.is_floating_point() else tensor


def _input(tensor: Tensor, wide: bool) -> Tensor:
    if not tensor.is_meta:
        return _as_wide(tensor, wide)
    generator = torch.Generator().manual_seed(0)
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator).to(torch.float64 if wide else tensor.dtype)
    return torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.dtype)
