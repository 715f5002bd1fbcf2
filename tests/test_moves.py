"""What happens to model, optimizer and pruner in the middle of a decay: it works, or says at once what to do."""

import copy
import pickle

import pytest
import torch
from torch import nn

from decay_pruning import ConfigError, DepGraph, Pruner, SelfRectifying, SmoothPruning, save

from .registry import batches, build_model, example


def ready(**options):
    model = build_model("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = {"smooth": SmoothPruning(steps=6), "rectify": SelfRectifying(), "total_steps": 40} | options
    return model, optimizer, Pruner(model, example(), optimizer, 0.6, **settings)


def steps(model, optimizer, count, dtype=torch.float32, stream=None):
    stream = stream or batches(1)
    for _ in range(count):
        x, y = next(stream)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(dtype)).float(), y).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype(dtype, tmp_path):
    model, optimizer, pruner = ready()
    steps(model, optimizer, 3)
    model.to(dtype)
    steps(model, optimizer, 9, dtype)
    report = pruner.finish()
    assert report.removed > 0 and report.macs[1] <= 0.6 * report.macs[0]
    assert all(p.dtype == dtype for p in model.parameters())
    save(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to("meta"),
        lambda model: setattr(model.conv2, "weight", nn.Parameter(model.conv2.weight.detach().clone())),
        lambda model: setattr(model, "conv2", copy.deepcopy(model.conv2)),
        lambda model: setattr(model, "fc", nn.Linear(model.fc.in_features, 7)),
    ],
    ids=["meta device", "new weight", "new layer", "new head"],
)
def test_other_parameters(change):
    model, optimizer, _ = ready()
    steps(model, optimizer, 3)
    change(model)
    with pytest.raises(ConfigError, match=r"is not what it was when the pruner was built.*build another"):
        optimizer.step()
    optimizer.step()  # said once, and then it lets go


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda pruner: copy.deepcopy([pruner.model, pruner])],
)
def test_a_pruner_is_not_copied_by_halves(duplicate):
    model, optimizer, pruner = ready()
    steps(model, optimizer, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"save pruner\.state_dict\(\)"):
        duplicate(pruner)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    steps(model, optimizer, 9)
    assert pruner.finish().removed > 0


def test_a_copy_of_the_model_is_free():
    model, optimizer, pruner = ready()
    steps(model, optimizer, 3)
    other = copy.deepcopy(model)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    steps(other, theirs, 2)
    steps(model, optimizer, 9)
    assert pruner.finish().removed > 0
    assert [p.shape for p in other.parameters()] == [p.shape for p in build_model("residual").parameters()]


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_one_pruner_at_a_time(end):
    model, optimizer, pruner = ready()
    steps(model, optimizer, 2)
    with pytest.raises(ConfigError, match=r"another pruner is at work.*cancel\(\)"):
        Pruner(model, example(), optimizer, 0.5, smooth=SmoothPruning(steps=3))
    if end == "finish":
        steps(model, optimizer, 10)
    getattr(pruner, end)()
    again = Pruner(model, example(), optimizer, 0.5, smooth=SmoothPruning(steps=3))
    steps(model, optimizer, 6)
    assert again.finish().removed > 0


def test_a_pruner_that_could_not_be_built_claims_nothing():
    model = build_model("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ConfigError):
        Pruner(
            model,
            example(),
            optimizer,
            0.6,
            host=DepGraph(ignored=("nothing",)),
            smooth=SmoothPruning(steps=3),
        )
    Pruner(model, example(), optimizer, 0.6, smooth=SmoothPruning(steps=3))


def test_two_parts_of_one_model_can_be_pruned_at_once():
    model = nn.Sequential(build_model("plain"), nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = Pruner(model[0], example(), optimizer, 0.6, smooth=SmoothPruning(steps=3))
    second = Pruner(model[1:], torch.randn(2, 5), optimizer, 0.6, smooth=SmoothPruning(steps=3))
    steps(model, optimizer, 8)
    assert first.finish().removed > 0 and second.finish().removed > 0
