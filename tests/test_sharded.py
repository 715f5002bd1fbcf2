"""A model sharded by `fully_shard` is pruned as one process would prune it."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from decay_pruning import (
    ConfigError,
    Custom,
    DepGraph,
    OTOv2,
    Pruner,
    SelfRectifying,
    SmoothPruning,
    SparseLearning,
)

from .ranks import together
from .registry import ARMS, batches, build_model, example, smallest_rows

STEPS = 9
SETTINGS = {
    "exchange": ("residual", DepGraph(), SmoothPruning(steps=4), SelfRectifying(), torch.optim.SGD),
    "paper": ("perceptron", DepGraph(importance="taylor"), *ARMS["paper"], torch.optim.Adam),
    "outward": ("plain", Custom(smallest_rows), *ARMS["sr"], torch.optim.SGD),
}


def network(name):
    """Without batch statistics, so that two halves of a batch are one batch."""
    model = build_model(name)
    for leaf, module in list(model.named_children()):
        if isinstance(module, nn.BatchNorm2d):
            setattr(model, leaf, nn.GroupNorm(module.num_features, module.num_features, affine=True))
    return model.double()


def prepared(model, kind, host, smooth, rectify, removal="at finish"):
    optimizer = kind(model.parameters(), lr=0.02)
    pruner = Pruner(
        model, example(torch.float64), optimizer, 0.6, host=host, smooth=smooth, rectify=rectify,
        total_steps=STEPS, removal=removal,
    )  # fmt: skip
    return optimizer, pruner


def whole(model):
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in model.parameters()])


def train(model, optimizer, steps, part=slice(0, 16)):
    """The weights after each of these steps."""
    seen = []
    for x, y in itertools.islice(batches(1, torch.float64), *steps):
        loss = nn.functional.cross_entropy(model(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(whole(model))
    return seen


def run(model, settings, part=slice(0, 16)):
    optimizer, pruner = prepared(model, *settings)
    seen = train(model, optimizer, (STEPS,), part)
    report = pruner.finish()
    x = example(torch.float64)
    return seen, str(report), dict(pruner.model.state_dict()), pruner.model.eval()(x).detach()


def half(rank, world):
    return slice(rank * 16 // world, (rank + 1) * 16 // world)


def sharded(name, **options):
    model = network(name)
    for layer in list(model.children())[::2]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def as_one(setting, rank, world, folder, **options):
    name, *rest = SETTINGS[setting]
    host, smooth, rectify, kind = rest
    return run(sharded(name, **options), (kind, host, smooth, rectify), half(rank, world))


def grid(rank, world, folder):
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("copies", "shards"))
    return as_one("exchange", rank, world, folder, mesh=mesh)


SCENARIOS = {
    **{name: functools.partial(as_one, name) for name in SETTINGS},
    "grid": grid,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return together(2, tmp_path_factory.mktemp("sharded"), SCENARIOS)


@functools.cache
def alone(setting):
    name, host, smooth, rectify, kind = SETTINGS[setting]
    return run(network(name), (kind, host, smooth, rectify))


@pytest.mark.parametrize("setting", [*SETTINGS, "grid"])
def test_the_same_as_one_process(found, setting):
    weights, report, state, output = alone("exchange" if setting == "grid" else setting)
    for seen, said, small, there in found(setting):
        assert said == report
        for step, (here, expected) in enumerate(zip(seen, weights, strict=True)):
            assert torch.allclose(here, expected, rtol=1e-9, atol=1e-11), f"step {step}"
        assert small.keys() == state.keys()
        for name, value in state.items():
            assert small[name].shape == value.shape, name
            assert torch.allclose(small[name], value, rtol=1e-9, atol=1e-11), name
        assert torch.allclose(there, output, rtol=1e-9, atol=1e-11)
