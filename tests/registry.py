"""Hosts × small models: every property test runs over all of them. A new host gets every test for one line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decay_pruning import (
    Custom,
    DepGraph,
    GateDecorator,
    Goal,
    OTOv2,
    Picks,
    Pruner,
    Scene,
    SelfRectifying,
    SmoothPruning,
    SparseLearning,
    Target,
    choose,
)
from decay_pruning.hosts import Host


class Residual(nn.Module):
    """Convolutions with batch-norm, one addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn3(self.conv3(self.bn2(self.conv2(x)).relu()))).relu()
        return self.fc(x.mean((2, 3)))


class Plain(nn.Module):
    """Convolutions with batch-norm, a flatten and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(10)
        self.fc1 = nn.Linear(10 * 4, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc2(self.fc1(x.flatten(1)).relu())


class Perceptron(nn.Module):
    """Linear layers that both read and write one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * 64, 12)
        self.stream = nn.Linear(12, 12)
        self.hidden = nn.Linear(12, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x.flatten(1)).relu()
        x = (x + self.stream(x)).relu()
        return self.out(self.hidden(x).relu())


MODELS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "plain": Plain, "perceptron": Perceptron}


def smallest_rows(scene: Scene, goal: Goal) -> Picks:
    """A user's own criterion: structures whose first tensor is small."""
    scores = {}
    for name, group in scene.structures.groups.items():
        first = next(c for c in group.couplings if c.tensor in scene.parameters)
        weight = scene.parameters[first.tensor].detach().movedim(first.dim, 0).flatten(1)
        scores[name] = weight.norm(dim=1)[first.position]
    return choose(scene, scores, goal)


HOSTS: dict[str, Callable[[], Host]] = {
    "depgraph": DepGraph,
    "depgraph-rounds": lambda: DepGraph(importance="taylor", scope="local", rounds=2, interval=1),
    "depgraph-sparse": lambda: DepGraph(sparse=SparseLearning(every=2)),
    "custom": lambda: Custom(smallest_rows),
    # a strong pull, so that structures come to the half-space within a few steps
    "otov2": lambda: OTOv2(lam=0.8, epsilon=0.97, tolerance=0.1, deadline=8, remove_every=3),
    "otov2-partition": lambda: OTOv2(lam=2.0, tolerance=0.1, decay_from="partition", deadline=8),
    "gates": lambda: GateDecorator(tick=1, tock=1, ticks=2, share=0.4),
    "gates-own": lambda: GateDecorator(tick=2, tock=0, share=0.5, decay_in="own"),
}

#: (smooth, rectify) of each arm; thresholds are low, so that releases do happen.
ARMS: dict[str, tuple[SmoothPruning, SelfRectifying | None]] = {
    "single": (SmoothPruning.one_step(), None),
    "sp": (SmoothPruning(steps=4), None),
    "sr": (
        SmoothPruning(steps=4),
        SelfRectifying(-0.05, -1.0, "outward_and_regrowth", max_share=0.5, retries=1),
    ),
    "paper": (SmoothPruning.paper(4), replace(SelfRectifying.paper(t_rate=-0.5, t_len=0.5), max_share=0.5)),
}

everywhere = pytest.mark.parametrize(
    ("model_name", "host_name"),
    [pytest.param(m, h, id=f"{m}-{h}") for m, h in itertools.product(MODELS, HOSTS)],
)
every_arm = pytest.mark.parametrize("arm", list(ARMS))


@dataclass
class Run:
    """A model in training, with or without a pruner."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: Pruner
    batches: Iterator[tuple[Tensor, Tensor]]

    def step(self) -> float:
        x, y = next(self.batches)
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def batches(seed: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless small batches of noise, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(16, 3, 8, 8, generator=generator).to(dtype)
        yield x, torch.randint(0, 5, (16,), generator=generator)


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    """One input."""
    return torch.linspace(-1, 1, 192, dtype=dtype).view(1, 3, 8, 8)


def build_model(name: str, seed: int = 0) -> nn.Module:
    """A model of the registry with fixed weights; batch-norm is not at its trivial start."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return model


def start(
    model_name: str,
    host_name: str,
    arm: str = "sp",
    *,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    target: Target | float = 0.6,
    seed: int = 0,
    **options: Any,
) -> Run:
    """A run of the registry, ready to step."""
    model = build_model(model_name, seed)
    made = (
        optimizer(model.parameters())
        if optimizer is not None
        else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    )
    smooth, rectify = ARMS[arm]
    begin = 3 if host_name == "depgraph-sparse" else 0
    settings = {"host": HOSTS[host_name](), "smooth": smooth, "rectify": rectify, "start": begin} | options
    pruner = Pruner(model, example(), made, target, **settings)
    return Run(model, made, pruner, batches(seed + 1))
