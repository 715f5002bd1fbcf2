"""OTOv2: our zero-invariant groups are those of only-train-once 2.0.16 where that is right; attention and splits.

The fixtures say what 2.0.16 finds; `tests/fixtures/make_otov2.py` made them. Where we differ, it is said here and why.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decay_pruning import GraphError, OTOv2, Pruner, Target, surgery
from decay_pruning.hosts.otov2 import ZERO_INVARIANT
from decay_pruning.lab import models
from decay_pruning.structures import StructureSet

from .fixtures.make_otov2 import NETWORKS, OTHERS
from .nets import INEXACT, Net, Vit, image, lively, make
from .registry import ARMS
from .test_removal_is_exact import VIT_HEADS, output

FIXTURES = Path(__file__).parent / "fixtures" / "otov2"

#: (structures, parameter → position of the first structure): which parameters a layer group holds, and where
Group = tuple[int, frozenset[tuple[str, int]]]
Groups = Mapping[str, Group]  # by the first parameter's name


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())
    assert content.pop("made with")["only_train_once"] == "2.0.16"
    return content


def theirs(groups: list[dict[str, Any]], *, prunable: bool) -> dict[str, Group]:
    return {
        min(each["parameters"]): (each["structures"], frozenset(each["parameters"].items()))
        for each in groups
        if each["prunable"] == prunable
    }


def ours(structures: StructureSet, model: nn.Module) -> dict[str, Group]:
    """Our layer groups in the same form; a group must own one whole stretch of every tensor, in order."""
    parameters = dict(model.named_parameters())
    found = {}
    for group in structures.groups.values():
        firsts = set()
        for c in group.couplings:
            if c.role in ZERO_INVARIANT and c.tensor in parameters:
                first = int(c.position.min())
                assert c.position.tolist() == list(range(first, first + len(group))), (group.name, c.tensor)
                assert c.owner.tolist() == list(range(len(group))) and c.dim == 0
                firsts.add((c.tensor, first))
        found[min(name for name, _ in firsts)] = (len(group), frozenset(firsts))
    return found


def group(structures: int, *layers: str) -> Group:
    """Weight and bias of some layers, from the first row on."""
    return structures, frozenset((f"{layer}.{leaf}", 0) for layer in layers for leaf in ("weight", "bias"))


@dataclass(frozen=True)
class Difference:
    """Where we part from 2.0.16: its groups that are wrong (by their first parameter), ours instead, and why."""

    why: str
    wrong: tuple[str, ...]
    instead: tuple[Group, ...]


DIFFERENCES = {
    "mobile": Difference(
        "it takes a depthwise convolution for a layer of its own and would cut it apart from its input; its filter i "
        "reads channel i and nothing else, so both go together",
        ("0.bias", "3.bias"),
        (group(6, "0", "1", "3", "4"),),
    ),
}


# -- the partition ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_partition_is_the_published_one(name: str) -> None:
    model, x = NETWORKS[name]()
    structures = OTOv2().graph(model, x).structures
    recorded = read(name)["groups"]
    expected = theirs(recorded, prunable=True)
    if name in DIFFERENCES:
        for wrong in DIFFERENCES[name].wrong:
            del expected[wrong]
        expected |= {min(p for p, _ in each[1]): each for each in DIFFERENCES[name].instead}
    assert ours(structures, model) == expected
    output_layers = {
        p.rpartition(".")[0] for _, held in theirs(recorded, prunable=False).values() for p, _ in held
    }
    assert structures.unprunable == dict.fromkeys(output_layers, "feeds the model's output")


#: Layer groups and structures that only-train-once 2.0.16 finds, and the model zoo's networks of these names.
PUBLISHED: dict[str, tuple[int, int, Callable[[], nn.Module]]] = {
    "vgg16-bn": (15, 5_248, lambda: models.build("vgg16-bn")),
    "resnet18": (
        12, 2_880, lambda: models.ResNet(models.BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), classes=10)
    ),
    "resnet50": (37, 11_456, lambda: models.build("resnet50", classes=10, stem="cifar")),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_zoo_has_the_published_partition(name: str) -> None:
    """With `mean` and `flatten`, behind which 2.0.16 would keep the last layer group."""
    groups, structures, build = PUBLISHED[name]
    expected = theirs(read(name)["groups"], prunable=True)
    assert (len(expected), sum(count for count, _ in expected.values())) == (groups, structures)
    model = build()
    assert ours(OTOv2().graph(model, torch.zeros(1, 3, 32, 32)).structures, model) == expected


def test_the_partition_does_not_depend_on_the_order_of_a_concatenation() -> None:
    """The second branch in front: each keeps its own part of the norm."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(m.norm(torch.cat([m.b(x), m.a(x)], 1)).relu().mean((2, 3)))

    model = Net(
        run, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 6, 1), norm=nn.BatchNorm2d(10), out=nn.Linear(10, 2)
    )
    found = ours(OTOv2().graph(model, torch.zeros(1, 3, 4, 4)).structures, model)
    assert found == {
        layer: (count, group(count, layer.split(".")[0])[1] | {("norm.weight", first), ("norm.bias", first)})
        for layer, count, first in (("a.bias", 4, 6), ("b.bias", 6, 0))
    }


#: Networks whose groups in 2.0.16 are wrong, and why.
WRONG = {
    "grouped": "it cuts a grouped convolution as if it had one group; ours takes one channel of every group at a time",
    "shared": "it takes tied weights for two tensors, and every name behind them goes to the wrong layer",
}
#: Networks on which 2.0.16 raises an error, and what it trips over.
RAISES = {
    "concat": "an input that is concatenated itself",
    "words": "a weight that two layers share, and an embedding",
    "mha": "torch's own attention",
    "rms": "RMSNorm, which its export does not know",
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_what_it_finds_in_other_networks_we_find_too(name: str) -> None:
    recorded = read("others")[name]
    assert ("raises" in recorded) == (name in RAISES)
    if name in RAISES:
        return
    torch.manual_seed(0)
    structures = OTOv2().graph(*OTHERS[name]()).structures
    parameters = {
        min(c.tensor for c in each.couplings if c.role in ZERO_INVARIANT): (
            len(each),
            {c.tensor for c in each.couplings if c.role in ZERO_INVARIANT},
        )
        for each in structures.groups.values()
    }
    expected = {
        first: (count, {p for p, _ in held})
        for first, (count, held) in theirs(recorded["groups"], prunable=True).items()
    }
    agrees = expected.items() <= parameters.items()
    assert agrees == (name not in WRONG), WRONG.get(name)


# -- attention and splits --------------------------------------------------------------------------------------

NORM = "normalises over this width (allow_inexact=True prunes it all the same)"


@dataclass(frozen=True)
class Found:
    """What OTOv2 makes of one network: structures of each layer group, and why others are not prunable."""

    groups: dict[str, int]
    unprunable: dict[str, str]


def zoo_vit() -> tuple[nn.Module, Any]:
    model = models.build("vit-b", classes=5, size=16, patch=8, width=12, depth=1, heads=3, hidden=20, seed=0)
    return lively(model), image(2, 3, 16, 16)


def by_width() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return lively(Vit(blocks=1, by_width=True)), image(2, 3, 8, 8)


class Apart(nn.Module):
    """Attention whose queries, keys and values are three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(5, 12), nn.Linear(12, 4)
        self.q, self.k, self.v, self.proj = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = (0.5 * q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(x + self.proj(mixed.transpose(1, 2).flatten(2)))


def apart() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return lively(Apart()), image(2, 6, 5)


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], dict[str, Any], Found]] = {
    "chunk": (
        lambda: make("chunked"), {}, Found({"a": 4, "b.0": 5, "c.0": 5, "d": 6}, {"out": "feeds the model's output"})
    ),
    "gate": (lambda: make("gated"), {}, Found({"up": 7}, {"down": "feeds the model's output"})),
    "attention": (
        lambda: make("vit"), {},
        Found(
            {"blocks.0.attn.qkv": 3, "blocks.0.fc1": 24, "blocks.1.attn.qkv": 3, "blocks.1.fc1": 24},
            {"patch": NORM, "head": "feeds the model's output"},
        ),
    ),
    "attention, heads given": (
        lambda: make("vit"), {"heads": VIT_HEADS},
        Found(
            {"blocks.0.attn.qkv": 4, "blocks.0.fc1": 24, "blocks.1.attn.qkv": 4, "blocks.1.fc1": 24},
            {"patch": NORM, "head": "feeds the model's output"},
        ),
    ),
    "attention of three layers": (
        apart, {"heads": {"q": 3}}, Found({"enter": 12, "q": 4, "v": 4}, {"out": "feeds the model's output"})
    ),
    "attention of three layers, all named": (
        apart, {"heads": {"q": 3, "k": 3, "v": 3}},
        Found({"enter": 12, "q": 4, "v": 4}, {"out": "feeds the model's output"}),
    ),
    "attention scaled by its width": (
        by_width, {"heads": {"blocks.0.attn.qkv": 3}},
        Found({"blocks.0.attn.qkv": 4, "blocks.0.fc1": 24}, {"patch": NORM, "head": "feeds the model's output"}),
    ),
    "torch's attention": (
        zoo_vit, {}, Found({"blocks.0.linear1": 20}, {"patches": NORM, "head": "feeds the model's output"})
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_attention_and_splits_are_found_or_refused_with_a_reason(case: str) -> None:
    build, options, expected = CASES[case]
    structures = OTOv2(**options).graph(*build()).structures
    assert {name: len(each) for name, each in structures.groups.items()} == expected.groups
    of_their_own = {
        name
        for name, why in structures.unprunable.items()
        if not why.startswith(("shares its width", "is part of"))
    }
    assert of_their_own == expected.unprunable.keys()
    for name, why in expected.unprunable.items():
        assert structures.unprunable[name].endswith(why), (name, structures.unprunable[name])


def prune(model: nn.Module, x: Any, arm: str, **options: Any) -> Pruner:
    """A short training in which structures go by the half-space test or by the deadline."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    host = OTOv2(lam=2.0, epsilon=0.97, tolerance=0.1, deadline=6, **options)
    smooth, rectify = ARMS[arm]
    pruner = Pruner(model, x, optimizer, Target(structures=0.7), host=host, smooth=smooth, rectify=rectify)
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return pruner


@pytest.mark.parametrize("arm", ["single", "sp"])
@pytest.mark.parametrize("case", list(CASES))
def test_attention_and_splits_shrink_exactly(case: str, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller model computes what the model does in which the same structures are zero."""
    build, options, _ = CASES[case]
    model, x = build()
    zeroed = []
    remove = surgery.remove

    def watched(model: nn.Module, structures: StructureSet, picks: Any, **rest: Any) -> StructureSet:
        twin = copy.deepcopy(model)
        surgery.zero_(twin, structures, picks)
        zeroed.append(output(twin, x))
        left = remove(model, structures, picks, **rest)
        after = output(model, x)
        assert (after - zeroed[-1]).norm() <= 1e-5 * zeroed[-1].norm()
        return left

    monkeypatch.setattr(surgery, "remove", watched)
    before = sum(p.numel() for p in model.parameters())
    dense = output(model, x)
    pruner = prune(model, x, arm, **options)
    report = pruner.finish()
    assert zeroed and not torch.allclose(dense, zeroed[0])
    assert report.removed >= 0.3 * report.structures[0]
    assert sum(p.numel() for p in model.parameters()) == report.params[1] < before


@pytest.mark.parametrize("name", list(INEXACT))
def test_inexact_widths_shrink_when_allowed(name: str) -> None:
    """By default the only width of `layered` is refused, with the reason."""
    model, x = make(name)
    if name != "vit":
        with pytest.raises(GraphError, match=r"not exact: .*allow_inexact=True"):
            OTOv2().graph(model, x)
    heads = VIT_HEADS if name == "vit" else {}
    found = OTOv2(allow_inexact=True, heads=heads).graph(model, x).structures
    assert any(each.inexact for each in found.groups.values())
    report = prune(model, x, "sp", allow_inexact=True, heads=heads).finish()
    assert report.removed >= 0.3 * report.structures[0]
    assert bool(output(model, x).isfinite().all())
