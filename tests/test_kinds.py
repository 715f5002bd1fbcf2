"""Networks of every kind, half of all structures away: what is left is the same function, or the reason says why."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_pruning import Pruner, SmoothPruning, Target, load, measure, proof, save, surgery
from decay_pruning.errors import GraphError
from decay_pruning.graph import Graph
from decay_pruning.graph._reasons import OUTPUT
from decay_pruning.structures import Picks, Role, StructureSet
from tests.kinds import KINDS, Kind, maps, tokens, traps, weights  # noqa: F401
from tests.nets import Net, lively


def built(kind: Kind) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, x = kind.build()
    return lively(model).double(), proof.mapped(x, lambda t: t.double() if t.is_floating_point() else t)


def halves(structures: Any) -> Picks:
    return {
        name: group.ids[::2].tolist()[: max(1, len(group) // 2)] for name, group in structures.groups.items()
    }


def scattered(full: nn.Module, pruned: nn.Module, structures: StructureSet) -> None:
    """Put the weights that are left back at their old places, zeros elsewhere.

    Not along the rows of what is divided by its own norm: there the length is zero.
    """
    whole = surgery.history(pruned)
    past = whole.positions
    new = dict(pruned.named_parameters()) | dict(pruned.named_buffers())
    cut = (c for group in structures.groups.values() for c in group.couplings)
    rows = {c.place for c in cut if c.role is Role.BUFFER}
    for name, tensor in [*full.named_parameters(), *full.named_buffers()]:
        if not any(place[0] == name for place in past):
            tensor.data = new[name].data
            continue
        mine = new[name].data.clone()
        for (other, d), factor in whole.factors.items():  # what the removal multiplied
            if other == name:
                values = factor.values[past.get((name, d), torch.arange(factor.values.numel()))]
                shape = [-1 if k == d else 1 for k in range(mine.ndim)]
                mine = (mine + factor.offset) / values.view(shape) - factor.offset
        kept = [past.get((name, d), torch.arange(n)) for d, n in enumerate(tensor.shape)]
        data = tensor.data.clone()
        for d, keep in enumerate(kept):
            if (name, d) not in rows:
                gone = torch.ones(tensor.shape[d]).index_fill_(0, keep, 0).nonzero().flatten()
                data.index_fill_(d, gone, 0)
        data[torch.meshgrid(*kept, indexing="ij") if kept else ...] = mine
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
    found: list[Any] = [
        (n, id(t), t.to_dense().tolist(), t.requires_grad, t.grad is None) for n, t in tensors
    ]
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


def test_experts_in_one_product_are_cut_in_steps_that_it_takes() -> None:
    """`torch._grouped_mm` wants rows that start at multiples of 16 bytes."""
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped product")

    def run(m: Net, x: Tensor) -> Tensor:
        ends = torch.tensor([5, 9, 16], dtype=torch.int32)
        gate, up = torch._grouped_mm(m.enter(x), m.up.mT, offs=ends).chunk(2, -1)
        return m.out(torch._grouped_mm(gate.sigmoid() * up, m.down, offs=ends))

    torch.manual_seed(0)
    up, down = nn.Parameter(torch.randn(3, 48, 16) / 4), nn.Parameter(torch.randn(3, 24, 16) / 4)
    model = Net(run, enter=nn.Linear(5, 16), up=up, down=down, out=nn.Linear(16, 2))
    x = torch.randn(16, 5)
    structures = Graph(model, x).structures
    assert {name: len(group) for name, group in structures.groups.items()} == {"up": 3, "enter": 2, "down": 2}
    picks = {"up": [1], "enter": [0], "down": [1]}
    surgery.zero_(model, structures, picks)
    before = model(x)
    surgery.remove(model, structures, picks, example_inputs=x)
    assert model.up.shape == (3, 32, 8) and model.down.shape == (3, 16, 8)
    assert torch.allclose(before, model(x), atol=1e-6)


class ByHand(nn.Linear):
    """Mean and deviation over what goes in."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5)
        return F.linear(x, w, self.bias)


class ByBatchNorm(nn.Linear):
    """The same by batch_norm on a reshaped weight, with a gain."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.gain = nn.Parameter(torch.rand(o, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.view(1, len(self.weight), -1)
        w = F.batch_norm(flat, None, None, weight=self.gain.view(-1), training=True, momentum=0.0)
        return F.linear(x, w.view_as(self.weight), self.bias)


@pytest.mark.parametrize("layer", [ByHand, ByBatchNorm])
def test_what_goes_into_a_standardised_weight_is_inexact_by_nature_and_proven_so(layer: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), layer(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    exact = Graph(model, x).structures
    assert set(exact.groups) == {"2"} and f"{layer.__name__} '2' normalises over" in exact.unprunable["0"]
    structures = Graph(model, x, allow_inexact=True).structures
    assert set(structures.groups) == {"0", "2"}
    twin = layer(5, 6).double()
    state = model[2].state_dict()
    twin.load_state_dict({**state, "weight": state["weight"][:, [0, 2, 3, 6, 7]]})
    hidden = model[1](model[0](x))[:, [0, 2, 3, 6, 7]]
    expected = model[4](twin(hidden).relu())
    surgery.remove(model, structures, {"0": [1, 4, 5]}, example_inputs=x)
    assert torch.allclose(model(x), expected, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*flex_attention")
def test_flexible_attention_is_attention() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention

    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
        return m.out(flex(q, k, v, scale=0.4).transpose(1, 2).flatten(2))

    model = Net(run, **{name: nn.Linear(6, 12) for name in "qkv"}, out=nn.Linear(12, 2))
    structures = Graph(model, torch.randn(2, 5, 6)).structures
    assert {name: len(group) for name, group in structures.groups.items()} == {"q": 3}


#: A few whose weights are computed, or that carry numbers of their own.
TRAINED = (
    *(
        "Mamba",
        "own linear",
        "three factors",
        "DoRA",
        "weight norm",
        "experts: a list",
        "flat table",
        "TorchScript",
    ),
    *("split attention", "parametrization", "masks", "three widths", "(T5)", "forward writes"),
)


@pytest.mark.parametrize(
    "name", [n for n, k in KINDS.items() if k.groups and any(each in n for each in TRAINED)]
)
def test_training_goes_on_and_the_file_comes_back(name: str, tmp_path: Path) -> None:
    (model, x), (fresh, _) = built(KINDS[name]), built(KINDS[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    pruner = Pruner(model, x, optimizer, Target(structures=0.6), smooth=SmoothPruning(steps=2), total_steps=6)
    for _ in range(6):
        model.train()
        optimizer.zero_grad()
        sum(leaf.square().mean() for leaf in proof.leaves(proof.call(model, proof.copied(x)))).backward()  # type: ignore[union-attr]
        optimizer.step()
    pruner.finish()
    save(model, tmp_path / "model.safetensors")
    load(fresh, tmp_path / "model.safetensors")
    for a, b in zip(outputs(model, x, False), outputs(fresh, x, False), strict=True):
        assert torch.equal(a, b)
