"""Grouped queries: a head of keys and values with its queries, or the same query of every group, or the offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_pruning import surgery
from decay_pruning.graph import Graph
from tests.nets import image


class Grouped(nn.Module):
    """2 heads of keys and values, 3 queries for each, 4 offsets; one number for all three views."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.groups = 4, 3
        self.q, self.k, self.v = nn.Linear(5, 24), nn.Linear(5, 8), nn.Linear(5, 8)
        self.out = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, self.head).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2) for t in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("heads", "count", "widths"),
    [
        ({}, 2, (12, 4)),  # one head of keys is left, with its three queries
        ({"q": 2}, 3, (16, 8)),  # two queries of each group are left
        ({"q": 6, "k": 2, "v": 2}, 4, (18, 6)),  # three offsets of each head are left
    ],
)
def test_three_kinds_of_structures(heads: dict[str, int], count: int, widths: tuple[int, int]) -> None:
    model: Any = Grouped().double()
    x = image(2, 7, 5).double()
    structures = Graph(model, x, heads=heads).structures
    assert {key: len(group) for key, group in structures.groups.items()} == {"q": count}
    surgery.zero_(model, structures, {"q": [1]})
    before = model(x)
    surgery.remove(model, structures, {"q": [1]}, example_inputs=x)
    assert (model.q.out_features, model.k.out_features, model.v.out_features) == (*widths, widths[1])
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)
