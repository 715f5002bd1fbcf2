"""Random stages on feature maps (batch, channels, height, width), for the fuzz test."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from tests.nets import Net


def norm(draw: random.Random, c: int) -> nn.Module:
    return draw.choice(
        [
            lambda: nn.BatchNorm2d(c),
            lambda: nn.BatchNorm2d(c),
            lambda: nn.BatchNorm2d(c, affine=False),
            lambda: nn.BatchNorm2d(c, track_running_stats=False),
            lambda: nn.InstanceNorm2d(c, affine=True),
            lambda: nn.GroupNorm(2 if c % 2 == 0 else 1, c),
            lambda: nn.GroupNorm(1, c),
            lambda: nn.GroupNorm(c, c),
            nn.Identity,
        ]
    )()


def act(draw: random.Random, c: int) -> nn.Module:
    return draw.choice([nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, lambda: nn.PReLU(c), nn.PReLU, nn.Sigmoid])()


def wrapped(draw: random.Random, layer: nn.Module) -> nn.Module:
    """A layer whose weight is computed from others."""
    kind = draw.randrange(4)
    if kind == 0:
        return nn.utils.parametrizations.weight_norm(layer)
    if kind == 1:
        return nn.utils.parametrizations.spectral_norm(layer)
    if kind == 2:
        return nn.utils.prune.random_unstructured(layer, "weight", 0.3)
    return nn.utils.weight_norm(layer)


def conv(draw: random.Random, i: int, o: int) -> nn.Module:
    """A convolution of any kind that keeps the size of the map."""
    bias = draw.random() < 0.5
    k = draw.choice([1, 3])
    groups = draw.choice([1, 1, 1, 2, 4])
    if i % groups or o % groups:
        groups = 1
    layer: nn.Module = nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=bias)
    if draw.random() < 0.1:
        layer = nn.ConvTranspose2d(i, o, k, padding=k // 2, groups=groups, bias=bias)
    return wrapped(draw, layer) if draw.random() < 0.1 else layer


def block(draw: random.Random, i: int, o: int) -> nn.Sequential:
    return nn.Sequential(conv(draw, i, o), norm(draw, o), act(draw, o))


# -------------------------------------------------------------- each: (draw, channels) → (stage, channels after it)


def plain(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    o = draw.choice([4, 6, 8, 12])
    return block(draw, c, o), o


def residual(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    h = draw.choice([4, 8])
    if draw.random() < 0.3:
        o = draw.choice([4, 8, 12])
        return Net(lambda m, x: F.relu(m.f(x) + m.s(x)), f=block(draw, c, o), s=nn.Conv2d(c, o, 1)), o
    return Net(lambda m, x: x + m.f(x), f=nn.Sequential(block(draw, c, h), conv(draw, h, c))), c


def scaled_residual(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    gamma = nn.Parameter(torch.zeros(c, 1, 1) if draw.random() < 0.5 else torch.zeros(1))
    return Net(lambda m, x: x + m.g * m.f(x), f=block(draw, c, c), g=gamma), c


def padded_shortcut(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    """The shortcut of narrow residual networks: zeros beside the channels."""
    p = draw.choice([1, 2])
    return (
        Net(lambda m, x: m.f(x) + F.pad(x, (0, 0, 0, 0, p, p)), f=block(draw, c, c + 2 * p)),
        c + 2 * p,
    )


def depthwise(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    o, times = draw.choice([4, 8]), draw.choice([1, 1, 2])
    each = nn.Conv2d(c, times * c, 3, padding=1, groups=c)
    return nn.Sequential(each, norm(draw, times * c), act(draw, times * c), conv(draw, times * c, o)), o


def dense(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    g = draw.choice([2, 4])
    return Net(lambda m, x: torch.cat([x, m.f(x)], 1), f=block(draw, c, g)), c + g


def branches(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    a, b = draw.choice([2, 4, 6]), draw.choice([2, 4])
    net = Net(lambda m, x: torch.cat([m.a(x), m.b(x), m.a(x)], 1), a=block(draw, c, a), b=block(draw, c, b))
    return net, 2 * a + b


def cross_stage(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    h = draw.choice([2, 4])

    def run(m: Any, x: Tensor) -> Any:
        parts = list(m.enter(x).chunk(2, 1)) if draw_chunk else list(m.enter(x).split([h, h], 1))
        for f in (m.f, m.g):
            parts.append(parts[-1] + f(parts[-1]))
        return m.leave(torch.cat(parts, 1))

    draw_chunk = draw.random() < 0.5
    net = Net(
        run,
        enter=block(draw, c, 2 * h),
        f=block(draw, h, h),
        g=block(draw, h, h),
        leave=block(draw, 4 * h, c),
    )
    return net, c


def sliced(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    n = draw.randrange(1, 4)

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        if kind == 0:
            return torch.cat([y[:, :n] + m.s(x), y[:, n:]], 1)
        if kind == 1:
            return torch.cat([y[:, -n:], y[:, :-n]], 1)
        if kind == 2:
            return y[:, ::2] + y[:, 1::2]
        return y[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :]

    kind = draw.randrange(4)
    return Net(run, a=block(draw, c, 8), s=nn.Conv2d(c, n, 1)), 8 if kind < 2 else 4


def gated(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    o = draw.choice([4, 6])

    def run(m: Any, x: Tensor) -> Any:
        if kind == 0:
            return F.glu(m.f(x), 1)
        a, b = m.f(x).chunk(2, 1)
        return a * b.sigmoid() if kind == 1 else a.tanh() * b

    kind = draw.randrange(3)
    return Net(run, f=conv(draw, c, 2 * o)), o


def channel_attention(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    h = draw.choice([2, 4])

    def run(m: Any, x: Tensor) -> Any:
        if kind == 0:
            return x * m.b(F.relu(m.a(x.mean((2, 3), keepdim=True)))).sigmoid()
        if kind == 1:
            return x * m.d(F.relu(m.c(x.mean((2, 3))))).sigmoid()[:, :, None, None]
        if kind == 2:
            return x * m.d(F.relu(m.c(F.adaptive_avg_pool2d(x, 1).flatten(1)))).view(-1, c, 1, 1).sigmoid()
        if kind == 3:
            b, w, _, _ = x.shape
            return x * m.d(F.relu(m.c(x.amax((2, 3)).view(b, w)))).view(b, w, 1, 1)
        return x * m.e(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None].sigmoid()  # neighbours are mixed

    kind = draw.randrange(5)
    net = Net(
        run,
        a=nn.Conv2d(c, h, 1),
        b=nn.Conv2d(h, c, 1),
        c=nn.Linear(c, h),
        d=nn.Linear(h, c),
        e=nn.Conv1d(1, 1, 3, padding=1),
    )
    return net, c


def selective(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    """Two branches, weighed channel by channel."""

    def run(m: Any, x: Tensor) -> Any:
        parts = torch.stack([m.a(x), m.b(x)], 1)
        weights = m.w(parts.sum(1).mean((2, 3))).view(len(x), 2, -1).softmax(1)
        return (parts * weights[..., None, None]).sum(1)

    return Net(run, a=block(draw, c, 6), b=block(draw, c, 6), w=nn.Linear(6, 12)), 6


def shuffled(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    groups = draw.choice([2, 4])

    def run(m: Any, x: Tensor) -> Any:
        y = m.f(x)
        b, n, h, w = y.shape
        if kind == 0:
            return F.channel_shuffle(y, groups)
        if kind == 1:
            return y.view(b, groups, n // groups, h, w).transpose(1, 2).reshape(b, n, h, w)
        if kind == 2:
            return y.view(b, groups, -1, h, w).transpose(1, 2).reshape(b, -1, h, w)
        return y.view(b, groups, 8 // groups, h, w).transpose(1, 2).flatten(1, 2)

    kind = draw.randrange(4)
    return Net(run, f=block(draw, c, 8)), 8


def pixels(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    o = draw.choice([2, 3])
    shuffle = nn.Sequential(conv(draw, c, 4 * o), nn.PixelShuffle(2), conv(draw, o, o), nn.AvgPool2d(2))
    unshuffle = nn.Sequential(nn.PixelUnshuffle(2), conv(draw, 4 * c, o), nn.Upsample(scale_factor=2))
    return (shuffle if draw.random() < 0.5 else unshuffle), o


def resized(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    def run(m: Any, x: Tensor) -> Any:
        low = m.f(F.max_pool2d(x, 2))
        return torch.cat([F.interpolate(low, size=x.shape[-2:], mode="bilinear"), m.g(x)], 1)

    return Net(run, f=block(draw, c, 6), g=block(draw, c, 4)), 10


def shared(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    f = block(draw, c, c)
    if draw.random() < 0.5:
        return Net(lambda m, x: m.f(x) + m.f(m.f(x)), f=f), c
    return Net(lambda m, x: torch.cat([m.f(x), m.f(x.flip(3))], 1), f=f), 2 * c


def functional(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    w, b = nn.Parameter(torch.randn(6, c, 3, 3) / 3), nn.Parameter(torch.randn(6))

    def run(m: Any, x: Tensor) -> Any:
        weight = m.w if kind == 0 else (m.w - m.w.mean((1, 2, 3), keepdim=True)) if kind == 1 else m.w * m.s
        return F.conv2d(x, weight, m.b, padding=1)

    kind = draw.randrange(3)
    return Net(run, w=w, b=b, s=nn.Parameter(torch.ones(6, 1, 1, 1))), 6


def mixed_by_einsum(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    w = nn.Parameter(torch.randn(c, 6) / 2)
    return Net(lambda m, x: torch.einsum("bchw,co->bohw", x, m.w).relu(), w=w), 6


def maxout(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    o = draw.choice([4, 6])

    def run(m: Any, x: Tensor) -> Any:
        y = m.f(x)
        shape = (len(y), 2, -1) if first else (len(y), -1, 2)
        return y.view(*shape, *y.shape[2:]).amax(1 if first else 2)

    first = draw.random() < 0.5
    return Net(run, f=conv(draw, c, 2 * o)), o


def channels_last(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    def run(m: Any, x: Tensor) -> Any:
        y = m.d(x).permute(0, 2, 3, 1)
        return x + m.o(F.gelu(m.i(m.n(y)))).permute(0, 3, 1, 2)

    d = nn.Conv2d(c, c, 3, padding=1, groups=c)
    return Net(run, d=d, n=nn.LayerNorm(c), i=nn.Linear(c, 10), o=nn.Linear(10, c)), c


def spatial_attention(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    def run(m: Any, x: Tensor) -> Any:
        y = m.f(x)
        reduced = (
            torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
            if mean
            else m.one(y).repeat(1, 2, 1, 1)
        )
        return y * m.s(reduced).sigmoid()

    mean = draw.random() < 0.3
    return Net(run, f=block(draw, c, 6), one=nn.Conv2d(6, 1, 1), s=nn.Conv2d(2, 1, 3, padding=1)), 6


def pixel_attention(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    """Attention between pixels, heads in the channels."""
    heads, width = draw.choice([1, 2]), draw.choice([2, 4])
    n = heads * width

    def run(m: Any, x: Tensor) -> Any:
        b, _, h, w = x.shape
        parts = m.qkv(x).view(b, 3, heads if literal else -1, width, h * w)
        q, k, v = parts[:, 0], parts[:, 1], parts[:, 2]
        scores = (q.transpose(-1, -2) @ k * 0.5).softmax(-1)
        return x + m.o((v @ scores.transpose(-1, -2)).reshape(b, -1, h, w))

    literal = draw.random() < 0.5
    return Net(run, qkv=nn.Conv2d(c, 3 * n, 1), o=nn.Conv2d(n, c, 1)), c


def unfolded(draw: random.Random, c: int) -> tuple[nn.Module, int]:
    def run(m: Any, x: Tensor) -> Any:
        columns = F.unfold(x, 3, padding=1)
        return m.f(columns.transpose(1, 2)).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])

    return Net(run, f=nn.Linear(9 * c, 6)), 6


MAPS: list[Callable[[random.Random, int], tuple[nn.Module, int]]] = [
    plain, plain, plain, residual, residual, residual, scaled_residual, padded_shortcut, depthwise, dense, branches,
    cross_stage, sliced, gated, channel_attention, selective, shuffled, pixels, resized, shared, functional,
    mixed_by_einsum, maxout, channels_last, spatial_attention, pixel_attention, unfolded,
]  # fmt: skip
