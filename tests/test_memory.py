"""The peak memory of a forward pass: counted, predicted for other widths, and met."""

import pytest
import torch
from torch import nn

from decay_pruning import Pruner, SmoothPruning, Target
from decay_pruning.budget import memory


def net(width=32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 4),
    )  # fmt: skip


X = torch.randn(1, 3, 8, 8)


def test_by_hand():
    model = nn.Sequential(nn.Linear(10, 100), nn.Tanh(), nn.Linear(100, 5))
    weights = 4 * (10 * 100 + 100 + 100 * 5 + 5)
    x = torch.randn(7, 10)
    assert memory(model, x) == weights + 4 * 7 * (
        10 + 100 + 100
    )  # input, and the wide layer before and after tanh


def test_in_place_takes_nothing_and_views_are_free():
    plain = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Flatten(), nn.Linear(100, 5))
    frugal = nn.Sequential(nn.Linear(10, 100), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(100, 5))
    x = torch.randn(7, 10)
    assert memory(plain, x) - memory(frugal, x) == 4 * 7 * 100 - 4 * 7 * 5


@pytest.mark.parametrize("batch", [None, 1, 16])
@pytest.mark.parametrize("target", [0.6, "60 KiB"])
def test_met(batch, target):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = Target(memory=target if batch != 16 or isinstance(target, float) else "150 KiB", batch=batch)
    pruner = Pruner(model, X, optimizer, target, smooth=SmoothPruning(steps=2), total_steps=9)
    plan = pruner.plan()
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    before, after = pruner.finish().memory
    x = X.repeat(batch or 1, 1, 1, 1)
    assert after == memory(model, x) == plan.after.memory
    assert 0.85 * target.at_most(before) < after <= target.at_most(before)
    assert before == memory(net(), x)
