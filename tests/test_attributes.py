"""Integers on a user's own modules follow a width where the code needs it, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_pruning import surgery
from decay_pruning.graph import Graph
from tests.nets import image


class Transposed(nn.Module):
    """A linear layer whose weight is the other way round, and that views by its own number."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.nf, self.weight = o, nn.Parameter(torch.randn(i, o) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(-1, x.shape[-1]) @ self.weight).view(*x.shape[:-1], self.nf)


class Fused(nn.Module):
    """Heads behind a fused projection that is split by a number; the residual width is as large."""

    def __init__(self, width: int = 12, head: int = 4) -> None:
        super().__init__()
        self.embed_dim, self.split_size, self.head_dim = width, width, head
        self.c_attn, self.c_proj = Transposed(width, 3 * width), Transposed(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split(self.split_size, dim=2)
        q, k, v = (t.view(*t.shape[:-1], -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.c_proj(y.reshape(*x.shape[:-1], -1))


class Crossed(nn.Module):
    """Half of the expanded channels go on; the number of them stands on the module."""

    def __init__(self, i: int, expanded: int) -> None:
        super().__init__()
        self.expanded, self.patch = expanded, i
        self.enter, self.f, self.leave = (
            nn.Conv2d(i, expanded, 1),
            nn.Conv2d(expanded // 2, 6, 1),
            nn.Conv2d(expanded // 2 + 6, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.enter(x).split(self.expanded // 2, dim=1)
        return self.leave(torch.cat([a, self.f(b)], 1))


class Named(nn.Module):
    """Numbers that equal a width and are none: one is read for something else, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.times = 6, 6
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) * self.times


CASES: dict[str, tuple[Any, Any, str, dict[str, int]]] = {
    "a split of fused heads": (
        lambda: nn.Sequential(nn.Linear(5, 12), Fused(), nn.Linear(12, 2)),
        image(2, 6, 5),
        "1.c_attn",
        {"1.split_size": 8, "1.c_attn.nf": 24, "1.embed_dim": 12, "1.c_proj.nf": 12, "1.head_dim": 4},
    ),
    "other widths": (
        lambda: nn.Sequential(nn.Linear(5, 16), Fused(16, 2), nn.Linear(16, 2)),
        image(2, 6, 5),
        "1.c_attn",
        {"1.split_size": 14, "1.c_attn.nf": 42, "1.c_proj.nf": 16},
    ),
    "half of the channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Crossed(8, 8)),
        image(2, 3, 4, 4),
        "1.enter",
        {"1.expanded": 6, "1.patch": 8},
    ),
    "numbers that are no width": (Named, image(3, 5), "a", {"side": 6, "times": 6}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_code_needs_follows_and_nothing_else(name: str) -> None:
    build, x, group, expected = CASES[name]
    torch.manual_seed(0)
    model = build().double()
    structures = Graph(model, x.double()).structures
    assert group in structures.groups, structures.unprunable
    surgery.remove(model, structures, {group: [1]}, example_inputs=x.double())
    found = {key: surgery.lookup(model, key) for key in expected}
    assert found == expected
    model.train()(x.double()).sum().backward()


def test_channels_beside_an_inexact_width_are_not_taken_for_it() -> None:
    """A PReLU on a map as wide as it is deep, and a norm over another width, cut together."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.next = nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 5, 1)
            self.norm, self.out = nn.LayerNorm(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.next(self.act(self.conv(x))).flatten(2).transpose(1, 2)))

    torch.manual_seed(0)
    model, x = Both().double(), image(2, 3, 4, 4).double()
    structures = Graph(model, x, allow_inexact=True).structures
    left = surgery.remove(model, structures, {"conv": [0, 2], "next": [1]}, example_inputs=x)
    assert (len(left.groups["conv"]), len(left.groups["next"])) == (2, 4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_with_the_batch_first_are_followed(kind: Any) -> None:
    """The layer transposes its output in place."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.h = kind(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.r(x)[0].mean(1))

    model, x = Last().double(), image(2, 7, 6).double()
    structures = Graph(model, x).structures
    surgery.remove(model, structures, {"r": [1, 4]}, example_inputs=x)
    assert (model.r.hidden_size, model.h.in_features) == (3, 3)
