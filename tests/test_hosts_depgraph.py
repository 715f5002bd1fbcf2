"""DepGraph: every importance, scopes, rounding, minimum kept, sparse learning."""

import logging

import pytest
import torch
from torch import nn

from decay_pruning import ConfigError, DepGraph, GraphError, Pruner, SmoothPruning, SparseLearning, Target
from decay_pruning.hosts.depgraph import IMPORTANCES, GroupRegulariser

from .registry import build_model, example, start


@pytest.mark.parametrize("importance", sorted(IMPORTANCES))
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("model_name", ["residual", "plain"])
def test_every_importance_meets_the_target(importance, scope, model_name):
    run = start(model_name, "depgraph", "sp", host=DepGraph(importance=importance, scope=scope, rounds=2))
    for _ in range(10):
        run.step()
    assert run.pruner.finish().macs[1] <= 0.6 * run.pruner.before.macs


def test_an_own_importance():
    """Any function of a torch-pruning group: here the last channels go first."""
    run = start(
        "residual",
        "depgraph",
        "single",
        host=DepGraph(importance=lambda g: -torch.arange(len(g[0].idxs)).float()),
    )
    picks = run.pruner.plan().picks
    for name, ids in picks.items():
        size = len(run.pruner.structures.groups[name])
        assert ids == list(range(size - len(ids), size))


def test_magnitude_picks_what_is_small():
    model = build_model("residual")
    with torch.no_grad():
        for name in ("conv2", "bn2"):
            for p in getattr(model, name).parameters():
                p[[2, 5, 7]] *= 1e-3
        model.conv3.weight[:, [2, 5, 7]] *= 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, example(), optimizer, Target(macs=0.83), smooth=SmoothPruning(steps=1))
    assert set(pruner.plan().picks["conv2"]) == {2, 5, 7}


def test_local_takes_the_same_share_of_each():
    run = start("plain", "depgraph", "single", host=DepGraph(scope="local"), target=Target(structures=0.5))
    for now, after in run.pruner.plan().widths.values():
        assert abs(after / now - 0.5) < 0.11


@pytest.mark.parametrize("scope", ["global", "local"])
def test_rounding_up(scope, caplog):
    run = start(
        "plain", "depgraph", "single", host=DepGraph(round_to=4, scope=scope), target=Target(macs=0.6)
    )
    for now, after in run.pruner.plan().widths.values():
        assert after == now or after % 4 == 0
    for _ in range(3):
        run.step()
    run.pruner.finish()


def test_a_tenth_of_16_at_a_multiple_of_8_stays_16(caplog):
    """What torch-pruning rounds down to 8, silently, stays 16 here, and the log says so."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 160), nn.ReLU(), nn.Linear(160, 2))
    with torch.no_grad():
        model[2].weight *= 3
        model[0].weight[:2] *= 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    host = DepGraph(round_to=8)
    with caplog.at_level(logging.INFO, "decay_pruning"):
        plan = Pruner(
            model,
            torch.zeros(1, 4),
            optimizer,
            Target(structures=0.9),
            host=host,
            smooth=SmoothPruning(steps=1),
        ).plan()
    assert plan.widths["0"] == (16, 16)
    assert plan.widths["2"][1] % 8 == 0
    assert "multiple of 8" in caplog.text


@pytest.mark.parametrize("min_kept", [5, 0.5])
def test_minimum_kept(min_kept):
    run = start("plain", "depgraph", "single", host=DepGraph(min_kept=min_kept), target=Target(macs=0.6))
    for now, after in run.pruner.plan().widths.values():
        assert after >= (min_kept if isinstance(min_kept, int) else min_kept * now)


def test_ignored_layers_keep_their_width():
    run = start(
        "residual", "depgraph", "single", host=DepGraph(ignored=("conv2",)), target=Target(structures=0.8)
    )
    run.step()
    assert run.model.conv2.out_channels == 12
    assert "conv2" in run.pruner.report().unprunable


def test_a_name_that_does_not_exist_is_an_error():
    with pytest.raises(ConfigError, match="conv9"):
        start("residual", "depgraph", host=DepGraph(ignored=("conv9",)))


def test_sparse_learning_is_the_published_formula():
    run = start("residual", "depgraph-sparse", "sp")
    settings = SparseLearning(strength=0.01)
    regulariser = GroupRegulariser(settings)
    parameters = dict(run.model.named_parameters())
    regulariser.update(run.pruner.structures, parameters)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    regulariser.add(parameters, None)
    # conv2 feeds conv3 alone: rows of conv2, gamma of bn2, columns of conv3
    w = {k: v.detach() for k, v in parameters.items()}
    square = (
        w["conv2.weight"].square().sum((1, 2, 3))
        + w["bn2.weight"].square()
        + w["conv3.weight"].square().sum((0, 2, 3))
    )
    size = square.sqrt()
    pull = 0.01 * 16 ** ((size.max() - size) / (size.max() - size.min()))
    torch.testing.assert_close(parameters["bn2.weight"].grad, pull * w["bn2.weight"])
    assert not parameters["bn2.bias"].grad.any()
    for column in range(12):  # conv3's columns also cross its rows, which belong to the residual stream
        got = parameters["conv3.weight"].grad[:, column] / w["conv3.weight"][:, column]
        other = got - pull[column]
        assert (other > 0.009).all() and (other < 0.17).all()


def test_sparse_learning_stops_at_the_first_pick():
    run = start("residual", "depgraph-sparse", "sp", optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    grads = []
    for _ in range(5):
        before = run.pruner.progress().step
        run.step()
        x = run.model.bn2.weight
        grads.append((before, x.grad.clone()))
    plain = start("residual", "depgraph", "sp", start=10**6, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    for step, gradient in grads:
        plain.step()
        same = torch.allclose(plain.model.bn2.weight.grad, gradient, atol=1e-7)
        assert same == (step >= 3) or step > 3


@pytest.mark.parametrize(
    "wrong",
    [{"importance": "magic"}, {"scope": "galactic"}, {"rounds": 0}, {"round_to": 0}, {"min_kept": 1.5}],
)
def test_wrong_settings(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DepGraph(**wrong)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(3), r"returned \(3,\) values"),
        ([0.0] * 8, r"returned \[0\.0, "),
        (torch.zeros(8, dtype=torch.complex64), "one real number for each"),
        ("high", "returned 'high'"),
        (1.0, "returned 1.0"),
    ],
)
def test_importance_that_returns_nothing_useful(value, words):
    run = start("residual", "depgraph", "sp", host=DepGraph(importance=lambda group: value))
    with pytest.raises(GraphError, match=f"{words}.* for layer group 'conv1'|'conv1'.*{words}"):
        run.step()
