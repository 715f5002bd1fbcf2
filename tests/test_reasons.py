"""Every layer with a weight that is not prunable is named, and what is said of it is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decay_pruning.errors import ConfigError
from decay_pruning.graph import Graph
from decay_pruning.structures import Role
from tests.nets import EXACT, INEXACT, Net, image, make


class Own(nn.Module):
    """A linear layer of a class of one's own, its weight the other way round."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def net(run: Callable[..., Any], x: Any = None, **layers: Any) -> Net:
    """`x` → `enter` → `hidden` → `run` (on `odd`) → `out`."""
    torch.manual_seed(0)

    def whole(m: Net, x: Tensor) -> Any:
        return m.out(run(m, m.hidden(m.enter(x)).relu()))

    given = {
        "enter": nn.Linear(6, 9),
        "hidden": nn.Linear(9, 8),
        "odd": nn.Linear(8, 8),
        "out": nn.Linear(8, 4),
    }
    return Net(whole, **(given | layers))


def detached(m: Net, x: Tensor) -> Tensor:
    return x + m.odd(x).detach()


def under_no_grad(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        side = m.odd(x)
    return x + side


def in_a_checkpoint(m: Net, x: Tensor) -> Tensor:
    return x + checkpoint(m.odd, x.detach(), use_reentrant=True)


FOLLOWED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "detached": (detached, {}),
    "under no_grad": (under_no_grad, {}),
    "in a checkpoint": (in_a_checkpoint, {}),
    "in training only": (lambda m, x: x + m.odd(x) if m.training else x, {}),
    "of an own class": (lambda m, x: x + m.odd(x), {"odd": Own(8, 8)}),
    "recurrent": (lambda m, x: x + m.odd(x), {"odd": nn.GRUCell(8, 8)}),
    "two states": (lambda m, x: x + m.odd(x)[1], {"odd": nn.LSTMCell(8, 8)}),
    "own class, detached": (lambda m, x: x + m.odd(x).detach(), {"odd": Own(8, 8)}),
    "weight read by F.linear": (lambda m, x: x + F.linear(x, m.odd.weight, m.odd.bias), {}),
    "bare parameter of two dimensions": (lambda m, x: x + x.detach() @ m.odd, {"odd": nn.Parameter(torch.randn(8, 8))}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", FOLLOWED)
def test_layers_are_followed_wherever_they_run(name: str) -> None:
    run, layers = FOLLOWED[name]
    found = Graph(net(run, **layers), image(3, 6)).structures
    groups = [{c.tensor for c in group.couplings} for group in found.groups.values()]
    cut = next(tensors for tensors in groups if "hidden.bias" in tensors)
    assert any(tensor == "odd" or tensor.startswith("odd.") for tensor in cut)
    assert len(found.groups["enter"]) == 9
    assert found.unprunable == {"out": "feeds the model's output"}


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "not run": (lambda m, x: x, "is not reached from the example inputs"),
    "for nothing": (lambda m, x: [x, m.odd(x)][0], "does not lead to the model's output"),
    "for a size": (lambda m, x: x + torch.ones(m.odd(x).shape).sum(), "does not lead to the model's output"),
    "no rule": (
        lambda m, x: x + torch.linalg.qr(m.odd(x))[0].sum(), "goes through an operation without a rule, aten.linalg_qr"
    ),
    "sorted": (lambda m, x: x + m.odd(x).sort(-1)[0].sum(), "is mixed by sort (test_reasons.py:"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_true(name: str) -> None:
    run, reason = REFUSED[name]
    found = Graph(net(run), image(3, 6)).structures
    assert "enter" in found.groups
    assert found.unprunable["odd"].startswith(reason)
    assert found.unprunable["out"] == "feeds the model's output"


@pytest.mark.parametrize("name", [*EXACT, *INEXACT])
def test_every_layer_with_a_weight_is_prunable_or_named(name: str) -> None:
    model, x = make(name)
    found = Graph(model, x, allow_inexact=name in INEXACT).structures
    first = {id(p): n for n, p in model.named_parameters()}
    cut = {c.tensor for group in found.groups.values() for c in group.couplings if c.role is not Role.COLUMN}
    for path, module in model.named_modules():
        weights = [first[id(p)] for p in module.parameters(recurse=False) if p.ndim > 1]
        if weights and not cut & set(weights):
            assert path in found.unprunable or any(w in found.unprunable for w in weights), path


def test_a_width_is_shared_with_a_layer_that_is_named() -> None:
    model = Net(
        lambda m, x: m.out(m.norm(m.enter(x) + m.more(m.hidden(x)))),
        enter=nn.Linear(6, 8), hidden=nn.Linear(6, 9), more=nn.Linear(9, 8), norm=nn.LayerNorm(8), out=nn.Linear(8, 4),
    )  # fmt: skip
    said = Graph(model, image(3, 6)).structures.unprunable
    assert said["more"].startswith("shares its width with 'enter': removal is not exact: LayerNorm 'norm'")


def test_no_name_is_suggested_for_itself() -> None:
    model = net(lambda m, x: x + m.odd(x), odd=nn.GELU())
    with pytest.raises(ConfigError) as error:
        Graph(model, image(3, 6), heads={"odd": 2})
    assert "did you mean" not in str(error.value) and "GELU" in str(error.value)
