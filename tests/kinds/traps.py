"""Readers that one evaluation hides, proofs that could be blind, forwards that write, helpers of torch that fail."""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.kinds import kind
from tests.nets import Net, image

Made = tuple[nn.Module, Any]
CHANGES = "changes what is left"
SILENT = "does not react"


# ------------------------------------------------------------------- A: what one evaluation forward does not show


@kind(
    "hidden reader: deep supervision, the last head alone answers in evaluation",
    {"enter": 5, "heads.0.0": 4, "blocks.0": 6, "heads.1.0": 4, "blocks.1": 6},
)
def deep_supervision() -> Made:
    def run(m: Net, x: Tensor) -> Any:
        y, said = m.enter(x).relu(), []
        for head, block in zip(m.heads, m.blocks, strict=True):  # type: ignore[arg-type]
            if m.training:
                said.append(head(y.detach()))
            y = block(y).relu()
        return [m.out(y), *said]

    return Net(
        run,
        enter=nn.Conv3d(2, 5, 1),
        heads=nn.ModuleList(nn.Sequential(nn.Conv3d(n, 4, 1), nn.ReLU(), nn.Conv3d(4, 2, 1)) for n in (5, 6)),
        blocks=nn.ModuleList((nn.Conv3d(5, 6, 1), nn.Conv3d(6, 6, 1))),
        out=nn.Conv3d(6, 2, 1),
    ), image(2, 2, 3, 2, 4)


@kind(
    "hidden reader: layers that training drops at random", {"enter": 6, "wide.0": 8, "wide.1": 8, "wide.2": 8}
)
def layer_drop() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        for wide, narrow in zip(m.wide, m.narrow, strict=True):  # type: ignore[arg-type]
            if m.training and random.random() < 0.5:
                continue
            y = y + narrow(wide(y).relu())
        return m.out(y)

    return Net(
        run,
        enter=nn.Linear(4, 6),
        wide=nn.ModuleList(nn.Linear(6, 8) for _ in range(3)),
        narrow=nn.ModuleList(nn.Linear(8, 6) for _ in range(3)),
        out=nn.Linear(6, 2),
    ), image(3, 4)


@kind("hidden reader: a norm for clean and one for adversarial examples (AdvProp)", {"a": 5, "b": 6})
def split_norms() -> Made:
    class Split(nn.BatchNorm1d):
        def __init__(self, n: int) -> None:
            super().__init__(n)
            self.aux = nn.BatchNorm1d(n)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return super().forward(x)
            clean, other = x.split(len(x) // 2)
            return torch.cat([super().forward(clean), self.aux(other)])

    return Net(
        lambda m, x: m.out(m.n2(m.b(m.n1(m.a(x)).relu())).relu()),
        a=nn.Linear(4, 5), n1=Split(5), b=nn.Linear(5, 6), n2=Split(6), out=nn.Linear(6, 2),
    ), image(6, 4)  # fmt: skip


# ---------------------------------------------------------------------------------------- C: proofs that are blind


def wrong(m: Net, x: Tensor) -> Tensor:
    """Every channel of `a` hangs on how many there are; `b` can be cut."""
    y = m.a(x).relu()
    return m.out(m.b(y - y.sum(-1, keepdim=True) / y.shape[-1]).relu())


def blind(run: Any, **layers: nn.Module) -> Made:
    return Net(run, a=nn.Linear(5, 9), b=nn.Linear(9, 7), out=nn.Linear(7, 4), **layers), image(3, 5)


@kind("blind proof: a large constant is added to what comes out", {}, {"a": SILENT, "b": SILENT})
def lifted() -> Made:
    return blind(lambda m, x: wrong(m, x) + 1e6)


@kind("blind proof: rounded to integers, kept as floats", {"b": 7}, {"a": CHANGES})
def rounded() -> Made:
    return blind(lambda m, x: (wrong(m, x) * 8).round() / 8)


@kind("blind proof: squeezed through a saturated sigmoid", {}, {"a": SILENT, "b": SILENT})
def saturated() -> Made:
    return blind(lambda m, x: torch.sigmoid(wrong(m, x) + 20))


@kind("blind proof: a sum of squares over everything, one number", {"b": 7, "out": 4}, {"a": CHANGES})
def one_number() -> Made:
    return blind(lambda m, x: {"loss": wrong(m, x).square().sum()})


@kind("blind proof: kept for the largest of 400 places only", {"b": 7}, {"a": CHANGES})
def sparse_output() -> Made:
    return blind(lambda m, x: F.pad(wrong(m, x), (0, 396)) + torch.linspace(0, 1e4, 400))


# -------------------------------------------------------------------- F: forwards that write, G: what torch refuses


@kind("forward writes: a list and a counter on the module, a dictionary of features", {"a": 6, "b": 5})
def keeps_features() -> Made:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
            self.seen: list[Tensor] = []
            self.features: dict[str, Tensor] = {}
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.features["a"] = y = self.a(x).relu()
            self.seen.append(y)
            return self.out(self.b(self.features["a"]).relu())

    return Keeps(), image(3, 4)


@kind("forward writes: the rows of a table are shortened to a largest norm", {"a": 7, "table": 6})
def renormalised() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.a(m.table(x)).relu())

    table = nn.Embedding(9, 6, max_norm=1.0)
    return Net(run, table=table, a=nn.Linear(6, 7), out=nn.Linear(7, 2)), torch.arange(8).view(2, 4)


@kind("forward writes: weights are clipped in place before they are used", {"a": 7, "b": 6})
def clipped() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        for layer in (m.a, m.b):
            layer.weight.data.clamp_(-0.2, 0.2)  # type: ignore[union-attr]
        return m.out(m.b(m.a(x).relu()).relu())

    return Net(run, a=nn.Linear(4, 7), b=nn.Linear(7, 6), out=nn.Linear(6, 2)), image(3, 4)


@kind(
    "forward writes: a codebook that training moves (VQ), nearest by distance",
    {"a": 7, "b": 6},
    {"z": "Codes 'codes' mixes its whole width"},
)
def codebook() -> Made:
    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randn(8, 3))
            self.register_buffer("count", torch.ones(8))

        def forward(self, z: Tensor) -> Tensor:
            best = torch.cdist(z, self.codes).argmin(-1)
            if self.training:
                hot = F.one_hot(best, 8).to(z)
                self.count.mul_(0.9).add_(hot.sum(0), alpha=0.1)
                self.codes.data.copy_(self.codes * 0.9 + 0.1 * (hot.T @ z) / (self.count[:, None] + 1e-3))
            return z + (self.codes[best] - z).detach()

    return Net(
        lambda m, x: m.out(m.b(m.codes(m.z(m.a(x).relu()))).relu()),
        a=nn.Linear(4, 7), z=nn.Linear(7, 3), codes=Codes(), b=nn.Linear(3, 6), out=nn.Linear(6, 2),
    ), image(9, 4)  # fmt: skip


@kind(
    "forward writes: the input is centred in place, noise comes from a generator of the model's own",
    {"a": 6, "b": 5},
)
def centred_in_place() -> Made:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
            self.draw = torch.Generator().manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            x -= x.mean(0)
            y = self.a(x).relu()
            if self.training:
                y = y + 0.1 * torch.randn(len(y), 1, generator=self.draw, dtype=y.dtype)
            return self.out(self.b(y).relu())

    return Noisy(), image(3, 4)


@kind(
    "torch's helpers: forces are the gradient of an energy",
    {"a": 7, "b": 6},
    {"out": "has a single structure"},
)
def forces() -> Made:
    def run(m: Net, x: Tensor) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = m.out(torch.tanh(m.b(torch.tanh(m.a(x))))).sum()
            force = torch.autograd.grad(energy, x, create_graph=torch.is_grad_enabled())[0]
        return energy, force

    return Net(run, a=nn.Linear(3, 7), b=nn.Linear(7, 6), out=nn.Linear(6, 1)), image(4, 3)


@kind("torch's helpers: an ensemble by vmap over stacked weights", {"a": 7, "w": 6})
def ensemble() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        z = vmap(lambda w, v: F.linear(F.linear(y, w).relu(), v))(m.w, m.v)
        return z.mean(0)

    return Net(
        run,
        a=nn.Linear(4, 7),
        w=nn.Parameter(torch.randn(3, 6, 7)),
        v=nn.Parameter(torch.randn(3, 2, 6)),
    ), image(3, 4)


@kind("torch's helpers: functional_call with weights that a hyper-network shifts", {"a": 7, "h": 5})
def shifted() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        shift = m.hyper(m.h(x.mean(0)).relu())
        y = functional_call(m.a, {"weight": m.a.weight, "bias": m.a.bias + shift}, (x,))  # type: ignore[arg-type,union-attr,operator]
        return m.out(y.relu())

    return Net(run, a=nn.Linear(4, 7), h=nn.Linear(4, 5), hyper=nn.Linear(5, 7), out=nn.Linear(7, 2)), image(
        3, 4
    )


@kind("torch's helpers: a packed sequence through a recurrent layer", {"enter": 6, "r": 5})
def packed_sequence() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(m.enter(x), torch.tensor([5, 3, 2]), batch_first=True)
        y, _ = pad_packed_sequence(m.r(packed)[0], batch_first=True)
        return m.out(y)

    return Net(run, enter=nn.Linear(4, 6), r=nn.GRU(6, 5, batch_first=True), out=nn.Linear(5, 2)), image(
        3, 5, 4
    )


@kind("torch's helpers: a layer in TorchScript in the middle", {"a": 6, "b": 5})
def scripted() -> Made:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        inner = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    return Net(
        lambda m, x: m.out(m.b(m.a(x) + m.inner(m.a(x))).relu()),
        a=nn.Linear(4, 6), inner=inner, b=nn.Linear(6, 5), out=nn.Linear(5, 2),
    ), image(3, 4)  # fmt: skip


# ----------------------------------------------------------------------------- H: what allow_inexact must not open


class MeanNorm(nn.Module):
    """Called a norm; divides by how many channels there are, and adds that number."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.sum(-1, keepdim=True) / x.shape[-1] + x.shape[-1]


@kind("called a norm: hangs on the number of channels", {"b": 6}, {"a": ""}, allow_inexact=True)
def number_of_channels() -> Made:
    return Net(
        lambda m, x: m.out(m.b(m.norm(m.a(x)).relu()).relu()),
        a=nn.Linear(4, 7), norm=MeanNorm(), b=nn.Linear(7, 6), out=nn.Linear(6, 2),
    ), image(3, 4)  # fmt: skip


@kind(
    "heads by width: three heads become two under the switch, tokens of the batch mixed",
    {"q": 3, "o": 6},
    {"k": "is mixed by softmax", "v": "is mixed by softmax"},
    allow_inexact=True,
)
def scrambled() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(len(x), -1, 3).softmax(-1) for f in (m.q, m.k, m.v))
        y = (q @ k.mT / 3**0.5).softmax(-1) @ v
        return m.out(m.o(y.flatten(1)).relu())

    return Net(
        run,
        q=nn.Linear(4, 9), k=nn.Linear(4, 9), v=nn.Linear(4, 9), o=nn.Linear(9, 6), out=nn.Linear(6, 2),
    ), image(3, 4)  # fmt: skip


# -------------------------------------------------------------------- I: sizes that are equal and mean other things


@kind("size coincidence: batch, tokens, heads and their width are all four", {"qkv": 4, "enter": 4, "up": 4})
def all_four() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        q, k, v = m.qkv(y).unflatten(-1, (3, -1, 4)).movedim(2, 0).transpose(2, 3)
        z = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = y + m.back(z)
        return m.out(y + m.down(m.up(y).relu()))

    return Net(
        run,
        enter=nn.Linear(4, 4), qkv=nn.Linear(4, 48), back=nn.Linear(16, 4), up=nn.Linear(4, 4), down=nn.Linear(4, 4),
        out=nn.Linear(4, 4),
    ), image(4, 4, 4)  # fmt: skip


@kind("size coincidence: a layer scale of C behind a map C by C", {"a": 5, "b": 5})
def scale_of_a_square() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).permute(0, 2, 3, 1)
        y = y + m.s * m.c(m.b(y).relu())
        return m.out(y.permute(0, 3, 1, 2).mean((2, 3)))

    return Net(
        run,
        a=nn.Conv2d(5, 5, 1), b=nn.Linear(5, 5), c=nn.Linear(5, 5), s=nn.Parameter(torch.full((5,), 1e-6)),
        out=nn.Linear(5, 5),
    ), image(5, 5, 5, 5)  # fmt: skip


@kind("hidden reader: branches with norms in training, one folded convolution in evaluation", {"0": 6})
def folded_for_evaluation() -> Made:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 1, bias=False)
            self.norms = nn.ModuleList((nn.BatchNorm2d(6), nn.BatchNorm2d(6)))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.norms[0](self.wide(x)) + self.norms[1](self.narrow(x)) + x
            weight: Any = 0
            bias: Any = 0
            for conv, norm, pad in zip((self.wide, self.narrow), self.norms, (0, 1), strict=True):
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                weight = weight + F.pad(conv.weight * scale[:, None, None, None], [pad] * 4)
                bias = bias + norm.bias - norm.running_mean * scale
            return F.conv2d(x, weight, bias, padding=1) + x

    return nn.Sequential(nn.Conv2d(3, 6, 1), Folded(), nn.ReLU(), Folded(), nn.Conv2d(6, 2, 1)), image(
        2, 3, 5, 5
    )


@kind("hidden reader: training reads two widths at once", {"a": 6, "b": 5})
def joined_in_training() -> Made:
    def run(m: Net, x: Tensor) -> Any:
        y = m.a(x).relu()
        z = m.b(y).relu()
        return (m.out(z), m.aux(torch.cat([y, z], -1))) if m.training else m.out(z)

    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 5), out=nn.Linear(5, 2), aux=nn.Linear(11, 3)), image(
        3, 4
    )


def centred(y: Tensor) -> Tensor:
    return y - y.sum(-1, keepdim=True) / y.shape[-1]


@kind("blind proof: all that is read is whether it is above zero", {"b": 7}, {"a": CHANGES})
def compared() -> Made:
    return blind(lambda m, x: m.out(m.b((centred(m.a(x)) > 0).to(x)).relu()))


@kind("blind proof: quantised between the layers", {"b": 7}, {"a": CHANGES})
def quantised() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        y = torch.fake_quantize_per_tensor_affine(centred(m.a(x)), 0.5, 0, -8, 7)
        return m.out(m.b(y).relu())

    return blind(run)


@kind("forward writes: a layer that is made when it is first needed", {"a": 6})
def made_late() -> Made:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
            self.act: nn.Module | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.act is None:
                self.act = nn.Tanh()
            return self.out(self.act(self.a(x)))

    return Late(), image(3, 4)


@kind("forward writes: data is assigned, and gradients are taken on the way", {"a": 6, "b": 5})
def assigned() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        m.a.weight.data = m.a.weight.data.clamp(-0.3, 0.3)  # type: ignore[union-attr]
        with torch.enable_grad():
            m.b(m.a(x.detach())).square().sum().backward()
        return m.out(m.b(m.a(x).relu()).relu())

    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 5), out=nn.Linear(5, 2)), image(3, 4)


@kind("torch's helpers: a mask of true and false, and whole numbers, as buffers", {"a": 6})
def whole_numbers() -> Made:
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("mask", torch.tensor([True, False, True, True, True, False]))
            self.register_buffer("places", torch.arange(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.a(x) * self.mask + self.places / 10).relu())

    return Masks(), image(3, 4)


@kind("torch's helpers: a part in inference mode, where operators arrive whole", {"c": 6, "w": 5, "b": 7})
def inference() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = F.interpolate(F.max_pool2d(m.norm(m.c(x)).relu(), 2), scale_factor=2)
            y = torch.matmul(y.flatten(2).transpose(1, 2), m.w).chunk(2, -1)[0]
        return m.out(m.b(y.clone()).relu())

    return Net(
        run,
        c=nn.Conv2d(3, 6, 3, padding=1),
        norm=nn.BatchNorm2d(6),
        w=nn.Parameter(torch.randn(6, 10)),
        b=nn.Linear(5, 7),
        out=nn.Linear(7, 2),
    ), image(2, 3, 4, 4)


@kind("torch's helpers: one of two branches by torch.cond", {"a": 6, "b": 5})
def conditional() -> Made:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(torch.cond(x.sum() > 1e6, lambda y: m.b(y), lambda y: m.c(y), (m.a(x),)))

    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 5), c=nn.Linear(6, 5), out=nn.Linear(5, 2)), image(3, 4)
