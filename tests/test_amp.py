"""A step that a gradient scaler skipped does not count."""

import pytest
import torch
from torch import nn

from decay_pruning import SelfRectifying
from decay_pruning.resistance import Resistance

from .registry import Run, start

OPTIMIZERS = {
    "plain": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "fused-adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


def step(run: Run, scaler: torch.amp.GradScaler, *, infinite: bool = False) -> None:
    x, y = next(run.batches)
    run.optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(run.model(x).float(), y)
    scaler.scale(loss).backward()
    if infinite:
        next(run.model.parameters()).grad.view(-1)[0] = float("inf")
    scaler.step(run.optimizer)
    scaler.update()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_skipped_step_does_not_advance_the_decay(name):
    run = start("residual", "depgraph", "sr", optimizer=OPTIMIZERS[name])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step(run, scaler)
    weights = [p.detach().clone() for p in run.model.parameters()]
    norms = run.pruner.norms()
    assert norms
    for _ in range(3):
        step(run, scaler, infinite=True)
        assert run.pruner.progress().step == 1
        assert run.pruner.norms() == norms
        assert all(torch.equal(a, b) for a, b in zip(weights, run.model.parameters(), strict=True))
    for _ in range(30):
        step(run, scaler)
    assert run.pruner.done


def test_a_skipped_first_step_picks_nothing():
    run = start("residual", "depgraph", "sp", optimizer=OPTIMIZERS["fused"])
    step(run, torch.amp.GradScaler("cpu", init_scale=1024.0), infinite=True)
    assert run.pruner.progress().decaying == 0


def test_resistance_is_measured_on_unscaled_gradients():
    """A fused optimizer gets gradients that are still scaled; no figure may depend on the scale."""
    seen = []
    every = SelfRectifying(criterion=lambda seen, settings: seen.c_len > 1e9, warmup=0.0)
    for scale in (1.0, 4096.0):
        run = start("residual", "depgraph", optimizer=OPTIMIZERS["fused"], rectify=every)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        step(run, scaler)
        seen.append(run.pruner.engine.resistance())
    for key, values in seen[0].items():
        assert set(values) == set(Resistance._fields)
        for name, value in values.items():
            assert seen[1][key][name] == pytest.approx(value, rel=2e-2, abs=least(name)), name
    for name in Resistance._fields:
        assert any(abs(values[name]) > least(name) for values in seen[0].values()), name


def least(name):
    """What half precision leaves of zero; worth is a square."""
    return 1e-6 if name == "worth" else 1e-3
