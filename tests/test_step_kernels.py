"""A step of the engine is a few kernels, whatever the number of tensors, and never waits for a device."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from decay_pruning import DepGraph, Pruner, SelfRectifying, SmoothPruning, Target

#: What only looks at memory in another way, or makes room.
VIEWS = {
    f"aten::{name}"
    for name in ("slice", "select", "view", "unbind", "split_with_sizes", "detach", "unsqueeze", "empty", "to", "alias",
                 "reshape", "resolve_conj", "resolve_neg", "lift_fresh")
}  # fmt: skip
LONG = SmoothPruning(steps=10**9)


def kernels(rectify, *, start=0, layers=6):
    torch.manual_seed(0)
    parts = [layer for _ in range(layers) for layer in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())]
    model, x = nn.Sequential(*parts, nn.Flatten(), nn.Linear(8, 2)), torch.randn(4, 8, 1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    pruner = Pruner(
        model,
        x,
        optimizer,
        Target(structures=0.9),
        host=DepGraph(),
        start=start,
        smooth=LONG,
        rectify=rectify,
    )
    model(x).square().mean().backward()
    for _ in range(5):
        pruner.engine.before_step(), pruner.engine.after_step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        pruner.engine.before_step(), pruner.engine.after_step()
    assert bool(pruner.engine.decaying) == (start == 0)
    names = [e for e in seen.events() if e.name.startswith("aten::")]
    outer = [e for e in names if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    waits = [
        e.name for e in outer if e.name in ("aten::item", "aten::is_nonzero", "aten::_local_scalar_dense")
    ]
    copies = [
        e for e in outer if e.name == "aten::to" and any(c.name == "aten::_to_copy" for c in e.cpu_children)
    ]
    assert not waits and not copies
    return sum(e.name not in VIEWS for e in outer)


@pytest.mark.parametrize(
    ("rectify", "most"),
    [
        (None, 16),
        (SelfRectifying(criterion="first_order", warmup=0.0, judge_from=0.5), 24),
        (SelfRectifying(warmup=0.0, judge_from=0.5), 37),
        (SelfRectifying(warmup=0.0, judge_from=1e-9), 16),  # after its verdict
    ],
    ids=["sp", "first_order", "exchange", "after"],
)
def test_a_step(rectify, most):
    assert 0 < kernels(rectify) <= most


def test_no_more_for_more_layers():
    rectify = SelfRectifying(criterion="first_order", warmup=0.0, judge_from=0.5)
    assert kernels(rectify, layers=9) == kernels(rectify)


def test_waiting_is_free():
    assert kernels(SelfRectifying(), start=10**9) == 0
