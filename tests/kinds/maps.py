"""Index maps: shuffles, slices, splits, gates; convolutions of every kind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kinds import kind
from tests.nets import Net, image

Made = tuple[nn.Module, Any]


@kind(
    "split attention: three branches, weighted by a softmax over branches (SK)",
    {"branches.0": 6, "squeeze": 5},
)
def selective_kernel() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        parts = torch.stack([branch(x).relu() for branch in m.branches], 1)  # type: ignore[union-attr]
        z = m.squeeze(parts.sum(1).mean((2, 3))).relu()
        w = m.select(z).view(len(x), 3, -1, 1, 1).softmax(1)
        return m.out((parts * w).sum(1))

    return Net(
        run,
        branches=nn.ModuleList(nn.Conv2d(3, 6, k, padding=k // 2) for k in (1, 3, 5)),
        squeeze=nn.Linear(6, 5),
        select=nn.Linear(5, 18),
        out=nn.Conv2d(6, 2, 1),
    ), image(2, 3, 6, 6)


@kind(
    "split attention: grouped convolution, radix within the channels, sigmoid when alone",
    {"conv": 8, "fc": 4},
)
def radix() -> Made:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.radix = 2
            self.conv = nn.Conv1d(6, 16, 3, padding=1)
            self.fc, self.back = nn.Conv1d(8, 4, 1), nn.Conv1d(4, 16, 1)
            self.out = nn.Conv1d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).relu()
            parts = y.reshape(len(y), self.radix, -1, y.shape[-1])
            gap = parts.sum(1).mean(-1, keepdim=True)
            w = self.back(self.fc(gap).relu()).view(len(y), 1, self.radix, -1).transpose(1, 2)
            w = w.softmax(1).reshape(len(y), -1, 1)
            a, b = torch.split(w * y, y.shape[1] // 2, dim=1)
            return self.out((a + b).contiguous())

    return Split(), image(2, 6, 7)


@kind("channel shuffle: 3 groups in one dimension, by view and transpose", {"a": 2, "b": 3})
def shuffle_1d() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y.view(len(y), 3, -1, y.shape[-1]).transpose(1, 2).flatten(1, 2)
        return m.out(m.b(y))

    return Net(run, a=nn.Conv1d(3, 12, 1), b=nn.Conv1d(12, 6, 1, groups=2), out=nn.Conv1d(6, 2, 1)), image(
        2, 3, 5
    )


@kind("channel shuffle: einops style with the groups inside, channels last", {"a": 5})
def shuffle_last() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        left, right = y.chunk(2, -1)
        return m.b(left.relu() * right)

    return Net(run, a=nn.Linear(4, 10), b=nn.Linear(5, 3)), image(2, 3, 3, 4)


@kind("pixel shuffle: in one dimension, the factor outside the channels", {"a": 5})
def subpixel() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        b, c, t = y.shape
        y = y.view(b, 2, c // 2, t).permute(0, 2, 3, 1).reshape(b, c // 2, 2 * t)
        return m.b(y)

    return Net(run, a=nn.Conv1d(3, 10, 3), b=nn.Conv1d(5, 2, 3)), image(2, 3, 8)


@kind("pixel shuffle: space to depth by slices (YOLO's focus)", {"a": 4, "b": 5})
def focus() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = torch.cat([y[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)
        return m.out(m.b(y).relu())

    return Net(run, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(16, 5, 1), out=nn.Conv2d(5, 2, 1)), image(2, 3, 6, 4)


@kind(
    "unfold: windows of a signal by tensor.unfold, filtered by a predicted kernel",
    {"a": 6, "k": 5},
    {"kernel": "is mixed by softmax (maps.py:"},
)
def dynamic_filter() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        windows = m.a(x).unfold(-1, 3, 1)  # batch, channels, places, 3
        weight = m.kernel(m.k(x.mean(-1)).relu()).softmax(-1)
        return m.out((windows * weight[:, None, None]).sum(-1))

    return Net(
        run,
        a=nn.Conv1d(4, 6, 1),
        k=nn.Linear(4, 5),
        kernel=nn.Linear(5, 3),
        out=nn.Conv1d(6, 2, 1),
    ), image(2, 4, 7)


@kind(
    "unfold: involution, a kernel for every place and group",
    {"a": 4, "reduce": 3},
    {"span": "is seen as 2 × 4 by view (maps.py:"},
)
def involution() -> Made:
    class Involution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.groups = 2
            self.a, self.reduce = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 3, 1)
            self.span, self.out = nn.Conv2d(3, 2 * 9, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            b, _, h, w = x.shape
            weight = self.span(self.reduce(x).relu()).view(b, self.groups, 1, 9, h, w)
            y = F.unfold(self.a(x), 3, padding=1).view(b, self.groups, -1, 9, h, w)
            return self.out((weight * y).sum(3).flatten(1, 2))

    return Involution(), image(2, 3, 4, 5)


@kind(
    "gates: a gated temporal convolution, tanh and sigmoid halves (WaveNet)",
    {"a": 5},
    {"f": "its width is split by slice (maps.py:"},
)
def wavenet() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        both = m.f(F.pad(y, (2, 0)))
        z = torch.tanh(both[:, :6]) * torch.sigmoid(both[:, 6:])
        return m.out((y + m.back(z)).relu())

    return Net(
        run,
        a=nn.Conv1d(3, 5, 1),
        f=nn.Conv1d(5, 12, 3),
        back=nn.Conv1d(6, 5, 1),
        out=nn.Conv1d(5, 2, 1),
    ), image(2, 3, 6)


@kind("gates: glu in the middle of a channels-last map, halves interleaved", {"a": 6, "b": 7})
def interleaved_gate() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y[..., 0::2] * torch.sigmoid(y[..., 1::2])
        return m.out(F.glu(m.b(y), dim=-1))

    return Net(run, a=nn.Linear(3, 12), b=nn.Linear(6, 14), out=nn.Linear(7, 2)), image(2, 4, 4, 3)


@kind(
    "conditional convolution: kernels mixed by a softmax, one call for the whole batch",
    {"a": 6, "kernels": 4},
    {"route": "is mixed by softmax (maps.py:"},
)
def mixed_kernels() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        b, c, h, w = y.shape
        route = m.route(y.mean((2, 3))).softmax(-1)
        weight = torch.einsum("be,eoihw->boihw", route, m.kernels).flatten(0, 1)
        y = F.conv2d(y.reshape(1, b * c, h, w), weight, groups=b, padding=1)
        return m.out(y.view(b, -1, h, w))

    return Net(
        run,
        a=nn.Conv2d(3, 6, 1),
        route=nn.Linear(6, 3),
        kernels=nn.Parameter(torch.randn(3, 4, 6, 3, 3) / 3),
        out=nn.Conv2d(4, 2, 1),
    ), image(2, 3, 5, 5)


@kind(
    "conditional convolution: a flat table of kernels times a route (timm's CondConv)",
    {"a": 6, "route": 3},
    {"cond": "is seen as 5 × 6 by view (maps.py:"},
)
def flat_kernels() -> Made:
    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_channels, self.out_channels = 6, 5
            self.weight = nn.Parameter(torch.randn(3, 5 * 6 * 3) / 3)
            self.bias = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor, route: Tensor) -> Tensor:
            b, c, t = x.shape
            weight = (route @ self.weight).view(b * self.out_channels, self.in_channels, 3)
            bias = (route @ self.bias).view(-1)
            y = F.conv1d(x.reshape(1, b * c, t), weight, bias, groups=b, padding=1)
            return y.view(b, self.out_channels, t)

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(m.cond(y, torch.sigmoid(m.route(y.mean(-1)))).relu())

    return Net(run, a=nn.Conv1d(4, 6, 1), route=nn.Linear(6, 3), cond=Cond(), out=nn.Conv1d(5, 2, 1)), image(
        2, 4, 6
    )


@kind("channel multiplier: a depthwise convolution makes three of each channel", {"0": 5})
def multiplier() -> Made:
    return nn.Sequential(
        nn.Conv1d(3, 5, 1), nn.ReLU(), nn.Conv1d(5, 15, 3, groups=5), nn.BatchNorm1d(15), nn.ReLU(), nn.Conv1d(15, 2, 1)
    ), image(2, 3, 6)  # fmt: skip


@kind("channel multiplier: two of each voxel channel, then folded together again", {"a": 4})
def folded_multiplier() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.deep(m.a(x))
        return m.out(y.unflatten(1, (-1, 2)).amax(2))

    return Net(run, a=nn.Conv3d(2, 4, 1), deep=nn.Conv3d(4, 8, 1, groups=4), out=nn.Conv3d(4, 2, 1)), image(
        2, 2, 3, 3, 2
    )


@kind(
    "index maps: a split in three, the middle one goes on and the others meet",
    {"b": 4, "c": 2},
    {"a[3:]": "split_sizes=[3, 4, 3]", "a": "its width is split by split_with_sizes (maps.py:"},
)
def middle() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        left, mid, right = m.a(x).split([3, 4, 3], -1)
        return m.out(torch.cat([right * left, m.c(m.b(mid).relu())], -1))

    return Net(run, a=nn.Linear(5, 10), b=nn.Linear(4, 4), c=nn.Linear(4, 2), out=nn.Linear(5, 3)), image(
        2, 4, 5
    )


@kind("index maps: channels in reverse order, by flip", {"b": 6}, {"a": "is mixed by flip"})
def reverse() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(m.b(y + y.flip(1)).relu())

    return Net(run, a=nn.Conv1d(3, 5, 1), b=nn.Conv1d(5, 6, 1), out=nn.Conv1d(6, 2, 1)), image(2, 3, 4)


@kind(
    "index maps: two slices that overlap, of channels last",
    {"b": 5},
    {n: "its width is split by slice (maps.py:" for n in ("a", "a[3:]", "a[6:]")},
)
def overlap() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(m.b(y[..., :6]).relu() + m.c(y[..., 3:]))

    return Net(run, a=nn.Linear(4, 9), b=nn.Linear(6, 5), c=nn.Linear(6, 5), out=nn.Linear(5, 2)), image(
        2, 3, 3, 4
    )


@kind("index maps: a residual with zeros for the new channels, in front and behind", {"a": 4})
def padded_shortcut() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out((F.pad(y, (0, 0, 2, 2)) + m.b(y)).relu())

    return Net(run, a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(4, 8, 1), out=nn.Conv1d(8, 2, 1)), image(2, 3, 5)


@kind("index maps: written into slices of a new tensor", {"a": 4, "b": 5})
def written() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y, z = m.a(x), m.b(x)
        both = x.new_zeros(len(x), y.shape[1] + z.shape[1], x.shape[-1])
        both[:, : y.shape[1]] = y
        both[:, y.shape[1] :] = z
        return m.out(both)

    return Net(run, a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(3, 5, 1), out=nn.Conv1d(9, 2, 1)), image(2, 3, 5)


@kind("size coincidence: attention over the width of a map as wide as it is deep", {"q": 6, "v": 6})
def square() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (f(x).permute(0, 2, 3, 1).flatten(0, 1) for f in (m.q, m.k, m.v))
        y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
        return m.out(y.view(len(x), 6, 6, -1).permute(0, 3, 1, 2))

    return Net(
        run,
        q=nn.Conv2d(3, 6, 1),
        k=nn.Conv2d(3, 6, 1),
        v=nn.Conv2d(3, 6, 1),
        out=nn.Conv2d(6, 2, 1),
    ), image(6, 3, 6, 6)


@kind("size coincidence: gates of rows and columns, batch = channels = height = width", {"a": 5, "z": 4})
def coordinates() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        rows, columns = y.mean(3, keepdim=True), y.mean(2, keepdim=True).transpose(2, 3)
        z = m.z(torch.cat([rows, columns], 2)).relu()
        r, c = z.split([y.shape[2], y.shape[3]], 2)
        return m.out(y * torch.sigmoid(m.h(r)) * torch.sigmoid(m.w(c.transpose(2, 3))))

    return Net(
        run,
        a=nn.Conv2d(3, 5, 1),
        z=nn.Conv2d(5, 4, 1),
        h=nn.Conv2d(4, 5, 1),
        w=nn.Conv2d(4, 5, 1),
        out=nn.Conv2d(5, 2, 1),
    ), image(5, 3, 5, 5)


@kind("three factors: a bilinear layer of two widths", {"a": 6, "b": 5, "both": 7})
def three_factors() -> Made:
    return Net(
        lambda m, x: m.out(m.both(m.a(x), m.b(x)).relu()),
        a=nn.Linear(4, 6),
        b=nn.Linear(4, 5),
        both=nn.Bilinear(6, 5, 7),
        out=nn.Linear(7, 2),
    ), image(3, 4)


@kind("pooled and put back to where it was", {"a": 6})
def unpooled() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y, places = F.max_pool2d(m.a(x), 2, return_indices=True)
        return m.out(F.max_unpool2d(m.b(y).relu(), places, 2))

    return Net(run, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 6, 1), out=nn.Conv2d(6, 2, 1)), image(2, 3, 4, 4)


@kind(
    "mixed with its neighbours by a layer of torch's own",
    {"2": 5},
    {"0": "is slid over by avg_pool3d (LocalResponseNorm '1')"},
)
def neighbours() -> Made:
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.LocalResponseNorm(3), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)
    ), image(2, 3, 4, 4)


@kind("a state as wide as the code says", {"a": 6}, {"cell": "its width is written in new_zeros (maps.py:"})
def written_width() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            h, c = m.cell(m.a(x[:, t]), (h, c))
        return m.out(h)

    return Net(run, a=nn.Linear(4, 6), cell=nn.LSTMCell(6, 5), out=nn.Linear(5, 2)), image(3, 4, 4)


@kind(
    "coupling: halves change places, each moved by the other one (Glow)",
    {"enter": 3, "nets.0.0": 5, "nets.1.0": 5},
)
def couplings() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        for net in m.nets:  # type: ignore[union-attr]
            a, b = y.chunk(2, -1)
            s, t = net(a).chunk(2, -1)
            y = torch.cat([b * torch.sigmoid(s) + t, a], -1)
        return m.out(y)

    nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(2))
    return Net(run, enter=nn.Linear(4, 6), nets=nets, out=nn.Linear(6, 2)), image(3, 4)


@kind("complex numbers: modes of a Fourier transform, mixed by complex weights", {"a": 5, "w": 6})
def fourier() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        modes = torch.fft.rfft(y, dim=-1)[..., :3]
        modes = torch.einsum("bif,iof->bof", modes, torch.view_as_complex(m.w))
        return m.out((torch.fft.irfft(modes, n=y.shape[-1], dim=-1) + m.b(x)).relu())

    return Net(
        run,
        a=nn.Conv1d(3, 5, 1),
        w=nn.Parameter(torch.randn(5, 6, 3, 2)),
        b=nn.Conv1d(3, 6, 1),
        out=nn.Conv1d(6, 2, 1),
    ), image(2, 3, 8)


@kind("style: weights modulated for each image and divided by their length (StyleGAN)", {"a": 6, "w": 5})
def modulated() -> Made:
    def run(m: Net, x: Tensor, z: Tensor) -> Tensor:
        y = m.a(x)
        w = m.w * m.style(z)[:, None, :, None, None]
        w = w * (w.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        b, o = w.shape[:2]
        y = y.reshape(1, -1, *y.shape[2:])
        y = F.conv2d(y, w.reshape(b * o, *w.shape[2:]), padding=1, groups=b).view(b, o, *x.shape[2:])
        return m.out(F.leaky_relu(y))

    return Net(
        run,
        a=nn.Conv2d(3, 6, 1),
        style=nn.Linear(4, 6),
        w=nn.Parameter(torch.randn(5, 6, 3, 3)),
        out=nn.Conv2d(5, 2, 1),
    ), (image(2, 3, 5, 5), image(2, 4))


@kind("repeated: every channel twice, one after the other, and all of them twice", {"a": 5, "b": 4})
def repeated() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.b(m.a(x).repeat_interleave(2, 1).relu())
        return m.out(y.tile(1, 2, 1))

    return Net(run, a=nn.Conv1d(3, 5, 1), b=nn.Conv1d(10, 4, 1), out=nn.Conv1d(8, 2, 1)), image(2, 3, 6)


@kind(
    "outer product: of two widths, of which one can go",
    {"c": 3, "b": 7},
    {"a": "is seen as 8 × 3 in 'b.weight'"},
)
def outer() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(m.b((y.unsqueeze(-1) * m.c(y).unsqueeze(-2)).flatten(-2)).relu())

    return Net(run, a=nn.Linear(4, 8), c=nn.Linear(8, 3), b=nn.Linear(24, 7), out=nn.Linear(7, 2)), image(
        2, 3, 4
    )


@kind("turned: a map by a quarter, channels last", {"a": 6, "b": 5})
def turned() -> Made:
    return Net(
        lambda m, x: m.out(m.b(torch.rot90(m.a(x), 1, (1, 2))).relu()),
        a=nn.Linear(3, 6),
        b=nn.Linear(6, 5),
        out=nn.Linear(5, 2),
    ), image(2, 4, 4, 3)


@kind(
    "numbers in a list on the module: three parts of which two are added", {"f": 5, "f[10:]": 3, "enter": 7}
)
def listed_parts() -> Made:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [5, 5, 3]
            self.enter, self.f, self.out = nn.Conv1d(3, 7, 1), nn.Conv1d(7, 13, 1), nn.Conv1d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = self.f(self.enter(x)).split(self.sizes, 1)
            return self.out(torch.cat([a * b.sigmoid(), c.relu()], 1))

    return Parts(), image(2, 3, 6)
