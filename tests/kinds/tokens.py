"""Attention and other networks over tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kinds import kind
from tests.nets import Net, image

Made = tuple[nn.Module, Any]


def heads(x: Tensor, n: int) -> Tensor:
    """(batch, tokens, n · width) → (batch, n, tokens, width)."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


@kind(
    "fused attention: key and value in one layer, queries apart, 3 heads over pixels",
    {"enter": 7, "q": 4},
)
def cross_pixels() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        f = m.enter(x)
        b, _, h, w = f.shape
        k, v = m.kv(f).reshape(b, 2, 3, -1, h * w).transpose(-1, -2).unbind(1)
        q = m.q(f).reshape(b, 3, -1, h * w).transpose(-1, -2)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.out(y.transpose(-1, -2).reshape(b, -1, h, w))

    return Net(
        run,
        enter=nn.Conv2d(3, 7, 1),
        q=nn.Conv2d(7, 12, 1),
        kv=nn.Conv2d(7, 24, 1),
        out=nn.Conv2d(12, 2, 1),
    ), image(2, 3, 3, 5)


@kind("fused attention: heads last in the fused layer, head by head (q, k, v)", {"qkv": 5})
def head_major() -> Made:
    """Width of heads and number of heads are equal, and so is the number of tokens."""

    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(*x.shape[:2], 5, 3, -1).permute(3, 0, 2, 1, 4)
        w = (q @ k.mT / 2).softmax(-1)
        return m.out((w @ v).transpose(1, 2).reshape(*x.shape[:2], -1))

    return Net(run, qkv=nn.Linear(6, 75), out=nn.Linear(25, 3)), image(2, 5, 6)


@kind("attention by einsum with a weight of three dimensions", {"q": 3, "k": 4, "v": 5})
def einsum_heads() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in (m.q, m.k, m.v))
        a = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        return torch.einsum("bhts,bshd,hdo->bto", a, v, m.o)

    return Net(
        run,
        q=nn.Parameter(torch.randn(6, 3, 4) / 2),
        k=nn.Parameter(torch.randn(6, 3, 4) / 2),
        v=nn.Parameter(torch.randn(6, 3, 5) / 2),
        o=nn.Parameter(torch.randn(3, 5, 2)),
    ), image(2, 7, 6)


@kind("attention of one head, linear in the tokens", {"q": 6, "v": 4})
def linear_attention() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.q(x).relu(), m.k(x).relu(), m.v(x)
        return m.out(q @ (k.mT @ v))

    return Net(run, q=nn.Linear(5, 6), k=nn.Linear(5, 6), v=nn.Linear(5, 4), out=nn.Linear(4, 2)), image(
        2, 6, 5
    )


@kind("relative position bias: a table of (places, heads) read by a buffer of indices", {"qkv": 3})
def table_of_heads() -> Made:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 3
            self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 2)
            self.table = nn.Parameter(torch.randn(7, 3))
            place = torch.arange(4)
            self.register_buffer("where", place[:, None] - place + 3)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            bias = self.table[self.where.view(-1)].view(t, t, -1).permute(2, 0, 1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            return self.out(y.transpose(1, 2).reshape(b, t, -1))

    return Block(), image(2, 4, 6)


@kind("relative position bias: an embedding of distances, one number for each head (T5)", {"q": 4})
def distances() -> Made:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 12, bias=False) for _ in range(3))
            self.o, self.far = nn.Linear(12, 3), nn.Embedding(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
            place = torch.arange(x.shape[1])
            scores = q @ k.mT + self.far((place - place[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)
            return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

    return Block(), image(2, 5, 6)


@kind(
    "learned queries: a parameter repeated over the batch reads the tokens",
    {"query": 4, "q": 8, "lift": 5, "v": 8},
)
def reads() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        query = m.query.unsqueeze(0).repeat(len(x), 1, 1)
        y = F.scaled_dot_product_attention(m.q(m.lift(query).relu()), m.k(x), m.v(x), scale=1.0)
        return m.out(y)

    return Net(
        run,
        query=nn.Parameter(torch.randn(3, 4)),
        lift=nn.Linear(4, 5),
        q=nn.Linear(5, 8),
        k=nn.Linear(6, 8),
        v=nn.Linear(6, 8),
        out=nn.Linear(8, 2),
    ), image(2, 7, 6)


@kind("learned queries: the weight of an embedding, as a convolution over the tokens", {"enter": 6})
def slots() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        w = (y @ m.slots.weight.T).softmax(1)
        return m.out(torch.einsum("bts,btc->bsc", w, y).relu())

    return Net(run, enter=nn.Linear(4, 6), slots=nn.Embedding(6, 6), out=nn.Linear(6, 3)), image(2, 6, 4)


@kind(
    "mixer: the tokens are mixed by a convolution of one pixel",
    {"up": 9, "enter": 7, "wide": 10},
    {"down": "is tied to the model's input"},
)
def mixer() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)  # batch, tokens, channels
        y = y + m.down(F.gelu(m.up(y)))
        y = y + m.narrow(F.gelu(m.wide(y)))
        return m.out(y.mean(1))

    return Net(
        run,
        enter=nn.Linear(5, 7),
        up=nn.Conv1d(8, 9, 1),
        down=nn.Conv1d(9, 8, 1),
        wide=nn.Linear(7, 10),
        narrow=nn.Linear(10, 7),
        out=nn.Linear(7, 2),
    ), image(2, 8, 5)


@kind(
    "mixer: affine scale and shift instead of norms (ResMLP), rows mixed by einsum",
    {"enter": 6, "wide": 9},
    {"rows": "is tied to the model's input"},
)
def res_mlp() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        y = y + m.scale * torch.einsum("st,btc->bsc", m.rows, y * m.gain + m.shift)
        return m.out((y + m.narrow(m.wide(y).relu())).mean(1))

    return Net(
        run,
        enter=nn.Linear(5, 6),
        rows=nn.Parameter(torch.randn(6, 6)),
        gain=nn.Parameter(torch.randn(6)),
        shift=nn.Parameter(torch.zeros(1, 1, 6)),
        scale=nn.Parameter(torch.full((6,), 0.1)),
        wide=nn.Linear(6, 9),
        narrow=nn.Linear(9, 6),
        out=nn.Linear(6, 3),
    ), image(2, 6, 5)


@kind(
    "mixture of experts: a list, each one given the tokens that chose it",
    {"enter": 6, "experts.0.0": 8, "experts.1.0": 8, "experts.2.0": 8},
    {"gate": "is mixed by softmax (tokens.py:"},
)
def chosen() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x).flatten(0, 1)
        weight, best = m.gate(y).softmax(-1).topk(2, -1)
        out = torch.zeros_like(y)
        for e, expert in enumerate(m.experts):  # type: ignore[arg-type]
            rows, rank = torch.where(best == e)
            out.index_add_(0, rows, expert(y[rows]) * weight[rows, rank, None])
        return m.out(out).view(*x.shape[:2], -1)

    experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(3))
    return Net(run, enter=nn.Linear(5, 6), gate=nn.Linear(6, 3), experts=experts, out=nn.Linear(6, 2)), image(
        2, 9, 5
    )


@kind(
    "mixture of experts: stacked weights, softly mixed",
    {"enter": 5, "up": 7},
    {"gate": "is mixed by softmax (tokens.py:"},
)
def soft_experts() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        gates = m.gate(y).softmax(-1)
        h = torch.einsum("btc,ech->beth", y, m.up).relu()
        z = torch.einsum("beth,eho->beto", h, m.down)
        return torch.einsum("beto,bte->bto", z, gates)

    return Net(
        run,
        enter=nn.Linear(4, 5),
        gate=nn.Linear(5, 3),
        up=nn.Parameter(torch.randn(3, 5, 7) / 2),
        down=nn.Parameter(torch.randn(3, 7, 2)),
    ), image(2, 6, 4)


@kind(
    "state space: a scan written as a loop (Mamba)", {"enter": 6, "in_proj": 8, "x_proj": 4, "x_proj[0:]": 2}
)
def scan() -> Made:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rank, self.state = 2, 4
            self.enter, self.in_proj = nn.Linear(5, 6), nn.Linear(6, 16, bias=False)
            self.conv1d = nn.Conv1d(8, 8, 3, padding=2, groups=8)
            self.x_proj, self.dt_proj = nn.Linear(8, 2 + 2 * 4, bias=False), nn.Linear(2, 8)
            self.A_log, self.D = nn.Parameter(torch.rand(8, 4)), nn.Parameter(torch.randn(8))
            self.out_proj = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            length = x.shape[1]
            u, gate = self.in_proj(self.enter(x)).transpose(1, 2).chunk(2, dim=1)
            u = F.silu(self.conv1d(u)[..., :length])
            dt, b, c = self.x_proj(u.transpose(1, 2)).split([self.rank, self.state, self.state], -1)
            dt = F.softplus(self.dt_proj(dt)).transpose(1, 2)
            a = torch.exp(-torch.exp(self.A_log)[None, :, None, :] * dt[..., None])
            drive = (dt * u)[..., None] * b[:, None]
            state, outs = torch.zeros_like(drive[:, :, 0]), []
            for t in range(length):
                state = a[:, :, t] * state + drive[:, :, t]
                outs.append((state * c[:, t, None]).sum(-1))
            y = torch.stack(outs, -1) + self.D[:, None] * u
            return self.out_proj((y * F.silu(gate)).transpose(1, 2))

    return Scan(), image(2, 5, 5)


@kind("state space: gates of a minimal recurrent unit, summed in parallel", {"gate": 7, "enter": 6})
def minimal() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        z = torch.sigmoid(m.gate(y))
        keep = torch.cumprod(1 - z, 1)
        h = keep * torch.cumsum(z * m.new(y) / keep, 1)
        return m.out(h)

    return Net(
        run,
        enter=nn.Linear(4, 6),
        gate=nn.Linear(6, 7),
        new=nn.Linear(6, 7),
        out=nn.Linear(7, 2),
    ), image(2, 5, 4)


@kind(
    "ReZero: one number that starts at zero for each of two residual branches",
    {"enter": 6, "wide.0": 9, "wide.1": 9},
)
def re_zero() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        for k in range(2):
            y = torch.addcmul(y, m.alpha[k].expand_as(y), m.narrow[k](m.wide[k](y).relu()))  # type: ignore[index]
        return m.out(y)

    return Net(
        run,
        enter=nn.Conv1d(4, 6, 1),
        alpha=nn.Parameter(torch.zeros(2)),
        wide=nn.ModuleList(nn.Conv1d(6, 9, 3, padding=1) for _ in range(2)),
        narrow=nn.ModuleList(nn.Conv1d(9, 6, 1) for _ in range(2)),
        out=nn.Conv1d(6, 2, 1),
    ), image(2, 4, 6)


@kind("ReZero: a scale for each channel, on the shortcut, shaped (C, 1, 1, 1)", {"a": 5, "b": 4})
def skip_scale() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y * m.s + m.t * m.c(m.b(y).relu()))

    return Net(
        run,
        a=nn.Conv3d(2, 5, 1),
        b=nn.Conv3d(5, 4, 1),
        c=nn.Conv3d(4, 5, 1),
        s=nn.Parameter(torch.zeros(5, 1, 1, 1)),
        t=nn.Parameter(torch.zeros(1)),
        out=nn.Conv3d(5, 2, 1),
    ), image(2, 2, 3, 4, 5)


@kind("cross covariance: attention of channels over channels, heads by number (XCA)", {"qkv": 3, "enter": 6})
def cross_covariance() -> Made:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 3
            self.temperature = nn.Parameter(torch.ones(3, 1, 1))
            self.enter, self.qkv, self.proj = nn.Linear(5, 6), nn.Linear(6, 36), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            b, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            w = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
            return self.proj((w @ v).permute(0, 3, 1, 2).reshape(b, n, -1))

    return Block(), image(2, 7, 5)


@kind("cross covariance: three convolutions, heads by width, as many as wide", {"q": 4})
def cross_covariance_of_maps() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2).unflatten(1, (-1, 4)) for f in (m.q, m.k, m.v))
        w = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1)
        return m.out((w @ v).flatten(1, 2).unflatten(-1, x.shape[2:]))

    return Net(
        run,
        q=nn.Conv2d(3, 16, 1),
        k=nn.Conv2d(3, 16, 3, padding=1),
        v=nn.Conv2d(3, 16, 1),
        out=nn.Conv2d(16, 2, 1),
    ), image(2, 3, 4, 4)


@kind(
    "LoRA that merges: a gate on the module, the convolution merges in eval()",
    {"enter": 6, "layer": 5, "layer.down": 2},
)
def merging_convolution() -> Made:
    class Lora(nn.Conv1d):
        def __init__(self) -> None:
            super().__init__(6, 5, 3, padding=1)
            self.down, self.up = nn.Parameter(torch.randn(2, 18)), nn.Parameter(torch.randn(5, 2))
            self.merged = False

        def train(self, mode: bool = True) -> Any:
            if mode == self.merged:
                delta = (self.up @ self.down).view_as(self.weight)
                self.weight.data += -delta if mode else delta
                self.merged = not mode
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.merged:
                return super().forward(x)
            delta = (self.up @ self.down).view(self.weight.shape)
            return F.conv1d(x, self.weight + delta, self.bias, padding=1)

    return Net(
        lambda m, x: m.out(m.layer(m.enter(x)).relu()),
        enter=nn.Conv1d(4, 6, 1),
        layer=Lora(),
        out=nn.Conv1d(5, 2, 1),
    ), image(2, 4, 7)


@kind("LoRA that merges: DoRA, a length for each row", {"enter": 6, "length": 5, "down": 3})
def dora() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        w = m.base.weight + m.up.weight @ m.down.weight
        w = m.length * w / w.norm(dim=1, keepdim=True)
        return m.out(F.linear(m.enter(x), w).relu())

    return Net(
        run,
        enter=nn.Linear(4, 6),
        base=nn.Linear(6, 5, bias=False),
        down=nn.Linear(6, 3, bias=False),
        up=nn.Linear(3, 5, bias=False),
        length=nn.Parameter(torch.rand(5, 1)),
        out=nn.Linear(5, 2),
    ), image(3, 4)


@kind("tied weights: one table embeds and multiplies hidden states inside", {"table": 6})
def tied_inside() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.table(x)
        scores = (m.f(y).relu() @ m.table.weight.T).softmax(-1)
        return m.out(scores @ m.table.weight)

    return Net(run, table=nn.Embedding(9, 6), f=nn.Linear(6, 6), out=nn.Linear(6, 2)), torch.arange(8).view(
        2, 4
    )


@kind("tied weights: an autoencoder decodes with the transposed weights", {"a": 7, "b": 4})
def tied_autoencoder() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        z = m.b(m.a(x).relu()).relu()
        return F.linear(F.linear(z, m.b.weight.T, m.shift).relu(), m.a.weight.T)

    return Net(run, a=nn.Linear(5, 7), b=nn.Linear(7, 4), shift=nn.Parameter(torch.randn(7))), image(3, 5)


@kind(
    "heads in a fused layer: their numbers stand on a config that all blocks share",
    {"blocks.0.qkv[24:]": 3, "blocks.1.qkv[24:]": 3},
    {
        "blocks.0.qkv": "Config.width cannot follow: no module's own, which 2 modules share",
        "blocks.1.qkv": "Config.width cannot follow",
    },
)
def shared_config() -> Made:
    class Config:
        def __init__(self) -> None:
            self.heads, self.width = 4, 3

    class Block(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config = config
            self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            n = self.config.heads * self.config.width
            y = self.qkv(x)
            q, k, v = (heads(t, self.config.heads) for t in (y[..., :n], y[..., n : 2 * n], y[..., 2 * n :]))
            return x + self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    config = Config()
    return Net(
        lambda m, x: m.blocks[1](m.blocks[0](x)), blocks=nn.ModuleList((Block(config), Block(config)))
    ), image(2, 5, 6)


@kind(
    "cross covariance: heads that must fill the residual width",
    {"up": 7},
    {
        "xca.qkv": "nor with xca.num_heads following (the smaller model does not run (RuntimeError: shape '[2, 5, 12]'",
        "xca": "shape '[2, 5, 3, 4, -1]'",
        "enter": "shape '[2, 5, 11]'",
        "xca.proj": "shares its width",
        "down": "shares its width",
    },
)
def cross_covariance_in_a_block() -> Made:
    class Xca(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.temperature = 4, nn.Parameter(torch.ones(4, 1, 1))
            self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
            w = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature).softmax(-1)
            return self.proj((w @ v).permute(0, 3, 1, 2).reshape(b, n, c))

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        y = y + m.xca(m.norm(y))
        return m.out(y + m.down(m.up(y).relu()))

    return Net(
        run,
        enter=nn.Linear(6, 12),
        norm=nn.LayerNorm(12),
        xca=Xca(),
        up=nn.Linear(12, 7),
        down=nn.Linear(7, 12),
        out=nn.Linear(12, 2),
    ), image(2, 5, 6)


@kind("windows: partitioned and put back together, heads by width (Swin)", {"enter": 6, "qkv": 4, "o": 5})
def windows() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x).permute(0, 2, 3, 1)
        b, h, w, c = y.shape
        y = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = m.qkv(y).view(len(y), 4, 3, 2, -1).permute(2, 0, 3, 1, 4)
        z = m.o((((q @ k.mT) * 0.3).softmax(-1) @ v).transpose(1, 2).reshape(len(y), 4, -1))
        return m.out(z.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1))

    return Net(
        run, enter=nn.Conv2d(3, 6, 1), qkv=nn.Linear(6, 24), o=nn.Linear(8, 5), out=nn.Linear(5, 2)
    ), image(2, 3, 4, 4)


@kind("masked tokens: a few are gathered, and learned ones put in their places (MAE)", {"enter": 6, "b": 5})
def masked_tokens() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        keep = torch.arange(len(x) * 3).view(len(x), 3) % x.shape[1]
        y = torch.gather(y, 1, keep.unsqueeze(-1).repeat(1, 1, y.shape[-1]))
        y = torch.cat([y, m.mask.expand(len(x), 2, -1)], 1)
        return m.out(m.b(y).relu())

    return Net(
        run,
        enter=nn.Linear(4, 6),
        mask=nn.Parameter(torch.randn(1, 1, 6)),
        b=nn.Linear(6, 5),
        out=nn.Linear(5, 2),
    ), image(2, 5, 4)


@kind("masked tokens: read and written by a mask of true and false", {"enter": 6})
def chosen_tokens() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        mask = torch.arange(10).view(2, 5) % 3 > 0
        z = torch.zeros_like(y)
        z[mask] = m.b(y[mask]).relu()
        return m.out(y.masked_fill(~mask[..., None], 0) + z)

    return Net(run, enter=nn.Linear(4, 6), b=nn.Linear(6, 6), out=nn.Linear(6, 2)), image(2, 5, 4)


@kind("graph: messages along edges, gathered and added up", {"enter": 6, "message": 5, "update": 7})
def messages() -> Made:
    def run(m: Net, x: Tensor, edges: Tensor) -> Tensor:
        y, (source, target) = m.enter(x), edges
        sent = m.message(torch.cat([y[source], y[target]], -1)).relu()
        got = torch.zeros(len(x), sent.shape[-1], dtype=x.dtype).index_add(0, target, sent)
        got = got + torch.zeros_like(got).scatter_add_(0, target[:, None].expand_as(sent), sent)
        return m.out(m.update(torch.cat([y, got], -1)).relu())

    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])
    return Net(
        run,
        enter=nn.Linear(4, 6),
        message=nn.Linear(12, 5),
        update=nn.Linear(11, 7),
        out=nn.Linear(7, 2),
    ), (image(6, 4), edges)


@kind("graph: a sparse adjacency matrix as a buffer", {"a": 6, "b": 5})
def adjacency() -> Made:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
            self.register_buffer("edges", (torch.rand(7, 7) > 0.5).double().to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sparse.mm(self.edges, self.a(x)).relu()
            return self.out(self.b(y).relu())

    return Graph(), image(7, 4)


@kind(
    "heads: three widths cross in one layer, the outer one is a number in the code",
    {"enter": 7, "q": 4, "v": 5},
    {"k": "shape '[2, 5, 4, -1]'"},
)
def three_cross() -> Made:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = 3
            self.enter = nn.Linear(6, 7)
            self.q, self.k, self.v = nn.Linear(7, 48), nn.Linear(7, 16), nn.Linear(7, 20)
            self.out = nn.Linear(60, 2)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            x = self.enter(x)
            q = self.q(x).view(b, t, 4, self.shared, -1).permute(0, 2, 1, 3, 4).flatten(2, 3)
            k, v = (f(x).view(b, t, 4, -1).transpose(1, 2) for f in (self.k, self.v))
            y = (q @ k.mT).softmax(-1) @ v
            return self.out(y.view(b, 4, t, self.shared, -1).permute(0, 2, 1, 3, 4).flatten(2))

    return Shared(), image(2, 5, 6)
