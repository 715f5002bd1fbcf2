"""torch-pruning's own pruning as arms of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from decay_pruning.budget import Target, measure
from decay_pruning.engine import Event
from decay_pruning.errors import BudgetError, ConfigError
from decay_pruning.hosts import DepGraph
from decay_pruning.lab import compare, recipe, report, results, settings
from decay_pruning.lab.models import build
from decay_pruning.lab.peers import PEERS, GrowingReg, Peer, TorchPruning
from decay_pruning.lab.recipe import Recipe
from decay_pruning.lab.results import Result

STEPS = 20


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(*assignments: str) -> Recipe:
    values: dict[str, Any] = {
        "device": "cpu",
        "data": {"train_limit": 256, "test_limit": 100},
        "dense": {"epochs": 3, "batch_size": 64, "lr": 0.1},
        "prune": {"epochs": 5, "batch_size": 64, "lr": 0.05, "target": {"macs": 0.5}},
        "report": {"latency_batch": 4},
    }
    return Recipe.from_dict(settings.override(values, assignments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    torch.set_num_threads(1)
    arms = ["tp-growing-reg", "single", *PEERS]
    return compare.compare(small(), arms, [0], tmp_path_factory.mktemp("peers"))


def test_peers_are_paired_with_the_other_arms(finished: Result) -> None:
    single, *others = finished.runs
    assert [run.arm for run in others] == list(PEERS)
    for run in others:
        assert (run.steps, run.accuracy_start, run.macs[0]) == (
            single.steps,
            single.accuracy_start,
            single.macs[0],
        )
        assert 0.4 * run.macs[0] < run.macs[1] <= 0.5 * run.macs[0]
        assert run.accuracy_removed is not None
        assert (
            run.report is not None and run.report["macs"] == run.macs and run.report["params"] == run.params
        )
        assert [row["step"] for row in run.rows if row.get("why") == "removal"] == [run.report["steps"]]
    assert [run.report["steps"] for run in others if run.report] == [1, 8, 10]
    assert [run.report["rounds"] for run in others if run.report] == [1, 5, 1]


def test_events_and_widths_tell_the_same(finished: Result) -> None:
    for arm in PEERS:
        run = finished.of(arm)[0]
        assert run.report is not None and run.lines
        removed = {name: 0 for name in run.report["widths"]}
        for event in run.events:
            removed[event["group"]] += event["count"] * (event["kind"] == "removed")
        assert removed == {name: a - b for name, (a, b) in run.report["widths"].items()}
        assert sum(removed.values()) == run.report["removed"] > 0


def test_peers_are_in_table_and_report(finished: Result) -> None:
    summaries = {s.arm: s for s in results.summarise(finished)}
    page, figure = report.render(finished), report.figure(finished)
    for arm in PEERS:
        assert summaries[arm].difference is not None
        assert results.TITLES[arm] in page and results.TITLES[arm] in figure


class Trial:
    """A peer on a small network, stepped by hand."""

    def __init__(self, peer: Peer, *, host: DepGraph | None = None, keep: float = 0.5) -> None:
        self.model = build("resnet-digits", seed=0)
        self.example = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
        self.events: list[Event] = []
        self.pruner = TorchPruning(
            peer,
            self.model,
            self.example,
            self.optimizer,
            Target(macs=keep),
            host=host or DepGraph(),
            total_steps=STEPS,
            start=0,
            on_event=self.events.append,
        )

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
            self.model(x).square().sum().mul(1e-3).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def test_the_optimizer_is_fresh_and_trains_exactly_the_model() -> None:
    trial = Trial(PEERS["tp-iterative"])
    parameters = list(trial.model.parameters())
    rounds, cut = [], 0
    for step in range(1, STEPS + 1):
        trial.step()
        now = trial.pruner.progress().round
        held = trial.optimizer.param_groups[0]["params"]
        assert [id(p) for p in held] == [id(p) for p in trial.model.parameters()]
        assert all(p.requires_grad for p in held)
        if now > cut:
            rounds.append(step)
            assert not trial.optimizer.state, "no momentum outlives a removal"
        else:
            assert len(trial.optimizer.state) == len(held)
        cut = now
    assert rounds == [1, 2, 4, 6, 8] and trial.pruner.done
    assert {id(p) for p in parameters} != {id(p) for p in trial.model.parameters()}
    trial.pruner.finish()


@pytest.mark.parametrize("arm", PEERS)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_target_is_met_and_the_output_layer_stays(arm: str, scope: Any) -> None:
    trial = Trial(PEERS[arm], host=DepGraph(scope=scope))
    before = measure(trial.model, trial.example)
    trial.step(STEPS)
    done = trial.pruner.finish()
    after = measure(trial.model, trial.example)
    assert 0.4 * before.macs < after.macs <= 0.5 * before.macs
    assert done.macs == (before.macs, after.macs) and done.params == (before.params, after.params)
    assert trial.model(trial.example).shape == (1, 10)
    assert trial.model.training and all(m.training for m in trial.model.modules())
    shares = [left / width for width, left in done.widths.values()]
    assert (max(shares) - min(shares) < 0.1) == (scope == "local")
    convolutions = [m for m in trial.model.modules() if isinstance(m, nn.Conv2d)]
    assert {done.widths["conv1"][1]} == {convolutions[0].out_channels}
    trial.step()
    assert not trial.optimizer._optimizer_step_pre_hooks, "the hooks are gone"


@pytest.mark.parametrize("importance", ["taylor", "random"])
def test_trials_score_as_the_model_itself_does(importance: str) -> None:
    """Gradients and random numbers are there on the copies, too: what met the target in a trial meets it."""
    trial = Trial(PEERS["tp-one-shot"], host=DepGraph(importance=importance))
    before, state = measure(trial.model, trial.example), torch.random.get_rng_state()
    trial.step()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert 0.4 * before.macs < measure(trial.model, trial.example).macs <= 0.5 * before.macs


def test_growing_regularisation_pulls_the_weak_to_zero() -> None:
    """The same steps with and without: the least important channels shrink more, and weight decay comes back."""
    shrunk = {}
    for growth in (0.0, 0.2):
        growing = GrowingReg(base=0.0, growth=growth, updates=5)
        trial = Trial(Peer((0.5,), growing))
        start = [p.detach().clone() for p in trial.model.parameters()]
        trial.step()
        assert trial.optimizer.param_groups[0]["weight_decay"] == 0
        trial.step(8)
        ratio = [
            float((now.detach().flatten(1).norm(dim=1) / was.flatten(1).norm(dim=1)).min())
            for now, was in zip(trial.model.parameters(), start, strict=True)
            if now.ndim == 4
        ]
        shrunk[growth] = sum(ratio) / len(ratio)
        trial.step()
        assert trial.pruner.done and trial.optimizer.param_groups[0]["weight_decay"] == 1e-2
    assert shrunk[0.2] < shrunk[0.0] - 0.02


def test_frozen_parameters_stay_frozen() -> None:
    trial = Trial(PEERS["tp-one-shot"])
    trial.model.get_parameter("bn1.weight").requires_grad_(False)
    trial.step()
    assert trial.pruner.done and not trial.model.get_parameter("bn1.weight").requires_grad


def test_what_torch_pruning_cannot_do_is_an_error(tmp_path: Path) -> None:
    gates = replace(small(), prune=recipe.load(RECIPES / "digits-gate-decorator.toml").prune)
    with pytest.raises(ConfigError, match=r"they need prune\.host\.kind = 'depgraph'"):
        compare.compare(gates, ["single", "tp-one-shot"], [0], tmp_path)
    with pytest.raises(ConfigError, match="heads, min_kept, round_to and per"):
        Trial(PEERS["tp-one-shot"], host=DepGraph(round_to=4))
    with pytest.raises(BudgetError, match="torch-pruning has no ratio that leaves"):
        Trial(PEERS["tp-one-shot"], keep=0.001).step()
    with pytest.raises(BudgetError, match="ended after 0 of 1 removals"):
        Trial(PEERS["tp-growing-reg"]).pruner.finish()
    assert not list(tmp_path.iterdir()), "nothing is trained before the settings are known to fit"


RECIPES = Path(__file__).parents[1] / "recipes"
