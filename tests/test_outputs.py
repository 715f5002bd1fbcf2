"""`outputs=`: the outputs that are named keep their shape, and others may lose width."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decay_pruning import ConfigError, DepGraph, Pruner, SmoothPruning, Target, inspect, surgery
from decay_pruning.graph import Graph
from decay_pruning.hosts import Custom, GateDecorator, OTOv2
from tests.nets import image


@dataclass
class Result:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Net(nn.Module):
    """Returns hidden states beside its logits, in one of several forms."""

    def __init__(self, form: str = "mapping") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.enter, self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.enter(x)
        z = y + self.down(self.up(y).relu())
        logits, hidden = self.head(z), (y, z.flatten(1))
        if self.form == "tuple":
            return logits, *hidden
        return Result(logits, hidden) if self.form == "dataclass" else {"logits": logits, "hidden": hidden}


NAMES: list[tuple[str, Any]] = [
    ("mapping", "logits"),
    ("dataclass", "logits"),
    ("tuple", 0),
    ("tuple", "0"),
    ("tuple", -3),
]


def pieces(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = model(x)
    if isinstance(out, tuple):
        return out
    get = out.get if isinstance(out, dict) else lambda name: getattr(out, name)
    return (get("logits"), *get("hidden"))


@pytest.mark.parametrize(("form", "name"), NAMES)
def test_an_output_that_is_not_named_is_no_longer_in_the_way(form: str, name: Any) -> None:
    model, x = Net(form).double(), image(2, 4, 5).double()
    assert set(Graph(model, x).structures.groups) == {"up"}
    structures = Graph(model, x, outputs=[name]).structures
    assert {key: len(group) for key, group in structures.groups.items()} == {"enter": 8, "up": 10}
    for gone in ([1, 4], [0, 7]):
        picks = {"enter": gone, "up": gone}
        left = [k for k, each in enumerate(structures.groups["enter"].ids.tolist()) if each not in gone]
        surgery.zero_(model, structures, picks)
        before = [t.detach() for t in pieces(model, x)]
        structures = surgery.remove(model, structures, picks, example_inputs=x)
        logits, y, z = pieces(model, x)
        torch.testing.assert_close(logits, before[0])
        torch.testing.assert_close(y, before[1][..., left])
        torch.testing.assert_close(z, before[2].unflatten(1, (4, -1))[..., left].flatten(1))


def test_what_is_left_of_the_others_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net().double(), image(2, 4, 5).double()
    structures = Graph(model, x, outputs=["logits"]).structures
    hidden = [part for part in structures.outputs.parts if part.spot[0] == "hidden.0"]
    hidden[0].position.copy_(hidden[0].position.flip(0))  # a wrong trace
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(surgery.SurgeryError, match="the output changes"):
        surgery.remove(model, structures, {"enter": [1]}, example_inputs=x)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("inside", ["hidden.1", "hidden"])
def test_a_name_inside_of_an_output(inside: str) -> None:
    model, x = Net().double(), image(2, 4, 5).double()
    structures = Graph(model, x, outputs=[inside]).structures
    assert "head" in structures.groups and "enter" not in structures.groups


@pytest.mark.parametrize(
    ("form", "name", "words"),
    [
        (
            "mapping",
            "logit",
            "the model returns no 'logit'; its outputs are logits, hidden.0, hidden.1; did you mean",
        ),
        ("mapping", 0, "the model returns no 0; its outputs are logits"),
        ("tuple", 3, "the model returns no 3; its outputs are 0, 1, 2"),
        ("tuple", -4, "the model returns no -4"),
        ("tuple", "hidden", "the model returns no 'hidden'; its outputs are 0, 1, 2"),
    ],
)
def test_an_unknown_name_is_said_with_those_that_there_are(form: str, name: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Graph(Net(form), image(2, 4, 5), outputs=["logits" if form == "mapping" else 0, name])


def test_a_single_tensor_has_no_name() -> None:
    with pytest.raises(ConfigError, match="it returns one tensor, without a name"):
        Graph(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)), image(2, 5), outputs=["logits"])


@pytest.mark.parametrize(
    "host",
    [
        DepGraph(outputs=["logits"]),
        OTOv2(outputs=["logits"]),
        GateDecorator(outputs=["logits"]),
        Custom(lambda scene, goal: {}, outputs=["logits"]),
    ],
    ids=lambda host: type(host).__name__,
)
def test_every_host_takes_it(host: Any) -> None:
    assert "enter" in host.graph(Net().double(), image(2, 4, 5).double()).structures.groups


def test_inspect_takes_it_and_says_what_is_wrong() -> None:
    assert "enter" in inspect(Net(), image(2, 4, 5), outputs=["logits"]).widths
    with pytest.raises(ConfigError, match=r"host\.outputs must be a list of names of outputs"):
        DepGraph(outputs="logits")  # type: ignore[arg-type]


def test_a_pruner_prunes_it_while_it_trains() -> None:
    model, x = Net(), image(2, 4, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    host = DepGraph(outputs=["logits"], scope="local")
    pruner = Pruner(model, x, optimizer, Target(macs=0.3), host=host, smooth=SmoothPruning(steps=3))
    for _ in range(4):
        optimizer.zero_grad()
        model(x)["logits"].square().mean().backward()
        optimizer.step()
    pruner.finish()
    out = model(x)
    assert out["logits"].shape == (2, 4, 3) and out["hidden"][0].shape[-1] == model.enter.out_features < 8
