"""Operation rules: small networks, one for each kind of operator, are cut as by hand, or refused with the reason.

A new rule gets one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_pruning import surgery
from decay_pruning.errors import GraphError
from decay_pruning.graph import Graph
from tests.nets import Net, image, lively
from tests.test_removal_is_exact import output, random_picks

Build = Callable[[], tuple[nn.Module, Any]]


def conv(before: int, after: int, size: int = 1, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, **more)


def net(run: Callable[..., Any], x: Any, **layers: nn.Module | nn.Parameter) -> Build:
    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        return lively(Net(run, **layers)).double(), x.double() if x.is_floating_point() else x

    return build


class Own(nn.Module):
    """A linear layer that someone wrote: the weight is (in, out), the width an attribute."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.width = after
        self.weight, self.bias = nn.Parameter(torch.randn(before, after)), nn.Parameter(torch.randn(after))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.width)


class Flat(nn.Module):
    """The commonest line before a classifier: a view by the features that it expects."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = 6 * 9
        self.conv, self.out = conv(3, 6, 2), nn.Linear(6 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).relu().permute(0, 2, 3, 1).reshape(-1, self.in_features))


class Loose(nn.Module):
    """Attention with a fixed head width, `shared` query heads for every key head."""

    def __init__(self, keys: int, shared: int, width: int = 4) -> None:
        super().__init__()
        self.shared, self.width = shared, width
        self.q, self.o = nn.Linear(6, keys * shared * width), nn.Linear(keys * shared * width, 6)
        self.k, self.v = nn.Linear(6, keys * width), nn.Linear(6, keys * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:-1], -1, self.width).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


X = image(2, 3, 4, 4)
T = image(2, 5, 6)

#: kind → (network, layer group → number of structures).
CUT: dict[str, tuple[Build, dict[str, int]]] = {
    "own linear": (net(lambda m, x: m.b(m.a(x).relu()), T, a=Own(6, 8), b=nn.Linear(8, 2)), {"a": 8}),
    "view by an attribute": (lambda: (Flat().double(), X.double()), {"conv": 6}),
    "einsum": (
        net(
            lambda m, x: m.b(torch.einsum("bchw,cd->bdhw", m.a(x), m.w)),
            X,
            a=conv(3, 5),
            w=nn.Parameter(torch.randn(5, 4)),
            b=conv(4, 2),
        ),
        {"a": 5, "w": 4},
    ),
    "functional convolution": (
        net(
            lambda m, x: m.b(F.conv2d(m.a(x), m.w)),
            X,
            a=conv(3, 5),
            w=nn.Parameter(torch.randn(4, 5, 3, 3)),
            b=conv(4, 2),
        ),
        {"a": 5, "w": 4},
    ),
    "pixel shuffle": (
        net(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), X, a=conv(3, 12), b=conv(3, 2)),
        {"a": 3},
    ),
    "pixel unshuffle": (
        net(lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)), X, a=conv(3, 4), b=conv(16, 2)),
        {"a": 4},
    ),
    "channel shuffle": (
        net(
            lambda m, x: m.c(F.channel_shuffle(torch.cat([m.a(x), m.b(x)], 1), 2)),
            X,
            a=conv(3, 4),
            b=conv(3, 4),
            c=conv(8, 2),
        ),
        {"a": 4},
    ),
    "unfold": (
        net(lambda m, x: m.b(F.unfold(m.a(x), 2).transpose(1, 2)), X, a=conv(3, 5), b=nn.Linear(20, 2)),
        {"a": 5},
    ),
    "gated unit": (
        net(lambda m, x: m.b(F.glu(m.a(x), -1)), T, a=nn.Linear(6, 10), b=nn.Linear(5, 2)),
        {"a": 5},
    ),
    "pooled, channels last": (
        net(
            lambda m, x: m.b(
                F.adaptive_avg_pool2d(m.a(x).to(memory_format=torch.channels_last), 1).flatten(1)
            ),
            X,
            a=conv(3, 5),
            b=nn.Linear(5, 2),
        ),
        {"a": 5},
    ),
    "layer scale that starts small": (
        net(
            lambda m, x: m.c(x + m.s * m.b(m.a(x).relu())),
            T,
            a=nn.Linear(6, 5),
            b=nn.Linear(5, 6),
            c=nn.Linear(6, 2),
            s=nn.Parameter(torch.full((6,), 1e-7)),
        ),
        {"a": 5},
    ),
    "negative slice": (
        net(
            lambda m, x: m.b(m.a(x)[:, -3:]) + m.c(m.a(x)[:, :-3]),
            X,
            a=conv(3, 8),
            b=conv(3, 2),
            c=conv(5, 2),
        ),
        {"a": 5},
    ),
    "stack and sum": (
        net(
            lambda m, x: m.c(torch.stack([m.a(x), m.b(x)]).sum(0)),
            X,
            a=conv(3, 5),
            b=conv(3, 5),
            c=conv(5, 2),
        ),
        {"a": 5},
    ),
    "expanded queries": (
        net(
            lambda m, x: m.b(m.a(x) + m.q.expand(len(x), -1, -1)),
            T,
            a=nn.Linear(6, 5),
            b=nn.Linear(5, 2),
            q=nn.Parameter(torch.randn(1, 5, 5)),
        ),
        {"a": 5},
    ),
    "in place": (
        net(
            lambda m, x: m.c(m.a(x).relu_().add_(m.b(x)).mul_(2)),
            T,
            a=nn.Linear(6, 5),
            b=nn.Linear(6, 5),
            c=nn.Linear(5, 2),
        ),
        {"a": 5},
    ),
    "roll on space": (
        net(lambda m, x: m.b(m.a(x).roll((1, 1), (2, 3))), X, a=conv(3, 5), b=conv(5, 2)),
        {"a": 5},
    ),
    "index on tokens": (
        net(lambda m, x: m.b(m.a(x)[:, [2, 0]]), T, a=nn.Linear(6, 5), b=nn.Linear(5, 2)),
        {"a": 5},
    ),
    "interpolation": (
        net(lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2)), X, a=conv(3, 5), b=conv(5, 2)),
        {"a": 5},
    ),
    "scale that starts at zero": (
        net(
            lambda m, x: m.c(m.a(x) + m.s * m.b(x)),
            T,
            a=nn.Linear(6, 5),
            b=nn.Linear(6, 5),
            c=nn.Linear(5, 2),
            s=nn.Parameter(torch.zeros(1)),
        ),
        {"a": 5},
    ),
    "low rank beside": (
        net(
            lambda m, x: m.out(m.base(x) + m.up(m.down(x))),
            T,
            base=nn.Linear(6, 5),
            down=nn.Linear(6, 3),
            up=nn.Linear(3, 5),
            out=nn.Linear(5, 2),
        ),
        {"base": 5, "down": 3},
    ),
    "whole heads by their width": (
        lambda: (nn.Sequential(Loose(4, 1), nn.Linear(6, 2)).double(), T.double()),
        {"0.q": 4, "0.o": 6},
    ),
    "key heads with their queries": (
        lambda: (nn.Sequential(Loose(2, 3), nn.Linear(6, 2)).double(), T.double()),
        {"0.q": 2, "0.o": 6},
    ),
    "relative bias table": (
        net(
            lambda m, x: m.b((m.a(x) + m.t[torch.tensor([0, 2, 2, 6, 1])]).relu()),
            T,
            a=nn.Linear(6, 5),
            b=nn.Linear(5, 2),
            t=nn.Parameter(torch.randn(7, 5)),
        ),
        {"a": 5},
    ),
    "one channel by number": (
        net(lambda m, x: m.b(m.a(x)) * m.a(x)[..., :1], T, a=nn.Linear(6, 5), b=nn.Linear(5, 2)),
        {"a": 4},
    ),
    "complex numbers": (
        net(
            lambda m, x: m.b(torch.fft.ifft(torch.fft.fft(m.a(x), dim=1), dim=1).real),
            T,
            a=nn.Linear(6, 5),
            b=nn.Linear(5, 2),
        ),
        {"a": 5},
    ),
}


@pytest.mark.parametrize("kind", CUT)
def test_kinds_of_operators_that_are_followed(kind: str) -> None:
    build, expected = CUT[kind]
    model, x = build()
    structures = Graph(model, x).structures
    assert {name: len(group) for name, group in structures.groups.items()} == expected, structures.unprunable
    picks = random_picks(structures, 0)
    surgery.zero_(model, structures, picks)
    before = output(model, x)
    surgery.remove(model, structures, picks, example_inputs=x)
    assert (output(model, x) - before).norm() <= 1e-10 * before.norm()


#: kind → (network, layer, words in its reason).
REFUSED: dict[str, tuple[Build, str, str]] = {
    "operator without a rule": (
        net(lambda m, x: m.b(torch.linalg.qr(m.a(x)).R), T, a=nn.Linear(6, 5), b=nn.Linear(5, 2)),
        "a",
        "without a rule, aten.linalg_qr.default (test_rules.py:",
    ),
    "number in a view": (
        net(
            lambda m, x: m.b(m.a(x).view(2, 5, 4, 2).transpose(1, 2).sum(3)),
            T,
            a=nn.Linear(6, 8),
            b=nn.Linear(5, 2),
        ),
        "a",
        "view (test_rules.py:",
    ),
    "mean over the width": (
        net(lambda m, x: m.b(m.a(x) - m.a(x).mean(-1, True)), T, a=nn.Linear(6, 5), b=nn.Linear(5, 2)),
        "a",
        "the mean (test_rules.py:",
    ),
    "input beside": (
        net(lambda m, x: m.b(m.a(x) + x), T, a=nn.Linear(6, 6), b=nn.Linear(6, 2)),
        "a",
        "is tied to the model's input",
    ),
    "constant": (
        net(
            lambda m, x: m.b(m.a(x) * torch.tensor([1.0, 2, 3, 4, 5])),
            T,
            a=nn.Linear(6, 5),
            b=nn.Linear(5, 2),
        ),
        "a",
        "no parameter or buffer (test_rules.py:",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_says_the_operation_and_the_line(kind: str) -> None:
    build, layer, words = REFUSED[kind]
    with pytest.raises(GraphError) as info:
        Graph(*build())
    reason = dict(line.strip().split(": ", 1) for line in str(info.value).splitlines()[1:])
    assert words in reason[layer]


def test_layers_that_only_training_runs_are_cut_along() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = conv(3, 6), nn.Linear(6, 2), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            out = self.b(x.mean((2, 3)))
            return (out, self.aux(x)) if self.training else out

    model = Aux()
    structures = Graph(model, X).structures
    surgery.remove(model, structures, {"a": [0, 4]}, example_inputs=X)
    assert [t.shape[1] for t in model.train()(X)] == [2, 2] and model.aux.in_channels == 4


def test_branches_that_the_input_chooses_are_united() -> None:
    model = Net(
        lambda m, x: m.c(m.a(x) + (m.b(x) if float(x.sum()) > 0 else 0)),
        a=nn.Linear(6, 5),
        b=nn.Linear(6, 5),
        c=nn.Linear(5, 2),
    )
    negative, positive = -torch.ones(1, 6), torch.ones(1, 6)
    structures = Graph(model, negative, more_inputs=[positive]).structures
    assert ("b.weight", 0) in {c.place for c in structures.groups["a"].couplings}
    surgery.remove(model, structures, {"a": [1]}, example_inputs=negative)
    assert model(positive).shape == (1, 2)
