"""Random stages on tokens (batch, length, width), for the fuzz test."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import Net


class OwnNorm(nn.Module):
    """RMSNorm as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class OwnLinear(nn.Module):
    """A linear layer that keeps its weight the other way round, and its width as a number."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = o, nn.Parameter(torch.randn(i, o) / 2), nn.Parameter(torch.zeros(o))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class LowRank(nn.Linear):
    """A linear layer with a product of two thin matrices beside it."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.down, self.up = nn.Parameter(torch.randn(3, i) / 2), nn.Parameter(torch.zeros(o, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


def norm(draw: random.Random, d: int) -> nn.Module:
    return draw.choice([nn.LayerNorm, nn.RMSNorm, OwnNorm, lambda d: nn.Identity()])(d)


def linear(draw: random.Random, i: int, o: int) -> nn.Module:
    kind = draw.random()
    if kind < 0.7:
        return nn.Linear(i, o, bias=draw.random() < 0.7)
    if kind < 0.8:
        return OwnLinear(i, o)
    return LowRank(i, o) if kind < 0.9 else nn.utils.parametrizations.weight_norm(nn.Linear(i, o))


def mlp(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    h = draw.choice([6, 8, 10])
    net = Net(
        lambda m, x: x + m.b(F.gelu(m.a(m.n(x)))),
        n=norm(draw, d),
        a=linear(draw, d, h),
        b=linear(draw, h, d),
    )
    return net, d


def gated_mlp(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    h = draw.choice([6, 8])

    def run(m: Any, x: Tensor) -> Any:
        y = m.n(x)
        if kind == 0:
            return x + m.down(F.silu(m.gate(y)) * m.up(y))
        a, b = m.both(y).chunk(2, -1)
        return x + m.down(F.silu(a) * b) if kind == 1 else x + m.down(F.glu(m.both(y), -1))

    kind = draw.randrange(3)
    return Net(
        run,
        n=norm(draw, d),
        gate=linear(draw, d, h),
        up=linear(draw, d, h),
        both=linear(draw, d, 2 * h),
        down=linear(draw, h, d),
    ), d


def widen(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    o = draw.choice([4, 8, 12])
    return nn.Sequential(linear(draw, d, o), nn.ReLU()), o


class Attention(nn.Module):
    """Attention as people write it: fused or apart, by SDPA or by products, some queries for one key."""

    def __init__(self, draw: random.Random, d: int) -> None:
        super().__init__()
        self.heads, self.width = draw.choice([2, 3, 4]), draw.choice([2, 4])
        self.shared = draw.choice([1, 1, 2])
        self.fused, self.kernel = draw.random() < 0.5, draw.random() < 0.5
        self.count, self.rotary = draw.randrange(3), draw.random() < 0.2
        inner, keys = self.heads * self.shared * self.width, self.heads * self.width
        if self.fused:
            self.shared, inner = 1, keys
            self.qkv = linear(draw, d, 3 * keys)
        else:
            self.q, self.k, self.v = linear(draw, d, inner), linear(draw, d, keys), linear(draw, d, keys)
        self.o = linear(draw, inner, d)
        self.inner = inner

    def split(self, x: Tensor, heads: int) -> Tensor:
        """Which of the numbers stand in the code differs."""
        b, n, c = x.shape
        shape = ((heads, -1), (-1, self.width), (heads, c // heads))[self.count]
        return x.view(b, n, *shape).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            b, n, _ = x.shape
            shape = ((3, self.heads, -1), (3, -1, self.width), (3, self.heads, self.width))[self.count]
            q, k, v = self.qkv(x).reshape(b, n, *shape).permute(2, 0, 3, 1, 4)
        else:
            q = self.split(self.q(x), self.heads * self.shared)
            k, v = self.split(self.k(x), self.heads), self.split(self.v(x), self.heads)
            if self.shared > 1:
                k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        if self.rotary:
            half = q.shape[-1] // 2
            q, k = (torch.cat([-t[..., half:], t[..., :half]], -1) + t for t in (q, k))
        if self.kernel:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) * self.width**-0.5).softmax(-1) @ v
        y = y.transpose(1, 2)
        return self.o(y.flatten(2) if self.count else y.reshape(*x.shape[:2], -1))


def attention(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    net = Net(lambda m, x: x + m.a(m.n(x)), n=norm(draw, d), a=Attention(draw, d))
    return net, d


def torch_attention(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    heads = 2 if d % 2 == 0 else 1
    layer = nn.MultiheadAttention(d, heads, batch_first=True, bias=draw.random() < 0.7)
    if draw.random() < 0.3:
        return nn.TransformerEncoderLayer(d, heads, 8, dropout=0.1, batch_first=True), d
    return Net(lambda m, x: x + m.a(x, x, x, need_weights=False)[0], a=layer), d


def cross_attention(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    """Learned queries read the tokens."""

    def run(m: Any, x: Tensor) -> Any:
        q = m.queries.expand(len(x), -1, -1)
        return (q @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x)

    queries = nn.Parameter(torch.randn(1, 3, 6))
    return Net(run, queries=queries, k=linear(draw, d, 6), v=linear(draw, d, 8)), 8


def token_mixing(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.LazyLinear(6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.gelu(self.a(x.transpose(1, 2)))).transpose(1, 2)

    return Mix(), d


def recurrent(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    kind, both = draw.choice([nn.LSTM, nn.GRU, nn.RNN]), draw.random() < 0.4
    layer = kind(d, 5, num_layers=draw.choice([1, 2]), bidirectional=both, batch_first=True)
    return Net(lambda m, x: m.r(x)[0], r=layer), 10 if both else 5


def cell(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    def run(m: Any, x: Tensor) -> Any:
        h = x.new_zeros(len(x), 5)
        found = []
        for t in range(x.shape[1]):
            h = m.c(x[:, t], h)
            found.append(h)
        return torch.stack(found, 1)

    return Net(run, c=nn.GRUCell(d, 5)), 5


def along_time(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    o = draw.choice([4, 6])
    return Net(lambda m, x: m.c(x.transpose(1, 2)).transpose(1, 2), c=nn.Conv1d(d, o, 3, padding=1)), o


def experts(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    def run(m: Any, x: Tensor) -> Any:
        gates = m.g(x).softmax(-1)
        hidden = torch.einsum("bnd,edh->bneh", x, m.i).relu()
        return x + torch.einsum("bneh,ehd,bne->bnd", hidden, m.o, gates)

    i, o = nn.Parameter(torch.randn(3, d, 6) / 2), nn.Parameter(torch.randn(3, 6, d) / 2)
    return Net(run, g=nn.Linear(d, 3), i=i, o=o), d


def listed_experts(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    def run(m: Any, x: Tensor) -> Any:
        gates = m.g(x).softmax(-1)
        return sum(gates[..., k : k + 1] * expert(x) for k, expert in enumerate(m.e))  # type: ignore[return-value]

    each = [nn.Sequential(nn.Linear(d, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(3)]
    return Net(run, g=nn.Linear(d, 3), e=nn.ModuleList(each)), 6


def bilinear(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    def run(m: Any, x: Tensor) -> Any:
        a, b = m.a(x), m.b(x)
        if kind == 0:
            return m.o((a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(2))
        return m.o(torch.einsum("bni,bnj->bnij", a, b).reshape(*x.shape[:2], -1))

    kind = draw.randrange(2)
    return Net(run, a=linear(draw, d, 4), b=linear(draw, d, 3), o=nn.Linear(12, 6)), 6


def scale_and_shift(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    """Modulation by what the tokens are on average."""

    def run(m: Any, x: Tensor) -> Any:
        scale, shift, gate = m.c(x.mean(1, keepdim=True)).chunk(3, -1)
        return x + gate * m.f(m.n(x) * (1 + scale) + shift)

    return Net(run, c=nn.Linear(d, 3 * d), n=norm(draw, d), f=linear(draw, d, d)), d


def sliced(draw: random.Random, d: int) -> tuple[nn.Module, int]:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        if kind == 0:
            return y[..., 2:] * y[..., :-2]
        if kind == 1:
            a, b, c = y.split([2, 4, 2], -1)
            return torch.cat([c, a * c, b], -1)
        if kind == 2:
            return y.unflatten(-1, (4, 2)).sum(-1)
        return y.view(*y.shape[:-1], 4, -1).mean(-2)

    kind = draw.randrange(4)
    return Net(run, a=linear(draw, d, 8)), (6, 8, 4, 2)[kind]


TOKENS: list[Callable[[random.Random, int], tuple[nn.Module, int]]] = [
    mlp, mlp, gated_mlp, widen, attention, attention, attention, torch_attention, cross_attention, token_mixing,
    recurrent, cell, along_time, experts, listed_experts, bilinear, scale_and_shift, sliced,
]  # fmt: skip
