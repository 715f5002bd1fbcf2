"""The decay is smooth in the function, not only in the norm."""

import itertools

import pytest
import torch

from decay_pruning import DepGraph, SmoothPruning
from decay_pruning.decay import SLICES

from .registry import batches, start

N = 20


def travelled(smooth: SmoothPruning, model_name: str = "residual") -> list[float]:
    """After each step, how far the output has moved from where it was to where it ends (0 … 1); nothing is learned."""
    run = start(
        model_name, "depgraph", smooth=smooth, target=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
    )
    x, _ = next(batches(7))
    outputs = []
    for _ in range(N):
        with torch.no_grad():
            outputs.append(run.model.train()(x))
        run.step()
    with torch.no_grad():
        outputs.append(run.model.train()(x))
    assert run.pruner.done
    whole = (outputs[-1] - outputs[0]).norm()
    return [float((o - outputs[0]).norm() / whole) for o in outputs]


def largest_step(path: list[float]) -> float:
    return max(b - a for a, b in itertools.pairwise(path))


@pytest.mark.parametrize("model_name", ["residual", "plain"])
@pytest.mark.parametrize("bound", ["slice", "joint"])
def test_default_moves_gradually(model_name, bound):
    path = travelled(SmoothPruning(steps=N, bound=bound), model_name)
    assert largest_step(path) < 4 / N
    assert 0.25 < path[N // 2] < 0.95


def test_rows_alone_jump_at_the_end():
    path = travelled(SmoothPruning(steps=N, slices="rows"))
    assert path[N // 2] < 0.1
    assert largest_step(path) > 0.5


def test_one_step_is_one_jump():
    path = travelled(SmoothPruning(steps=1))
    assert path[1] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("slices", sorted(SLICES))
def test_whatever_fades_the_end_is_zero(slices):
    """Removal is exact after every choice of slices, since all of a structure is zero at the end."""
    run = start("residual", "depgraph", smooth=SmoothPruning(steps=3, slices=slices), host=DepGraph())
    for _ in range(3):
        run.step()
    assert run.pruner.done  # surgery has proven it
