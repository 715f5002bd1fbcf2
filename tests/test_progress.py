"""What `progress()` says of the way that is left."""

import torch
from torch import nn

from decay_pruning import Pruner, SmoothPruning


def test_macs_left_are_those_when_all_that_fades_is_gone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(
        model, torch.randn(1, 6), optimizer, 0.5, smooth=SmoothPruning(steps=3), removal="at finish"
    )
    assert pruner.progress().macs_left == pruner.progress().macs == 144
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        now = pruner.progress()
        assert (now.macs, now.macs_left) == (144, 72)
    pruner.finish()
    assert pruner.progress().macs == pruner.progress().macs_left == 72
