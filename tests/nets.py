"""Small networks for the tests: hand-made ones by name, and a hypothesis strategy that makes random ones.

Every network here can be pruned exactly, unless it is listed in `INEXACT`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

torch.set_num_threads(1)  # small tensors: more threads only wait for each other


class Net(nn.Module):
    """Named layers and a function that runs them: `Net(lambda m, x: m.fc(x), fc=nn.Linear(3, 2))`."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Tensor) -> Any:
        return self.run(self, *args)


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Attention(nn.Module):
    """Fused queries, keys and values; scores scaled by a fixed number unless `by_width`."""

    def __init__(self, width: int, heads: int, by_width: bool = False) -> None:
        super().__init__()
        self.heads, self.by_width, self.scale = heads, by_width, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.by_width:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q @ k.transpose(-1, -2)) * self.scale).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """A transformer block with LayerNorm over the residual width."""

    def __init__(self, width: int, heads: int, by_width: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, by_width)
        self.norm2, self.fc1, self.fc2 = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """Patches, a class token and positions as bare parameters, encoder blocks."""

    def __init__(self, width: int = 12, heads: int = 3, blocks: int = 2, by_width: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(Encoder(width, heads, by_width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms, biases and running statistics values that differ, so that an error shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "bias" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=g).to(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(0.3 * torch.randn(b.shape, generator=g).to(b))
            elif name.endswith("running_var"):
                b.mul_(1 + torch.rand(b.shape, generator=g).to(b))
    return model


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------- hand-made nets


def plain() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ), image(2, 3, 6, 6)  # fmt: skip


def resnet() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), Residual(6, 6), Residual(6, 8, 2), Residual(8, 8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ), image(2, 3, 8, 8)  # fmt: skip


def vgg() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 9, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4),
    ), image(2, 3, 6, 6)  # fmt: skip


def mobile() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ), image(2, 3, 6, 6)  # fmt: skip


def grouped() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 5, 1), nn.Flatten(), nn.Linear(5 * 16, 3),
    ), image(2, 3, 6, 6)  # fmt: skip


def norms() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 9, 3), nn.PReLU(9),
        nn.InstanceNorm2d(9, affine=True, track_running_stats=True), nn.Conv2d(9, 6, 1), nn.PReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ), image(2, 3, 6, 6)  # fmt: skip


def transposed() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(6, 12, 2, 2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    ), image(2, 3, 6, 6)  # fmt: skip


def sound() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Conv1d(2, 6, 3, 2, 1), nn.BatchNorm1d(6), nn.ReLU(), nn.ConvTranspose1d(6, 5, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 6, 8), nn.ReLU(), nn.Linear(8, 3),
    ), image(2, 2, 10)  # fmt: skip


def volume() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 4, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 8, 3),
    ), image(2, 2, 4, 4, 4)  # fmt: skip


def concat() -> tuple[nn.Module, Any]:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = F.relu(m.a(x)), F.relu(m.b(x))
        c = F.relu(m.c(torch.cat([b, x, a, b], 1)))
        return m.out(torch.cat([c.flatten(1), a.mean((2, 3))], 1))

    return Net(
        run,
        a=nn.Conv2d(3, 5, 1),
        b=nn.Conv2d(3, 4, 3, padding=1),
        c=nn.Conv2d(16, 6, 4),
        out=nn.Linear(6 + 5, 3),
    ), image(2, 3, 4, 4)


def chunked() -> tuple[nn.Module, Any]:
    """Parts of a split that meet again in another order, some of them twice (YOLO's C2f)."""

    def run(m: Any, x: Tensor) -> Tensor:
        parts = list(F.relu(m.a(x)).chunk(2, 1))
        for inner in (m.b, m.c):
            parts.append(parts[-1] + inner(parts[-1]))
        return m.out(F.relu(m.d(torch.cat(parts[::-1], 1))))

    def bottleneck() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 1))

    return Net(
        run,
        a=nn.Conv2d(3, 8, 1),
        b=bottleneck(),
        c=bottleneck(),
        d=nn.Conv2d(16, 6, 1),
        out=nn.Conv2d(6, 2, 1),
    ), image(2, 3, 5, 5)


def gated() -> tuple[nn.Module, Any]:
    """A gated linear unit on tokens: the second part is read first."""

    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.up(x).chunk(2, -1)
        return m.down(torch.sigmoid(b) * a)

    return Net(run, up=nn.Linear(4, 14), down=nn.Linear(7, 3)), image(2, 6, 4)


def words() -> tuple[nn.Module, Any]:
    """An embedding tied to the output layer, and a bare parameter."""
    table = nn.Embedding(11, 8)
    head = nn.Linear(8, 11, bias=False)
    head.weight = table.weight

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.down(F.relu(m.up(m.table(x) * m.scale))))

    net = Net(
        run,
        table=table,
        up=nn.Linear(8, 10),
        down=nn.Linear(10, 8),
        head=head,
        scale=nn.Parameter(torch.rand(8)),
    )
    return net, torch.arange(10).reshape(2, 5)


def shared() -> tuple[nn.Module, Any]:
    """One layer called twice, two layers with one weight, two inputs, two outputs."""
    left, right = nn.Linear(6, 9), nn.Linear(6, 9)
    right.weight = left.weight

    def run(m: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
        x = F.relu(m.enter(x))
        x = F.relu(m.twice(F.relu(m.twice(x))))
        z = F.relu(m.left(x)) * F.relu(m.right(F.relu(m.second(y))))
        return {"sum": m.out(z), "parts": (m.more(x), y)}

    return Net(
        run, enter=nn.Linear(4, 6), twice=nn.Linear(6, 6), left=left, right=right, second=nn.Linear(5, 6),
        out=nn.Linear(9, 2), more=nn.Linear(6, 2),
    ), (image(3, 4), image(3, 5))  # fmt: skip


def vit() -> tuple[nn.Module, Any]:
    return Vit(), image(2, 3, 8, 8)


def mha() -> tuple[nn.Module, Any]:
    """torch's own attention: cutting its width changes the scale of its scores, which the queries take back."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.enter(x)
        return m.out(x + m.attn(x, x, x, need_weights=False)[0])

    attn = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True)
    return Net(run, enter=nn.Linear(5, 12), attn=attn, out=nn.Linear(12, 4)), image(2, 6, 5)


def layered() -> tuple[nn.Module, Any]:
    """A mean is taken off, which changes with the width: no scale takes that back."""
    return nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.Linear(12, 4)), image(2, 6, 5)


def rms() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(5, 12), nn.RMSNorm(12), nn.Linear(12, 4)), image(2, 6, 5)


#: name → (network, example inputs); removal is exact.
EXACT: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    make.__name__: make
    for make in [
        *(plain, resnet, vgg, mobile, grouped, norms, transposed, sound, volume),
        *(concat, chunked, gated, words, shared, vit, mha, rms),
    ]
}
#: Networks with layer groups that can only be cut with `allow_inexact=True`.
INEXACT: dict[str, Callable[[], tuple[nn.Module, Any]]] = {make.__name__: make for make in (vit, layered)}


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, Any]:
    """A hand-made network with lively values, in a dtype, in training mode."""
    torch.manual_seed(seed)
    model, x = {**EXACT, **INEXACT}[name]()
    return lively(model, seed).to(dtype), _cast(x, dtype)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple):
        return tuple(_cast(each, dtype) for each in x)
    return x.to(dtype) if x.is_floating_point() else x


# ------------------------------------------------------------------------------------------------ random nets


@dataclass(frozen=True)
class Piece:
    """One random block: its kind and a width that it may use."""

    kind: str
    width: int


PIECES = (
    "conv",
    "residual",
    "concat",
    "depthwise",
    "grouped",
    "groupnorm",
    "instance",
    "gate",
    "nested",
    "split",
)


class Chain(nn.Module):
    """Random pieces on (B, C, 4, 4), then flatten or pool, then two linear layers."""

    def __init__(self, pieces: tuple[Piece, ...], flatten: bool) -> None:
        super().__init__()
        self.pieces, channels = nn.ModuleList(), 3
        self.kinds = tuple(piece.kind for piece in pieces)
        for piece in pieces:
            self.pieces.append(_build(piece, channels))
            channels = piece.width
        self.flatten = flatten
        self.fc1 = nn.Linear(channels * 16 if flatten else channels, 7)
        self.fc2 = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        for piece in self.pieces:
            x = piece(x)
        return self.fc2(torch.tanh(self.fc1(x.flatten(1) if self.flatten else x.mean((2, 3)))))


def _conv(before: int, after: int, size: int = 3, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, size, padding=size // 2, groups=groups), nn.BatchNorm2d(after), nn.ReLU()
    )


def _build(piece: Piece, before: int) -> nn.Module:
    w = piece.width
    if piece.kind == "residual":
        return nn.Sequential(_conv(before, w), Residual(w, w))
    if piece.kind == "concat":
        return Net(
            lambda m, x: m.c(torch.cat([m.b(x), x, m.a(x)], 1)),
            a=_conv(before, w), b=_conv(before, 3, 1), c=_conv(w + 3 + before, w, 1),
        )  # fmt: skip
    if piece.kind == "depthwise":
        return nn.Sequential(_conv(before, w, 1), _conv(w, w, 3, groups=w))
    if piece.kind == "grouped":
        return nn.Sequential(_conv(before, w), _conv(w, w, 3, groups=2))
    if piece.kind == "groupnorm":
        return nn.Sequential(nn.Conv2d(before, w, 1), nn.GroupNorm(w // 2, w), nn.PReLU(w))
    if piece.kind == "instance":
        return nn.Sequential(nn.Conv2d(before, w, 1), nn.InstanceNorm2d(w, affine=True), nn.GELU())
    if piece.kind == "gate":
        gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(w, 4, 1), nn.ReLU(), nn.Conv2d(4, w, 1), nn.Sigmoid()
        )
        return Net(lambda m, x: (lambda y: y * m.gate(y))(m.conv(x)), conv=_conv(before, w), gate=gate)
    if piece.kind == "nested":
        return Net(
            lambda m, x: m.inner(x) + m.outer(x),
            inner=_build(Piece("concat", w), before),
            outer=_conv(before, w),
        )
    if piece.kind == "split":
        return Net(
            lambda m, x: (lambda a, b: m.c(torch.relu(b)) + m.d(a))(*m.a(x).chunk(2, 1)),
            a=_conv(before, 2 * w), c=_conv(w, w), d=_conv(w, w, 1),
        )  # fmt: skip
    return _conv(before, w)


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Random networks; widths are even and at least 4."""
    kinds = draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4))
    widths = draw(st.lists(st.sampled_from((4, 6, 8)), min_size=len(kinds), max_size=len(kinds)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model = Chain(tuple(Piece(k, w) for k, w in zip(kinds, widths, strict=True)), draw(st.booleans()))
    lively(model, draw(st.integers(0, 2**16)))
    return model
