"""What is predicted for other widths is what is counted there, products of activations included."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from decay_pruning import DepGraph, Pruner, SmoothPruning, Target, measure
from decay_pruning.counting import count


class Attention(nn.Module):
    def __init__(self, heads, wide, *, fused=False, sdpa=True, groups=1):
        super().__init__()
        self.heads, self.sdpa, self.groups = heads, sdpa, groups
        width = heads * wide
        if fused:
            self.qkv = nn.Linear(12, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(12, n) for n in (width, width // groups, width // groups))
        self.fused, self.proj = fused, nn.Linear(width, 12)

    def forward(self, x):
        b, t, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).view(b, t, self.heads, -1).transpose(1, 2)
            k, v = (f(x).view(b, t, self.heads // self.groups, -1).transpose(1, 2) for f in (self.k, self.v))
            if self.groups > 1:
                k, v = (
                    z[:, :, None].expand(-1, -1, self.groups, -1, -1).reshape(b, self.heads, t, -1)
                    for z in (k, v)
                )
        out = F.scaled_dot_product_attention(q, k, v) if self.sdpa else (q @ k.mT).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Tokens are mixed for each channel of a width that the layer before has made."""

    def __init__(self, width):
        super().__init__()
        self.enter, self.mix, self.out = nn.Linear(12, width), nn.Linear(7, 9), nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.mix(self.enter(x).mT).mT)


class Gram(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(7, width, 3)

    def forward(self, x):
        h = self.conv(x)
        return torch.einsum("bct,bdt->bcd", h, h)


class Recurrent(nn.Module):
    def __init__(self, width, cell=nn.LSTM):
        super().__init__()
        self.enter, self.rnn = nn.Linear(12, width), cell(width, 2 * width, 2, batch_first=True)

    def forward(self, x):
        return self.rnn(self.enter(x))[0]


class Experts(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 12, width)), nn.Parameter(torch.randn(3, width, 12))

    def forward(self, x):
        h = torch.einsum("btd,edf->ebtf", x, self.up).relu()
        return torch.einsum("ebtf,efd->btd", h, self.down)


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (lambda w: Attention(4, w), (6, 3)),
        (lambda w: Attention(4, w, sdpa=False), (6, 3)),
        (lambda h: Attention(h, 6), (4, 3)),
        (lambda h: Attention(h, 6, sdpa=False), (4, 1)),
        (lambda w: Attention(4, w, fused=True), (6, 5)),
        (lambda h: Attention(h, 6, fused=True, sdpa=False), (4, 2)),
        (lambda w: Attention(4, w, groups=2), (6, 3)),
        (lambda h: Attention(h, 6, groups=2), (4, 2)),
        (Mixer, (8, 5)),
        (Gram, (8, 3)),
        (Recurrent, (8, 5)),
        (lambda w: Recurrent(w, nn.GRU), (8, 3)),
        (Experts, (8, 3)),
        (
            lambda w: nn.Sequential(
                nn.ConvTranspose1d(7, 4 * w, 3), nn.Conv1d(4 * w, 4 * w, 3, groups=4 * w)
            ),
            (5, 2),
        ),
    ],
)
def test_other_widths(build, sizes):
    large, small = (build(size) for size in sizes)
    x = torch.randn(2, 7, 12)
    places = dict(large.named_parameters()), dict(small.named_parameters())
    predicted = 0.0
    for each in count(large, x):
        ratios = ((places[1][n].shape[d] / places[0][n].shape[d]) ** p for (n, d), p in each.makers.items())
        predicted += each.macs * math.prod(ratios)
    assert predicted == pytest.approx(measure(small, x).macs)


@pytest.mark.parametrize("sdpa", [True, False])
def test_a_target_is_met_where_attention_shrinks(sdpa):
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(4, 16, sdpa=sdpa), nn.Linear(12, 3)), torch.randn(1, 40, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(
        model, x, optimizer, Target(macs=0.5), host=DepGraph(heads={"0.q": 4, "0.k": 4, "0.v": 4}, allow_inexact=True),
        smooth=SmoothPruning.one_step(), total_steps=3,
    )  # fmt: skip
    plan = pruner.plan()
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    report = pruner.finish()
    assert report.macs[1] == measure(model, x).macs == plan.after.macs
    assert 0.4 * report.macs[0] < report.macs[1] <= 0.5 * report.macs[0]
    assert sum(each.macs for each in count(model, x) if each.path == "0") < 0.6 * 2 * 4 * 40 * 40 * 16
