"""Networks of every kind, half of all structures away: what is left is the function that it was, or the reason says why."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from decay_pruning import measure, proof, surgery
from decay_pruning.errors import GraphError
from decay_pruning.graph import Graph
from decay_pruning.graph._reasons import OUTPUT
from decay_pruning.structures import Picks, Role, StructureSet
from tests.kinds import KINDS, Kind, maps, tokens, traps, weights  # noqa: F401
from tests.nets import lively


def built(kind: Kind) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, x = kind.build()
    return lively(model).double(), proof.mapped(x, lambda t: t.double() if t.is_floating_point() else t)


def halves(structures: Any) -> Picks:
    return {name: group.ids[::2].tolist()[: max(1, len(group) // 2)] for name, group in structures.groups.items()}


def scattered(full: nn.Module, pruned: nn.Module, structures: StructureSet) -> None:
    """Put the weights that are left back at their old places, zeros elsewhere.

    Not along the rows of what is divided by its own norm: there the length is zero.
    """
    past = surgery.history(pruned).positions
    new = dict(pruned.named_parameters()) | dict(pruned.named_buffers())
    cut = (c for group in structures.groups.values() for c in group.couplings)
    rows = {c.place for c in cut if c.role is Role.BUFFER}
    for name, tensor in [*full.named_parameters(), *full.named_buffers()]:
        kept = [past.get((name, d), torch.arange(n)) for d, n in enumerate(tensor.shape)]
        data = tensor.data.clone()
        for d, keep in enumerate(kept):
            if (name, d) not in rows:
                gone = torch.ones(tensor.shape[d]).index_fill_(0, keep, 0).nonzero().flatten()
                data.index_fill_(d, gone, 0)
        data[torch.meshgrid(*kept, indexing="ij") if kept else ...] = new[name].data
        tensor.data = data


def outputs(model: nn.Module, x: Any, training: bool) -> list[Tensor]:
    with proof.untouched(model), torch.no_grad():
        for module in model.modules():
            module.training = training
        torch.manual_seed(0)
        return [leaf for leaf in proof.leaves(proof.call(model, x)) if leaf.is_floating_point()]


def parting(kind: Kind) -> str:
    """Where the smaller model and the full one with the same weights part, in words."""
    (model, x), (full, _) = built(kind), built(kind)
    structures = Graph(model, x, **kind.options).structures
    surgery.remove(model, structures, halves(structures), example_inputs=x)
    scattered(full, model, structures)
    for training in (False, True):
        for seed in (3, 4):
            unseen = proof.random_inputs(x, seed)
            pairs = zip(outputs(full, unseen, training), outputs(model, unseen, training), strict=True)
            for k, (a, b) in enumerate(pairs):
                if a.shape != b.shape or not (a - b).abs().max() <= 1e-10 * a.abs().max():
                    return f"output {k}, {training=}: {a.flatten()[:4]} and {b.flatten()[:4]}"
    return ""


def looked_at(kind: Kind) -> tuple[dict[str, int], dict[str, str]]:
    """Layer groups with their numbers of structures, and the other layers with the reason."""
    try:
        found = Graph(*built(kind), **kind.options).structures
        groups, told = {name: len(group) for name, group in found.groups.items()}, dict(found.unprunable)
    except GraphError as error:
        first, *lines = str(error).splitlines()
        assert first.startswith("nothing in this model can be pruned"), first
        groups, told = {}, dict(line.strip().split(": ", 1) for line in lines)
    return groups, {name: why for name, why in told.items() if why != OUTPUT}


@pytest.mark.parametrize("name", KINDS)
def test_what_can_go_is_offered_and_the_rest_says_why(name: str) -> None:
    groups, told = looked_at(KINDS[name])
    assert groups == KINDS[name].groups, told
    assert told.keys() == KINDS[name].refused.keys()
    assert not [why for layer, why in told.items() if KINDS[name].refused[layer] not in why]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.groups])
def test_half_of_every_layer_group_goes_exactly(name: str) -> None:
    assert not parting(KINDS[name])


def everything(model: nn.Module) -> list[Any]:
    """What building a pruner could change: values, identities, modes, attributes, lists, what is drawn next."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found: list[Any] = [(name, id(t), t.tolist(), t.requires_grad, t.grad is None) for name, t in tensors]
    for module in model.modules():
        for key, value in module.__dict__.items():
            if isinstance(value, Tensor):
                found.append((key, id(value), value.tolist()))
            elif isinstance(value, list | dict | set):
                found.append((key, id(value), len(value)))
            elif isinstance(value, int | float | str | bool | torch.Generator):
                state = value.get_state().tolist() if isinstance(value, torch.Generator) else value
                found.append((key, state))
    return [*found, torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


@pytest.mark.parametrize("name", KINDS)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, x = built(KINDS[name])
    before, given = everything(model), [leaf.clone() for leaf in proof.leaves(x)]
    with suppress(GraphError):
        Graph(model, x, **KINDS[name].options)
    measure(model, x)
    assert everything(model) == before
    assert all(map(torch.equal, given, proof.leaves(x)))
