"""The trace of a model ends, whatever the model does with its channels, and one layer group's trouble is its own."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_pruning.errors import GraphError
from decay_pruning.graph import Graph, rules
from tests.nets import Net, image


def rotary(m: Net, x: Tensor) -> Any:
    q = m.a(x)
    return m.b(q + torch.cat((-q[..., 4:], q[..., :4]), -1))


def rolled(m: Net, x: Tensor) -> Any:
    y = m.a(x)
    for _ in range(3):
        y = y + torch.cat((y[:, 1:], y[:, :1]), 1)
    return m.b(y)


def split_in_heads(m: Net, x: Tensor) -> Any:
    q, k, v = m.a(x).view(1, 2, 8, 16).split([2, 2, 4], 2)
    return m.b((v @ (q.transpose(-2, -1) @ k)).reshape(1, 8, 4, 4))


def part_of_the_residual(m: Net, x: Tensor) -> Any:
    y = m.a(x)
    for layer in m.more:  # type: ignore[union-attr]
        new = layer(y)
        y = torch.cat((new[:, : y.shape[1]] + y, new[:, y.shape[1] :]), 1)
    return m.b(y)


CASES = {
    "rotary": (rotary, {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}, (1, 3, 8)),
    "rolled": (rolled, {"a": nn.Conv2d(3, 16, 1), "b": nn.Conv2d(16, 2, 1)}, (1, 3, 4, 4)),
    "split in heads": (split_in_heads, {"a": nn.Conv2d(3, 16, 1), "b": nn.Conv2d(8, 2, 1)}, (1, 3, 4, 4)),
    "part of the residual": (
        part_of_the_residual,
        {
            "a": nn.Conv2d(3, 4, 1),
            "more": nn.ModuleList(nn.Conv2d(4 + 3 * k, 7 + 3 * k, 1) for k in range(10)),
            "b": nn.Conv2d(34, 2, 1),
        },
        (1, 3, 4, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_channels_that_meet_their_neighbours_end_somewhere(name: str) -> None:
    run, layers, shape = CASES[name]
    start = time.process_time()
    try:
        structures = Graph(Net(run, **layers), image(*shape)).structures
        assert structures.groups
    except GraphError as error:
        assert f"({__file__.rpartition('/')[2]}:" in str(error)  # with the line that cannot be followed
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("shape", "layers", "last"),
    [
        ((2, 6), (nn.Linear(6, 12), nn.Linear(4, 9)), lambda h: h[:, -4:]),
        ((2, 5, 6), (nn.Linear(6, 12), nn.Linear(4, 9)), lambda h: h[..., -4:]),
        ((2, 3, 4, 4), (nn.Conv2d(3, 12, 1), nn.Conv2d(4, 9, 1)), lambda h: h[:, -4:]),
        ((2, 3, 4, 4), (nn.Conv2d(3, 12, 1), nn.Conv2d(10, 9, 1)), lambda h: h[:, -11:-1]),
        ((2, 3, 8, 8), (nn.Conv2d(3, 12, 1), nn.Conv2d(12, 9, 1)), lambda h: h[..., -4:, -3:]),
    ],
)
def test_a_slice_that_counts_from_the_end(shape: Any, layers: Any, last: Any) -> None:
    first, second = layers
    out = nn.Linear(9, 2) if isinstance(first, nn.Linear) else nn.Conv2d(9, 2, 1)
    net = Net(lambda m, x: m.c(F.relu(m.b(last(F.relu(m.a(x)))))), a=first, b=second, c=out)
    assert "b" in Graph(net, image(*shape)).structures.groups


def test_an_exception_in_one_rule_costs_the_axes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rules.RULES["convolution"]

    def failing(op: Any) -> Any:
        if op.output.shape[1] == 6:
            raise OverflowError("too large")
        return right(op)

    monkeypatch.setitem(rules.RULES, "convolution", failing)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 7, 1))
    structures = Graph(net, image(1, 3, 4, 4)).structures
    assert list(structures.groups) == ["1"]
    assert "OverflowError: too large" in structures.unprunable["0"]
