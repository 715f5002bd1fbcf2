"""Importances are those of torch-pruning where that is right. It is the oracle here, not a dependency."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from decay_pruning import surgery
from decay_pruning.graph import Graph
from decay_pruning.hosts import importance
from decay_pruning.hosts.importance import IMPORTANCES
from decay_pruning.lab.models import build
from tests.nets import EXACT, image, lively, make

ORACLES: dict[str, Any] = {
    "magnitude": tp.importance.GroupMagnitudeImportance(p=2, normalizer=None),
    "magnitude-l1": tp.importance.GroupMagnitudeImportance(p=1, normalizer=None),
    "taylor": tp.importance.GroupTaylorImportance(normalizer=None),
    "fpgm": tp.importance.FPGMImportance(normalizer=None),
    "lamp": tp.importance.LAMPImportance(),
    "bn-scale": tp.importance.BNScaleImportance(normalizer=None),
}
#: Layer groups with a depthwise convolution (not scored there at all) or a grouped one, whose input columns it counts
#: once for every group.
GROUPED = {
    ("mobile", "0"),
    ("grouped", "0"),
    ("grouped", "2"),
    ("norms", "0"),
    ("transposed", "2"),
    ("transposed", "5"),
    ("transposed", "0"),
}
#: It compares each position behind a flatten or a repeated input with every other one; ours compares whole structures.
FLATTENED = {("vgg", "4"), ("plain", "3"), ("grouped", "5"), ("sound", "3"), ("volume", "3"), ("concat", "c")}
#: It leaves out embeddings, bare parameters, torch's attention and GroupNorm.
#: It counts tied weights once for every layer that has them.
TIED = {("shared", "enter"), ("shared", "left")}
#: Networks with layers that torch-pruning does not score: the γ of RMSNorm, torch's own attention.
UNSCORED = {"rms", "mha"}
OTHERS = TIED | {("words", "table"), ("chunked", "a"), ("gated", "up"), ("norms", "3")}


def scored(name: str) -> tuple[nn.Module, Graph]:
    model, x = make(name)
    model.train()
    sum(t.square().sum() for t in surgery.leaves(surgery.call(model, x)) if t.requires_grad).backward()
    return model, Graph(model, x)


@pytest.mark.parametrize("kind", ORACLES)
@pytest.mark.parametrize("name", [n for n in EXACT if n not in UNSCORED])
def test_scores_are_those_of_torch_pruning_where_that_is_right(name: str, kind: str) -> None:
    model, graph = scored(name)
    ours = importance.scores(IMPORTANCES[kind]("mean"), model, graph.structures)
    wrong = GROUPED | OTHERS | (FLATTENED | {("concat", "b"), ("concat", "a")} if kind == "fpgm" else set())
    for key, group in graph.structures.groups.items():
        norms = [
            c
            for c in group.couplings
            if isinstance(surgery.parent(model, c.tensor)[0], nn.modules.batchnorm._BatchNorm)
        ]
        if (name, key) in wrong or (kind == "taylor" and norms) or (name == "vit" and "attn" in key):
            continue  # its Taylor never looks at batch-norms: it asks for the wrong pruning function
        theirs = graph.scores(ORACLES[kind], replace(graph.structures, groups={key: group}))
        assert (key in ours) == (key in theirs)
        if key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)


def test_a_whole_network_scores_alike() -> None:
    torch.manual_seed(0)
    model, x = lively(build("resnet20", classes=10)), image(2, 3, 32, 32)
    graph = Graph(model, x, verify=False)
    for kind in ("magnitude", "magnitude-l1", "fpgm", "lamp", "bn-scale"):
        ours = importance.scores(IMPORTANCES[kind]("mean"), model, graph.structures)
        theirs = graph.scores(ORACLES[kind], graph.structures)
        for key in graph.structures.groups:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)


def test_depthwise_filters_and_batch_norm_count() -> None:
    model, graph = scored("mobile")
    value = importance.scores(IMPORTANCES["taylor"]("sum"), model, graph.structures)["0"]
    products = [
        (p.detach() * p.grad).abs()
        for p in (model[0].weight, model[1].weight, model[3].weight, model[4].weight)
    ]
    products.append((model[6].weight.detach() * model[6].weight.grad).abs().transpose(0, 1))
    sums = sum(each.flatten(1).sum(1) if each.ndim > 1 else each for each in products)
    torch.testing.assert_close(value, sums)


def test_the_library_imports_and_scores_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "torch_pruning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model, graph = scored("resnet")
    found = importance.scores(IMPORTANCES["magnitude"]("mean"), model, graph.structures)
    assert found.keys() == graph.structures.groups.keys()
    own = graph.scores(lambda group: torch.arange(len(group[0].idxs)).float(), graph.structures)
    assert own["0"].tolist() == [0, 1, 2, 3, 4, 5]
