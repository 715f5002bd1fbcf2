"""Training goes on after removal, with any optimizer: parameters move, and state has their shape."""

import pytest
import torch
from torch import nn

from decay_pruning import Pruner, SmoothPruning

from .registry import build_model, example, start


class Lion(torch.optim.Optimizer):
    """A user's own optimizer, outside of torch."""

    def __init__(self, params, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(torch.sign(average.lerp(p.grad, 0.1)), alpha=group["lr"])
                average.lerp_(p.grad, 1 - group["beta"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "sgd-plain-loop": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=False),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lion": Lion,
    "parameter-groups": lambda p: torch.optim.SGD(
        [{"params": [x], "lr": 0.01 * (i + 1)} for i, x in enumerate(p)], lr=0.1, momentum=0.9
    ),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("model_name", ["residual", "plain"])
def test_training_goes_on(name, model_name):
    run = start(model_name, "depgraph", "sr", optimizer=OPTIMIZERS[name])
    identity = {n: id(p) for n, p in run.model.named_parameters()}
    while not run.pruner.done:
        run.step()
        assert run.pruner.progress().step < 40
    assert {n: id(p) for n, p in run.model.named_parameters()} == identity
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(3):
        run.step()
    for n, p in run.model.named_parameters():
        still = p.grad.abs().max() < 1e-5  # a bias in front of batch-norm has no gradient
        assert still or not torch.equal(p, before[n]), f"{n} does not move any more"
        for key, value in run.optimizer.state[p].items():
            if torch.is_tensor(value) and value.ndim == p.ndim and value.numel() > 1:
                assert all(a in (1, b) for a, b in zip(value.shape, p.shape, strict=True)), f"{n}: {key}"


def test_a_loss_kept_alive_does_not_break_the_next_backward():
    """`loss` still holds the old graph when the next forward runs, with accumulators of the old shape."""
    run = start("residual", "depgraph", "single")
    kept = []
    for _ in range(4):
        x, y = next(run.batches)
        loss = nn.functional.cross_entropy(run.model(x), y)
        kept.append(loss)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
    assert run.pruner.done


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_and_clipping(set_to_none):
    run = start("residual", "depgraph", "sr")
    for _ in range(20):
        x, y = next(run.batches)
        run.optimizer.zero_grad(set_to_none=set_to_none)
        nn.functional.cross_entropy(run.model(x), y).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        run.optimizer.step()
    assert run.pruner.done


def test_gradient_accumulation_counts_once():
    run = start("residual", "depgraph", "sp")
    for _ in range(4):
        for _ in range(3):
            x, y = next(run.batches)
            nn.functional.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert run.pruner.progress().step == 4
    assert run.pruner.done


def test_frozen_parameters_are_pruned_with_the_rest():
    model = build_model("residual")
    model.conv1.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    pruner = Pruner(model, example(), optimizer, 0.5, smooth=SmoothPruning(steps=2))
    assert not model.conv1.weight.requires_grad
    for _ in range(3):
        nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.finish().macs[1] <= 0.5 * pruner.before.macs
    assert not model.conv1.weight.requires_grad
