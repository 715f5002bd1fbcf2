"""Verification: every layer group is tried on the model before it is offered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from decay_pruning import surgery
from decay_pruning.errors import GraphError, SurgeryError
from decay_pruning.structures import Role, StructureSet


def demote(structures: StructureSet) -> StructureSet:
    """Inexact layer groups become unprunable."""
    inexact = {
        name: f"removal is not exact: {group.inexact} (allow_inexact=True prunes it all the same)"
        for name, group in structures.groups.items()
        if group.inexact is not None
    }
    groups = {name: group for name, group in structures.groups.items() if name not in inexact}
    return replace(structures, groups=groups, unprunable={**structures.unprunable, **inexact})


def verified(
    model: nn.Module, structures: StructureSet, example_inputs: Any, allow_inexact: bool
) -> StructureSet:
    """Try every layer group: what does not run becomes unprunable, what changes the output becomes inexact."""
    groups = dict(structures.groups)
    unprunable = dict(structures.unprunable)
    if not surgery.observe(model, example_inputs).finite:
        raise GraphError("the model's output on the example inputs is not finite; has the training diverged?")
    with _random_values(model, structures, example_inputs):
        for declared in (False, True) if allow_inexact else (False,):
            names = [
                name for name, group in structures.groups.items() if (group.inexact is not None) == declared
            ]
            for name, verdict in _failures(model, structures, names, example_inputs).items():
                if verdict.change is None:
                    unprunable[name] = (
                        f"removing a structure fails: {verdict.problem}{_hint(verdict.problem)}"
                    )
                    del groups[name]
                else:
                    groups[name] = replace(groups[name], inexact=verdict.problem)
    return replace(structures, groups=groups, unprunable=unprunable)


def _hint(problem: str | None) -> str:
    if problem and "is invalid for input of size" in problem:
        return "; if these are attention heads, give their number in heads={layer: number}"
    return ""


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
def _random_values(model: nn.Module, structures: StructureSet, example_inputs: Any) -> Iterator[None]:
    """Perturb all weights and running statistics for a while, so that no zero hides a wrong trace.

    A branch that starts at zero (γ = 0, LoRA, adaLN-zero) would make any removal in it look exact.
    """
    buffers = {
        c.tensor for group in structures.groups.values() for c in group.couplings if c.role is Role.BUFFER
    }
    tensors: list[Tensor] = [p for p in model.parameters() if p.is_floating_point()]
    tensors += [buffer for name, buffer in model.named_buffers() if name in buffers]
    saved = [(tensor, tensor.data) for tensor in tensors]
    generator = torch.Generator().manual_seed(0)
    try:
        for tensor, data in saved:
            tensor.data = _perturbed(data, generator)
        if not surgery.observe(
            model, example_inputs
        ).finite:  # overflow of a narrow dtype: the values as they are
            for tensor, data in saved:
                tensor.data = data
        yield
    finally:
        for tensor, data in saved:
            tensor.data = data


def _perturbed(data: Tensor, generator: torch.Generator) -> Tensor:
    """Every value scaled by 1 ± 0.2, and a zero tensor filled with small values. Signs stay (variances)."""
    noise = torch.empty(data.shape).uniform_(-0.2, 0.2, generator=generator).to(data.device, data.dtype)
    small = data.abs().mean() * 0.5 if bool(data.any()) else 0.1
    return torch.where(data == 0, noise * 5 * small, data * (1 + noise))
