"""importance="activation": the mean |input| of what reads a structure, over the batches that it is trained on."""

import copy

import pytest
import torch
from torch import nn

from decay_pruning import ConfigError, DepGraph, Pruner, SmoothPruning
from decay_pruning.graph import Graph
from decay_pruning.hosts.activations import Activations

from .registry import build_model, example, start


def seen_by(model, x, structures):
    """Reads a few batches as training does."""
    found = Activations()
    found.attach(model, structures)
    for each in x:
        model(each)
    found.detach()
    return found


def test_it_is_the_mean_of_what_the_reader_gets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    structures = Graph(model, torch.randn(2, 6)).structures
    x = torch.randn(32, 6)
    found = seen_by(model, [x], structures)
    (group,) = structures.groups.values()
    assert torch.allclose(found.score(model, group), model[1](model[0](x)).abs().mean(0).detach())


@pytest.mark.parametrize("width", [(2, 6, 9), (3, 6, 5, 5)], ids=["1-d", "2-d"])
def test_channels_of_convolutions_and_what_is_flattened(width):
    torch.manual_seed(0)
    d = len(width) - 2
    conv = {1: nn.Conv1d, 2: nn.Conv2d}[d]
    x = torch.randn(width)
    size = width[2] ** d
    model = nn.Sequential(conv(6, 8, 1), nn.ReLU(), conv(8, 4, 1), nn.Flatten(), nn.Linear(4 * size, 2))
    structures = Graph(model, x).structures
    found = seen_by(model, [x], structures)
    hidden = model[1](model[0](x))
    flat = model[2](hidden)
    dims = [k for k in range(x.ndim) if k != 1]
    first, second = structures.groups.values()
    assert torch.allclose(found.score(model, first), hidden.abs().mean(dims).detach())
    assert torch.allclose(found.score(model, second), flat.abs().mean(dims).detach(), atol=1e-6)


def test_evaluation_and_proofs_are_not_counted():
    model = build_model("residual")
    structures = Graph(model, example()).structures
    found = Activations()
    found.attach(model, structures)
    model.eval()(example())
    with torch.no_grad():
        model.train()(example())
    Graph(model, example())
    assert not found.ready
    model(torch.randn(4, 3, 8, 8))
    assert found.ready


def test_what_is_silent_goes_first():
    """A channel that a bias keeps below zero says nothing, however large its weights are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    with torch.no_grad():
        model[0].weight[3] *= 10
        model[0].bias[3] = -1e3
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    host = DepGraph(importance="activation")
    pruner = Pruner(model, torch.randn(1, 6), optimizer, 0.88, host=host, smooth=SmoothPruning(steps=2))
    for _ in range(4):
        model(torch.randn(16, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.finish().removed == 1
    assert model[0].bias.min() > -10


def test_a_plan_before_any_batch_says_so_and_hooks_go_with_the_pruner():
    run = start("residual", "depgraph", "sp", host=DepGraph(importance="activation"))
    with pytest.raises(ConfigError, match="needs batches"):
        run.pruner.plan()
    run.step()
    for _ in range(8):
        run.step()
    run.pruner.finish()
    assert not any(module._forward_pre_hooks for module in run.model.modules())


def test_resume():
    host = DepGraph(importance="activation", rounds=2, interval=2)
    run = start("residual", "depgraph", "sp", host=host)
    for _ in range(6):
        run.step()
    parts = run.pruner, run.model, run.optimizer
    states = copy.deepcopy([part.state_dict() for part in parts])
    again = start("residual", "depgraph", "sp", host=host)
    for part, state in zip((again.pruner, again.model, again.optimizer), states, strict=True):
        part.load_state_dict(state)
    for _ in range(6):
        next(again.batches)
    for _ in range(10):
        run.step()
        again.step()
    assert run.pruner.finish() == again.pruner.finish()
    for (name, a), b in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
