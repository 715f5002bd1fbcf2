"""Random networks by number, and the judge of what the library makes of them."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_pruning import proof, surgery
from decay_pruning.errors import DecayPruningError, GraphError
from decay_pruning.graph import Graph
from tests.nets import lively
from tests.random_maps import MAPS
from tests.random_tokens import TOKENS


class RandomNet(nn.Module):
    """Stages on a feature map, on tokens, and one to three outputs.

    Args:
        number: which network.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        draw = random.Random(number)
        self.words = draw.random() < 0.2
        self.side, self.size = draw.choice([4, 6]), draw.choice([2, 3])
        self.maps, self.tokens = nn.ModuleList(), nn.ModuleList()
        kinds = []
        c = 3
        if not self.words:
            for _ in range(draw.randrange(1, 5)):
                make = draw.choice(MAPS)
                stage, c = make(draw, c)
                self.maps.append(stage)
                kinds.append(make.__name__)
        else:
            c = 6
            self.table = nn.Embedding(11, c)
        self.skip = draw.random() < 0.3
        for _ in range(draw.randrange(0 if not self.words else 1, 4)):
            make = draw.choice(TOKENS)
            stage, c = make(draw, c)
            self.tokens.append(stage)
            kinds.append(make.__name__)
        self.kinds = kinds
        self.flat = not self.words and not self.tokens and draw.random() < 0.5
        self.second = draw.random() < 0.3
        self.form = draw.randrange(3)
        self.head = nn.LazyLinear(4)
        if self.second:
            self.other = nn.LazyLinear(2)
        self.last = nn.Linear(4, 4) if draw.random() < 0.3 else nn.Identity()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Any:
        x = self.table(x) if self.words else x
        for stage in self.maps:
            x = stage(x)
        if not self.words:
            x = F.adaptive_avg_pool2d(x, 2).flatten(1) if self.flat else x.flatten(2).transpose(1, 2)
        early = x
        for stage in self.tokens:
            x = stage(x)
        x = x if self.flat else x.mean(1)
        out = self.last(self.head(x))
        if bias is not None:
            out = out + bias
        if not self.second:
            return out
        beside = self.other(early if self.flat else early.mean(1))
        return (
            (out, beside)
            if self.form == 0
            else {"logits": out, "beside": beside}
            if self.form == 1
            else [out, [beside]]
        )


def inputs(net: RandomNet, seed: int, batch: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if net.words:
        x = torch.randint(0, 11, (batch, 5), generator=generator)
    else:
        x = torch.randn(batch, 3, net.side, net.side, generator=generator, dtype=torch.float64)
    if net.form == 2:
        return x, torch.randn(4, generator=generator, dtype=torch.float64)
    return (x,)


def network(number: int) -> RandomNet:
    """Network of this number, in double precision, with values everywhere."""
    torch.manual_seed(number)
    net = RandomNet(number)
    x = inputs(net, 0, 2)
    net.eval().double()
    with torch.no_grad():
        net(*x)  # the lazy layers
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    lively(net)
    return net.train()


def judge(number: int) -> tuple[str, str]:
    """One of pruned, refused, wrong, late, raw, touched; and what it is about."""
    net = network(number)
    x = inputs(net, 1, 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    try:
        structures = Graph(net, x, allow_inexact=number % 4 == 3).structures
    except GraphError as error:
        return "refused", str(error)
    except Exception as error:
        return "raw", f"{type(error).__name__}: {error}"
    if any(not torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()):
        return "touched", ""
    draw = random.Random(number)
    for _ in range(2):
        exact = {n: g for n, g in structures.groups.items() if g.inexact is None or number % 4 == 3}
        picks = {
            name: draw.sample(group.ids.tolist(), draw.randrange(1, len(group)))
            for name, group in exact.items()
            if len(group) > 1 and draw.random() < 0.7
        }
        if not picks:
            break
        zeroed = copy.deepcopy(net)
        surgery.zero_(zeroed, structures, picks)
        inexact = [n for n in picks if structures.groups[n].inexact]
        try:
            structures = surgery.remove(net, structures, picks, example_inputs=x)
        except DecayPruningError as error:
            return "late", str(error)
        except Exception as error:
            return "raw", f"{type(error).__name__}: {error}"
        wrong = "" if inexact else _difference(net, zeroed)
        if wrong:
            return "wrong", f"{picks}: {wrong}"
    return "pruned", " ".join(f"{name}:{why}" for name, why in structures.unprunable.items())


def _difference(net: RandomNet, zeroed: RandomNet) -> str:
    """How far the smaller model is from the original code with zeros, on other inputs."""
    for batch, training in ((3, False), (4, True)):
        x = inputs(net, 7, batch)
        outputs = []
        for model in (net, zeroed):
            model = copy.deepcopy(model).train(training)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                if isinstance(module, nn.MultiheadAttention):
                    module.dropout = 0.0
            try:
                with torch.no_grad():
                    outputs.append(list(proof.leaves(model(*x))))
            except Exception as error:
                return f"{type(error).__name__}: {error} (batch {batch}, training {training})"
        for a, b in zip(*outputs, strict=True):
            gap = float((a - b).norm() / (b.norm() + 1e-12))
            if not gap < 1e-8:
                return f"{gap:.1e} (batch {batch}, training {training})"
    return ""
