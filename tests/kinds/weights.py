"""Weights that are computed, shared, masked, frozen, or of a class of one's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.kinds import kind
from tests.nets import Net, image

Made = tuple[nn.Module, Any]


@kind("weight norm: of a transposed convolution, along its outputs", {"0": 5, "2": 6})
def weight_norm_transposed() -> Made:
    b = parametrizations.weight_norm(nn.ConvTranspose1d(5, 6, 2, stride=2), dim=1)
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(3, 5, 1)), nn.ReLU(), b, nn.ReLU(), nn.Conv1d(6, 2, 1)
    ), image(2, 3, 5)


@kind("weight norm: written by hand, one length for all rows", {"g": 6})
def weight_norm_by_hand() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        w = m.g * m.v / m.v.norm(dim=1, keepdim=True)
        return m.out(F.linear(x, w, m.bias).relu())

    return Net(
        run,
        v=nn.Parameter(torch.randn(6, 4)),
        g=nn.Parameter(torch.rand(6, 1)),
        bias=nn.Parameter(torch.randn(6)),
        out=nn.Linear(6, 2),
    ), image(3, 4)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


class Squashed(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(n, 1))

    def forward(self, w: Tensor) -> Tensor:
        return torch.tanh(w) * self.scale


@kind("parametrization: a squashed weight with a scale of its own for each row", {"0": 7, "2": 5})
def squashed() -> Made:
    a = nn.Linear(4, 7)
    parametrize.register_parametrization(a, "weight", Squashed(7))
    return nn.Sequential(a, nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)), image(3, 4)


@kind(
    "parametrization: a symmetric weight in the middle",
    {"2": 5},
    {"0": "is cut to a triangle by triu (weights.py:", "1": "is cut to a triangle by triu (weights.py:"},
)
def symmetric() -> Made:
    a = nn.Linear(5, 5, bias=False)
    parametrize.register_parametrization(a, "weight", Symmetric())
    return nn.Sequential(nn.Linear(4, 5), a, nn.Linear(5, 5), nn.Linear(5, 2)), image(3, 4)


@kind("masks: of single weights and of whole rows (torch.nn.utils.prune)", {"0": 8, "2": 6})
def masked() -> Made:
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 1), nn.ReLU(), nn.Conv1d(6, 2, 1))
    prune.random_unstructured(net[0], "weight", 0.3)
    prune.random_unstructured(net[0], "bias", 0.3)
    prune.ln_structured(net[2], "weight", 0.4, n=2, dim=0)
    return net, image(2, 3, 7)


@kind("masks: a buffer of one's own times the weight, behind a batch-norm", {"a": 6, "b": 5})
def own_mask() -> Made:
    class Masked(nn.Linear):
        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o)
            self.register_buffer("mask", (torch.rand(o, i) > 0.3).float())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.mask, self.bias)

    return Net(
        lambda m, x: m.out(m.b(m.norm(m.a(x)).relu()).relu()),
        a=Masked(4, 6),
        norm=nn.BatchNorm1d(6),
        b=Masked(6, 5),
        out=nn.Linear(5, 2),
    ), image(5, 4)


@kind("functional weights: a generated bank of filters, each a mix of a few", {"a": 6, "mix": 5, "basis": 3})
def basis() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        weight = torch.tensordot(m.mix, m.basis, dims=1)  # 5, 6, 3
        return m.out(F.conv1d(m.a(x), weight, padding=1).relu())

    return Net(
        run,
        a=nn.Conv1d(4, 6, 1),
        mix=nn.Parameter(torch.randn(5, 3)),
        basis=nn.Parameter(torch.randn(3, 6, 3)),
        out=nn.Conv1d(5, 2, 1),
    ), image(2, 4, 6)


@kind("functional weights: the layers are slices of one tensor", {"bank": 5})
def bank() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        for k in range(3):
            y = y + F.linear(y, m.bank[k], m.shift[k]).relu()
        return m.out(y)

    return Net(
        run,
        enter=nn.Linear(4, 5),
        bank=nn.Parameter(torch.randn(3, 5, 5) / 3),
        shift=nn.Parameter(torch.randn(3, 5)),
        out=nn.Linear(5, 2),
    ), image(3, 4)


class Conv1D(nn.Module):
    """(in, out), applied to the channels of maps, keeps both sizes."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.ni, self.no = i, o
        self.kernel, self.shift = nn.Parameter(torch.randn(i, o) / 2), nn.Parameter(torch.randn(o))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2).reshape(-1, self.ni) @ self.kernel + self.shift
        return y.view(len(x), -1, self.no).transpose(1, 2).unflatten(2, x.shape[2:])


@kind("own linear class: views by both of its sizes, on maps", {"0.kernel": 6, "2.kernel": 5})
def own_linear() -> Made:
    return nn.Sequential(Conv1D(3, 6), nn.ReLU(), Conv1D(6, 5), nn.ReLU(), Conv1D(5, 2)), image(2, 3, 4, 2)


class Equalised(nn.Module):
    """A linear layer whose weight is scaled by what goes in, a buffer; heads of a bilinear form."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.zeros(o))
        self.gain = i**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x, (self.w * self.gain).t())


@kind("own linear class: a bilinear form of two equalised layers", {"a.w": 5, "b.w": 6, "f": 4})
def bilinear() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(torch.einsum("bi,oij,bj->bo", m.a(x), m.f, m.b(x)).relu())

    return Net(
        run,
        a=Equalised(3, 5),
        b=Equalised(3, 6),
        f=nn.Parameter(torch.randn(4, 5, 6)),
        out=Equalised(4, 2),
    ), image(3, 3)


class Frozen(nn.Module):
    """Batch-norm of buffers only."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(n) + 0.5)
        self.register_buffer("bias", torch.randn(n))
        self.register_buffer("running_mean", torch.randn(n))
        self.register_buffer("running_var", torch.rand(n) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(shape) + (self.bias - self.running_mean * scale).view(shape)


@kind("frozen batch-norm: in three dimensions, its shift is no zero", {"a": 5, "b": 4})
def frozen_3d() -> Made:
    return Net(
        lambda m, x: m.out(m.n2(m.b(m.n1(m.a(x)).relu())).relu()),
        a=nn.Conv3d(2, 5, 1, bias=False),
        n1=Frozen(5),
        b=nn.Conv3d(5, 4, 1, bias=False),
        n2=Frozen(4),
        out=nn.Conv3d(4, 2, 1),
    ), image(2, 2, 3, 2, 4)


@kind(
    "frozen batch-norm: folded into the weight before the convolution, and a residual",
    {"a.conv": 5, "b.conv": 7},
)
def folded() -> Made:
    class Folded(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(i, o, 3, padding=1, bias=False), nn.BatchNorm1d(o)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
            bias = self.bn.bias - self.bn.running_mean * scale
            return F.conv1d(x, self.conv.weight * scale[:, None, None], bias, padding=1)

    return Net(
        lambda m, x: m.out((lambda y: y + m.c(m.b(y).relu()))(m.a(x)).relu()),
        a=Folded(3, 5),
        b=Folded(5, 7),
        c=Folded(7, 5),
        out=nn.Conv1d(5, 2, 1),
    ), image(2, 3, 6)


@kind("weight standardisation: mean and variance over the inputs of each row", {"0": 6, "2": 5})
def standardised() -> Made:
    class Standard(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            mean = w.mean((1, 2, 3), keepdim=True)
            std = w.var((1, 2, 3), keepdim=True, unbiased=False).add(1e-6).sqrt()
            return F.conv2d(x, (w - mean) / std, self.bias, padding=1)

    return nn.Sequential(
        Standard(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)
    ), image(2, 3, 5, 4)


@kind("weight standardisation: by batch_norm on a reshaped weight, with a gain (timm)", {"a": 6})
def scaled_standardised() -> Made:
    class Scaled(nn.Conv1d):
        def __init__(self, *a: Any, **k: Any) -> None:
            super().__init__(*a, **k)
            self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1))
            self.scale = self.weight[0].numel() ** -0.5

        def forward(self, x: Tensor) -> Tensor:
            w = F.batch_norm(
                self.weight.reshape(1, self.out_channels, -1), None, None,
                weight=(self.gain * self.scale).view(-1), training=True, momentum=0.0, eps=1e-6,
            ).reshape_as(self.weight)  # fmt: skip
            return F.conv1d(x, w, self.bias)

    return Net(lambda m, x: m.out(m.a(x).relu()), a=Scaled(3, 6, 3), out=nn.Conv1d(6, 2, 1)), image(2, 3, 5)


@kind("divided by: a learned scale that must not be zero", {"a": 6})
def divided() -> Made:
    return Net(
        lambda m, x: m.out(((m.a(x) - m.mean) / m.scale).relu()),
        a=nn.Linear(4, 6),
        mean=nn.Parameter(torch.randn(6)),
        scale=nn.Parameter(torch.rand(6) + 0.5),
        out=nn.Linear(6, 2),
    ), image(3, 4)


@kind("divided by: rows without a length are normalised, and a small number guards them", {"a": 6, "w": 5})
def cosine() -> Made:
    return Net(
        lambda m, x: m.out(F.linear(m.a(x), F.normalize(m.w, dim=1)).relu()),
        a=nn.Linear(4, 6),
        w=nn.Parameter(torch.randn(5, 6)),
        out=nn.Linear(5, 2),
    ), image(3, 4)


class Orthogonal(nn.Module):
    """Ten steps of Newton and Schulz, each of three products of the last one."""

    def forward(self, w: Tensor) -> Tensor:
        w = w / w.norm()
        for _ in range(10):
            gram = w.T @ w
            w = 1.5 * w - 0.5 * w @ gram
        return w


@kind(
    "parametrization: made orthogonal step by step",
    {"0": 6, "1": 5, "2": 4},
)
def orthogonal() -> Made:
    a = nn.Linear(6, 5)
    parametrize.register_parametrization(a, "weight", Orthogonal())
    return nn.Sequential(nn.Linear(4, 6), a, nn.Linear(5, 4), nn.Linear(4, 2)), image(3, 4)


@kind("weight norm: beside a shortcut, so that what goes in is what comes out", {"enter": 6, "wide": 7})
def weight_norm_beside() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        y = y + m.square(y.relu())
        return m.out(y + m.narrow(m.wide(y).relu()))

    return Net(
        run,
        enter=nn.Conv1d(4, 6, 1),
        square=parametrizations.weight_norm(nn.Conv1d(6, 6, 3, padding=1)),
        wide=nn.Conv1d(6, 7, 1),
        narrow=parametrizations.weight_norm(nn.Conv1d(7, 6, 1)),
        out=nn.Conv1d(6, 2, 1),
    ), image(2, 4, 6)
