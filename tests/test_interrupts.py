"""An interrupt at any line inside `optimizer.step()` leaves everything consistent, and training goes on."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from decay_pruning import SelfRectifying, SmoothPruning

from .registry import HOSTS, Run, start

#: Four hundred interrupts in all.
ROUNDS = {name: 400 // len(HOSTS) for name in HOSTS}


class Tripwire:
    """Raises KeyboardInterrupt at the n-th line that runs in the library, or in the optimizer."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.sprung = False

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        # torch's own wrapper around `step` switches gradients off, and an interrupt in its `finally` leaves them off
        if not any(part in file for part in ("decay_pruning", "torch/optim/sgd", "/contextlib.py")):
            return None
        if event == "line" and not self.sprung:
            self.left -= 1
            if self.left <= 0:
                self.sprung = True
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


def consistent(run: Run) -> None:
    """Shapes agree everywhere, and nothing is left behind that a step puts up for a while."""
    for name, module in run.model.named_modules():
        assert module.training, f"{name} is in evaluation mode"
        if isinstance(module, nn.Conv2d | nn.Linear):
            out, into = module.weight.shape[:2]
            own = (
                (module.out_channels, module.in_channels)
                if isinstance(module, nn.Conv2d)
                else (module.out_features, module.in_features)
            )
            assert own == (out, into), f"{name} says that it has other widths than its weight"
        if isinstance(module, nn.BatchNorm2d):
            sizes = {len(t) for t in (module.weight, module.bias, module.running_mean, module.running_var)}
            assert sizes == {module.num_features}, f"{name} has several widths"
    sizes = run.pruner.structures.sizes
    for name, p in run.model.named_parameters():
        assert p.dtype == torch.float32
        assert bool(p.isfinite().all())
        assert p.grad is None or p.grad.shape == p.shape
        state = run.optimizer.state.get(p, {})
        assert all(v.shape == p.shape for v in state.values() if isinstance(v, torch.Tensor) and v.ndim)
        for dim, size in enumerate(p.shape):
            assert sizes.get((name, dim), size) == size, f"the pruner takes {name} to have another width"
    engine, counts = run.pruner.engine, run.pruner.engine.counts
    held = sum(len(ids) for ids in engine.held.values())
    assert counts.picked == counts.released + counts.decayed + len(engine.decaying), (
        "a structure is lost or twice"
    )
    assert counts.decayed == counts.removed + held
    assert len(run.optimizer.param_groups[0]["params"]) == len(list(run.model.parameters()))


@pytest.mark.parametrize("host_name", list(HOSTS))
def test_interrupted_anywhere(host_name: str) -> None:
    dice = random.Random(host_name)
    rectify = SelfRectifying(-0.5, 0.5, max_share=0.3, retries=1)
    done = 0
    while done < ROUNDS[host_name]:
        run = start("residual", host_name, smooth=SmoothPruning(steps=2), rectify=rectify, seed=done)
        for _ in range(40):
            for _ in range(dice.choice([0, 2, 4])):  # the same step, interrupted again and again
                x, y = next(run.batches)
                run.optimizer.zero_grad()
                nn.functional.cross_entropy(run.model(x), y).backward()
                wire = Tripwire(int(10 ** dice.uniform(0, 3.8)))
                try:
                    with wire:
                        run.optimizer.step()
                except KeyboardInterrupt:
                    done += 1
                assert torch.is_grad_enabled()
                consistent(run)
            run.step()
            consistent(run)
            if run.pruner.done:
                break
        report = run.pruner.finish()
        assert report.macs[1] <= 0.6 * report.macs[0]
        assert not any("Gated" in type(m).__name__ for m in run.model.modules())
        run.step()
        consistent(run)
