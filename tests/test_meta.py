"""Models on the meta device: structures and plans without weights, and a clear word where weights are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decay_pruning import DepGraph, OTOv2, Pruner, Target, inspect, latency, measure, surgery
from decay_pruning.errors import ConfigError, DecayPruningError, GraphError, SurgeryError
from decay_pruning.graph import Graph
from decay_pruning.graph.verification._shrunken import copied, without_value
from tests.kinds import KINDS, tokens, traps, weights  # noqa: F401
from tests.llama import Llama
from tests.nets import Net, image
from tests.test_kinds import built

TWIN = "verified by trials on a shrunken twin: the model is on the meta device"


def small(**sizes: int) -> Llama:
    given = {"layers": 2, "width": 64, "heads": 8, "kv_heads": 4, "inner": 96, "words": 50} | sizes
    torch.manual_seed(0)
    return Llama(**given)


def words(length: int = 6) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(0))


def on_meta(model: nn.Module) -> nn.Module:
    return copied(model, without_value)


def widths(graph: Graph) -> dict[str, int]:
    return {name: len(group) for name, group in graph.structures.groups.items()}


BIG = """
import json, resource, sys, time
import torch
from decay_pruning import Target, inspect
from tests.llama import Llama
with torch.device("meta"):
    model = Llama()
start = time.perf_counter()
plan = inspect(model, torch.zeros(1, 16, dtype=torch.int64), target=Target(macs=0.5))
print(json.dumps({
    "parameters": plan.now.params,
    "left": plan.after.macs / plan.now.macs,
    "groups": len(plan.widths),
    "verified": plan.verified,
    "seconds": time.perf_counter() - start,
    "bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
}))
"""


@pytest.mark.slow
def test_seven_billion_parameters_in_a_minute_and_two_gigabytes() -> None:
    run = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["parameters"] > 6.7e9
    assert found["verified"] == TWIN
    assert found["groups"] >= 64  # heads and the inner width of every block
    assert 0.4 < found["left"] <= 0.5
    assert found["seconds"] < 60
    assert found["bytes"] < 2e9


def test_the_same_structures_as_with_weights() -> None:
    model = small()
    real, meta = Graph(model, words()), Graph(on_meta(model), words())
    assert widths(meta) == widths(real)
    assert meta.structures.unprunable == real.structures.unprunable
    assert (real.verified, meta.verified) == ("verified by trials", TWIN)


@pytest.mark.parametrize(
    "name", [name for name in KINDS if name.startswith(("mixer", "attributes", "weight norm", "slices"))]
)
def test_of_every_kind(name: str) -> None:
    model, x = built(KINDS[name])
    assert widths(Graph(on_meta(model), x, **KINDS[name].options)) == KINDS[name].groups


def couplings(graph: Graph) -> dict[tuple[str, str, int], tuple[str, list[int], list[int]]]:
    return {
        (name, c.tensor, c.dim): (c.role, c.owner.tolist(), c.position.tolist())
        for name, group in graph.structures.groups.items()
        for c in group.couplings
    }


class Auxiliary(nn.Module):
    """A head that runs in training only, with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.beside = nn.Sequential(nn.Conv2d(8, 7, 1), nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.stem(x)).relu()
        out = self.head(y).mean((2, 3))
        return (out, self.beside(y).mean((2, 3))) if self.training else out


def test_batch_norms_and_auxiliary_heads_on_meta() -> None:
    model, x = Auxiliary(), image(2, 3, 6, 6)
    assert couplings(Graph(on_meta(model), x)) == couplings(Graph(model, x))
    with pytest.raises(DecayPruningError):  # and a batch-norm still checks its width
        measure(on_meta(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(7))), x)


@pytest.mark.parametrize("name", ["auxiliary", *list(KINDS)[::7]])
def test_training_mode_is_traced_alike_on_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = (Auxiliary(), image(2, 3, 6, 6)) if name == "auxiliary" else built(KINDS[name])
    found = []
    for heavy in (2**60, -1):
        monkeypatch.setattr("decay_pruning.graph.trace._HEAVY", heavy)
        graph = Graph(model, x, verify=False)
        found.append((couplings(graph), dict(graph.structures.unprunable)))
    assert found[0] == found[1]


def test_inputs_on_the_meta_device() -> None:
    model = small()
    assert widths(Graph(on_meta(model), words().to("meta"))) == widths(Graph(model, words()))


def decides(by: Callable[[Net, Tensor], Any]) -> tuple[nn.Module, Tensor]:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.enter(x)
        return m.out(y.relu() if by(m, x) else y.tanh())

    return Net(run, enter=nn.Linear(4, 6), out=nn.Linear(6, 2)), image(3, 4)


@pytest.mark.parametrize(
    "by",
    [
        lambda m, x: bool((x > 0).any()),  # the input
        lambda m, x: float(torch.ones(3, device=m.enter.weight.device).sum()) == 3,  # a constant
        lambda m, x: int(x.new_zeros(5).index_fill_(0, torch.tensor([2]), 1).nonzero()[0]) == 2,
        lambda m, x: len(x[x[:, 0] < 9]) == 3,  # a mask
        lambda m, x: (x.cpu().numpy() < 9).all(),
    ],
    ids=["input", "constant", "written", "mask", "numpy"],
)
def test_what_depends_on_no_weight_can_be_asked_for(by: Callable[[Net, Tensor], Any]) -> None:
    model, x = decides(by)
    assert widths(Graph(on_meta(model), x)) == {"enter": 6}


@pytest.mark.parametrize(
    "by",
    [
        lambda m, x: bool((m.enter(x) > 0).any()),
        lambda m, x: len(m.enter(x).nonzero()) > 1,
        lambda m, x: bool(torch.zeros(2, device=x.device).copy_(m.enter.bias[:2]).sum() < 9),  # written over
    ],
    ids=["if", "nonzero", "written"],
)
def test_what_depends_on_weights_is_said_with_its_line(by: Callable[[Net, Tensor], Any]) -> None:
    model, x = decides(by)
    said = r"on the meta device with these example inputs \(test_meta.py:\d+\): .* needs a value"
    with pytest.raises(GraphError, match=said):
        Graph(on_meta(model), x)


def test_a_wrong_trace_shows_on_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the knowledge that softmax mixes, a width under it looks exact: the shapes say nothing."""
    from decay_pruning.graph.rules import _table

    monkeypatch.setitem(_table.RULES, "_softmax", _table.elementwise)
    model = Net(lambda m, x: m.out(m.enter(x).softmax(-1)), enter=nn.Linear(4, 30), out=nn.Linear(30, 2))
    with pytest.raises(GraphError, match="removing a structure changes what is left"):
        Graph(on_meta(model), image(3, 4))


def test_a_twin_that_is_too_large_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decay_pruning.graph.verification._shrunken._LARGEST", 10)
    plan = inspect(on_meta(small()), words())
    assert plan.verified.startswith("not verified by trials: the model is on the meta device, and even the")
    assert plan.verified in str(plan)


def test_the_plan_takes_the_same_share_of_every_layer_group() -> None:
    plan = inspect(on_meta(small()), words(), target=Target(macs=0.7))
    assert plan.after.macs <= 0.7 * plan.now.macs
    shares = {after / now for now, after in plan.widths.values() if now > 8}
    assert len(shares) == 1
    assert "the same share of every layer group" in str(plan)
    assert plan.verified == TWIN


def test_the_plan_with_weights_is_the_hosts() -> None:
    model, host = small(), DepGraph()
    plan = inspect(model, words(), host, target=0.7)
    pruner = Pruner(
        model, words(), torch.optim.SGD(model.parameters(), lr=0.1), 0.7, host=host, total_steps=9
    )
    assert plan.picks == pruner.plan().picks
    assert (plan.verified, plan.picked) == ("verified by trials", "by DepGraph")


def test_the_cost_is_that_of_the_real_model() -> None:
    assert measure(on_meta(small()), words()) == measure(small(), words())


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda m, x: Pruner(m, x, torch.optim.SGD(m.parameters(), lr=1.0), 0.5), "no weights to train"),
        (lambda m, x: inspect(m, x, DepGraph(), target=0.5), "an importance reads weights"),
        (lambda m, x: inspect(m, x, DepGraph(importance=lambda g: None), target=0.5), "reads weights"),
        (lambda m, x: inspect(m, x, OTOv2(), target=0.5), "there is no plan before it"),
        (lambda m, x: latency(m, x), "no time to measure"),
    ],
    ids=["pruner", "magnitude", "own", "otov2", "latency"],
)
def test_what_needs_weights_says_so(work: Callable[[nn.Module, Tensor], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        work(on_meta(small()), words())


def test_a_removal_cannot_be_proven_and_leaves_the_model_alone() -> None:
    model = on_meta(small())
    structures = Graph(model, words()).structures
    picks = {next(iter(structures.groups)): [0]}
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(SurgeryError, match="no removal can be proven"):
        surgery.remove(model, structures, picks, example_inputs=words())
    assert [p.shape for p in model.parameters()] == shapes
    surgery.shrink(model, structures.kept(picks))
    assert measure(model, words()).params < measure(small(), words()).params


def test_a_random_ranking_needs_no_weights() -> None:
    plan = inspect(on_meta(small()), words(), DepGraph(importance="random"), target=0.7)
    assert plan.after.macs <= 0.7 * plan.now.macs


def test_a_model_that_is_on_meta_in_part_is_none_to_train() -> None:
    model = small()
    model.head = nn.Linear(64, 50, device="meta")
    with pytest.raises(DecayPruningError, match="all or parts of it"):
        Pruner(model, words(), torch.optim.SGD(model.parameters(), lr=1.0), 0.5)


def test_the_model_is_left_as_it_was() -> None:
    model = on_meta(small())
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    inspect(model, words(), target=0.7)
    assert {name: (id(p), p.shape) for name, p in model.named_parameters()} == before
    assert all(p.is_meta for p in model.parameters())
