"""Building a pruner changes nothing: training flags, buffers, gradients, random state, requires_grad."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decay_pruning import Pruner, inspect
from decay_pruning.graph import Graph

from .registry import MODELS, build_model, example


@pytest.mark.parametrize("model_name", list(MODELS))
@pytest.mark.parametrize("how", ["pruner", "inspect"])
def test_nothing_changes(model_name, how):
    model = build_model(model_name)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    model(example().repeat(4, 1, 1, 1)).sum().backward()
    next(model.parameters()).requires_grad_(False)
    random = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    wanted = [p.requires_grad for p in model.parameters()]
    if how == "pruner":
        Pruner(model, example(), torch.optim.SGD(model.parameters(), lr=0.1), 0.5, total_steps=100)
    else:
        inspect(model, example())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)
    assert torch.equal(torch.get_rng_state(), random)


class HooksItself(nn.Module):
    """Puts a hook on its own layer when it first runs, and remembers that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.caught: list[Any] = []
        self.hooked = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.a.register_forward_hook(lambda module, args, out: self.caught.append(out))
            self.hooked = True
        self.caught = []
        self.b(self.a(x).relu())
        assert len(self.caught) == 1, "hooked once"
        return self.b(self.caught[0].relu())


def test_hooks_that_a_model_puts_on_itself_are_taken_back_with_its_memory_of_them() -> None:
    model = HooksItself()
    for _ in range(2):
        graph = Graph(model, torch.randn(2, 4))
    assert "a" in graph.structures.groups and not model.hooked and not model.a._forward_hooks
    model(torch.randn(2, 4))
