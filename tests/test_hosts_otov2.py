"""OTOv2: DHSPG against plain loops, start points, tolerance, settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decay_pruning import ConfigError, OTOv2, Pruner, SelfRectifying, SmoothPruning, Target
from decay_pruning.hosts.otov2 import ZERO_INVARIANT

from .registry import ARMS, Run, batches, build_model, example, start

# -- DHSPG against plain loops ---------------------------------------------------------------------------------

Key = tuple[str, int]


class PlainDHSPG:
    """DHSPG one structure at a time: a twin of the model, a torch optimizer without hooks, and loops.

    A structure is a list of (parameter, dimension, position); `gone` are set to zero with all their slices.
    """

    def __init__(self, run: Run, optimizer: Callable[..., torch.optim.Optimizer], host: OTOv2, keep: float):
        self.model = build_model_like(run.model)
        self.optimizer = optimizer(self.model.parameters())
        self.parameters = dict(self.model.named_parameters())
        self.host = host
        self.lam, self.amplify, self.coeff = host.pull(self.optimizer)
        self.producer: dict[Key, list[tuple[str, int, int]]] = {}
        self.all: dict[Key, list[tuple[str, int, int]]] = {}
        for name, group in run.pruner.structures.groups.items():
            for row in range(len(group)):
                every = [
                    (c.role, (c.tensor, c.dim, int(p)))
                    for c in group.couplings
                    for o, p in zip(c.owner.tolist(), c.position.tolist(), strict=True)
                    if o == row and c.tensor in self.parameters
                ]
                self.all[name, row] = [s for _, s in every]
                self.producer[name, row] = [s for role, s in every if role in ZERO_INVARIANT]
        self.wanted = math.ceil((1 - keep) * len(self.all))
        self.tolerated = math.ceil((1 - keep + host.tolerance) * len(self.all))
        self.redundant: list[Key] = []
        self.scores: dict[Key, float] = {}
        self.gone: list[Key] = []

    def rates(self) -> dict[int, float]:
        return {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}

    def vector(self, tensors: dict[str, Tensor], key: Key) -> Tensor:
        return torch.cat([tensors[n].select(d, p).reshape(-1) for n, d, p in self.producer[key]])

    def room(self, key: Key, chosen: list[Key]) -> bool:
        """Whether the layer group keeps one when this goes, too."""
        there = sum(name == key[0] for name, _ in self.all)
        return sum(name == key[0] for name, _ in chosen) + 1 < there

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        old = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.optimizer.step()
        with torch.no_grad():
            rates = self.rates()
            rate = {n: torch.full_like(p, rates[id(p)]) for n, p in self.parameters.items()}
            direction = {n: (old[n] - p) / rate[n] for n, p in self.parameters.items()}
            if len(self.gone) < self.wanted:
                self.shrink(old, direction, rate) if self.redundant else self.partition(old, direction)
            for key in self.gone:
                for n, d, p in self.all[key]:
                    self.parameters[n].select(d, p).zero_()

    def partition(self, old: dict[str, Tensor], direction: dict[str, Tensor]) -> None:
        cosine, inverse = {}, {}
        for key in self.all:
            x, g = self.vector(old, key), self.vector(direction, key)
            cosine[key] = float((-x) @ (-g) / (x.norm() * g.norm())) if g.norm() > 0 else 0.0
            inverse[key] = float(len(x) / x.norm())
        of_cosine = sum(v * v for v in cosine.values()) ** 0.5
        of_inverse = sum(v * v for v in inverse.values()) ** 0.5
        self.scores = {k: 0.5 * cosine[k] / of_cosine + 0.5 * inverse[k] / of_inverse for k in self.all}
        for key in sorted(self.all, key=lambda k: -self.scores[k]):
            if len(self.redundant) < self.tolerated and self.room(key, self.redundant):
                self.redundant.append(key)

    def shrink(self, old: dict[str, Tensor], direction: dict[str, Tensor], rate: dict[str, Tensor]) -> None:
        passed = []
        for key in [k for k in self.redundant if k not in self.gone]:
            x, g, eta = (self.vector(t, key) for t in (old, direction, rate))
            lam = self.lam
            if x @ g < 0:
                low, high = float(-(x @ g) / x.norm()), float(-(g @ g) * x.norm() / (x @ g))
                lam = min(max(self.amplify * low, self.lam), self.coeff * self.lam)
                if lam > high:
                    lam = (low + high) / 2
            moved = x - eta * g - eta * lam * x / x.norm()
            if moved @ x < self.host.epsilon * (x @ x):
                passed.append(key)
                continue
            for n, d, p in self.producer[key]:
                change = rate[n].select(d, p) * lam * old[n].select(d, p) / x.norm()
                self.parameters[n].select(d, p).sub_(change)
        for key in sorted(passed, key=lambda k: -self.scores[k]):
            if len(self.gone) < self.wanted and self.room(key, self.gone):
                self.gone.append(key)


def build_model_like(model: nn.Module) -> nn.Module:
    name = {"Residual": "residual", "Plain": "plain", "Perceptron": "perceptron"}[type(model).__name__]
    twin = build_model(name).to(next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    return twin


ORACLES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "plain": lambda p: torch.optim.SGD(p, lr=0.05),
    "plain-decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rates": lambda p: torch.optim.SGD([{"params": [x], "lr": 0.02 + 0.01 * i} for i, x in enumerate(p)], lr=0.1),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", list(ORACLES))
@pytest.mark.parametrize("model_name", ["residual", "plain", "perceptron"])
def test_step_by_step_as_in_plain_loops(model_name, optimizer):
    keep = 0.5
    pull = 1.2 if optimizer == "adamw" else 0.6 if optimizer == "adam" else 0.2
    host = OTOv2(lam=pull, amplify=1.3, coeff=4.0, epsilon=0.95, tolerance=0.2, deadline=None, remove_every=0)
    model = build_model(model_name).double()
    made = ORACLES[optimizer](model.parameters())
    pruner = Pruner(
        model, example(torch.float64), made, Target(structures=keep), host=host, smooth=SmoothPruning(steps=1)
    )
    run = Run(model, made, pruner, batches(3, torch.float64))
    oracle = PlainDHSPG(run, ORACLES[optimizer], host, keep)
    stream = batches(3, torch.float64)
    compared = 0
    for _ in range(300):
        oracle.step(*next(stream))
        run.step()
        if run.pruner.done:
            break
        compared += 1
        assert sorted(oracle.gone) == sorted((n, i) for n, ids in pruner.engine.held.items() for i in ids)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, oracle.parameters[name], rtol=1e-7, atol=1e-9, msg=name)
    assert compared > 3, "everything went at once, so this would prove little"
    report = pruner.finish()
    assert len(oracle.gone) == report.removed == oracle.wanted
    widths = {
        name: before - sum(g == name for g, _ in oracle.gone) for name, (before, _) in report.widths.items()
    }
    assert widths == {name: after for name, (_, after) in report.widths.items()}


# -- the target, and what is released --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.9])
@pytest.mark.parametrize("arm", list(ARMS))
def test_sparsity_is_hit_exactly(keep, arm):
    run = start("residual", "otov2", arm, target=Target(structures=keep))
    for _ in range(40):
        run.step()
    report = run.pruner.finish()
    assert report.removed == math.ceil((1 - keep) * report.structures[0])


def test_what_decays_counts_as_pruned():
    """Structures that pass the test while the target is met by decaying ones stay."""
    host = OTOv2(lam=3.0, tolerance=0.4, remove_every=0)
    run = start("residual", "otov2", "sp", host=host, target=Target(structures=0.7))
    wanted = math.ceil(0.3 * len(run.pruner.original))
    most = 0
    while not run.pruner.done:
        run.step()
        now = run.pruner.progress()
        most = max(most, now.decaying + now.held)
        assert now.decaying + now.held + now.removed <= wanted
    assert most == wanted


@pytest.mark.parametrize("decay_from", ["half-space", "partition"])
def test_start_points(decay_from):
    """From the partition, all at once and from the norm that they have then; else one by one, and smaller."""
    events: list[Any] = []
    host = OTOv2(lam=0.5, epsilon=0.97, tolerance=0.1, decay_from=decay_from, deadline=None, remove_every=0)
    run = start(
        "plain", "otov2", "sp", host=host, start=2, on_event=events.append, target=Target(structures=0.6),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
    )  # fmt: skip
    while not run.pruner.done:
        run.step()
        assert run.pruner.progress().step < 150
    steps = {e.step for e in events if e.kind == "picked"}
    if decay_from == "partition":
        assert steps == {2}
    else:
        assert min(steps) > 2 and len(steps) > 1


def test_one_step_pruning_waits_for_the_half_space_whatever_the_start_point():
    ends = []
    for decay_from in ("half-space", "partition"):
        host = OTOv2(lam=0.8, epsilon=0.97, decay_from=decay_from, deadline=None)
        run = start("residual", "otov2", "single", host=host)
        while not run.pruner.done:
            run.step()
        ends.append((run.pruner.progress().step, run.model.state_dict()))
    assert ends[0][0] == ends[1][0] > 3
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1].values(), ends[1][1].values(), strict=True))


@pytest.mark.parametrize("tolerance", [0.0, 0.3])
@pytest.mark.parametrize("decay_from", ["half-space", "partition"])
def test_released_structures_leave_and_others_take_their_place(decay_from, tolerance):
    events: list[Any] = []
    host = OTOv2(lam=2.0, tolerance=tolerance, decay_from=decay_from, deadline=8)
    always = SelfRectifying(t_rate=-1.0, t_len=-1e9, max_share=0.5)
    run = start(
        "residual", "otov2", host=host, rectify=always, on_event=events.append, target=Target(structures=0.7)
    )
    for _ in range(50):
        run.step()
    report = run.pruner.finish()
    gone = {
        k: {(e.group, i) for e in events if e.kind == k for i in e.indices} for k in ("released", "removed")
    }
    assert report.released > 0
    assert not gone["released"] & gone["removed"], "there were others, so none of these had to go"
    assert report.removed == math.ceil(0.3 * report.structures[0])


def test_when_all_others_are_gone_released_ones_go_and_are_not_let_go_again():
    host = OTOv2(lam=2.0, tolerance=0.0, decay_from="partition")
    always = SelfRectifying(t_rate=-1.0, t_len=-1e9, max_share=1.0)
    run = start("residual", "otov2", host=host, rectify=always, target=Target(structures=0.2))
    for _ in range(60):
        run.step()
    report = run.pruner.finish()
    assert report.picked_again > 0
    assert report.removed == math.ceil(0.8 * report.structures[0])


@pytest.mark.parametrize(("deadline", "total_steps"), [(5, None), (0.25, 22)])
def test_the_deadline_ends_the_waiting(deadline, total_steps):
    """With hardly any pull nothing would ever pass the half-space test."""
    host = OTOv2(lam=1e-9, coeff=1.0, epsilon=0.0, deadline=deadline)
    run = start("residual", "otov2", "single", host=host, start=2, total_steps=total_steps)
    for _ in range(7):
        run.step()
        assert run.pruner.progress().removed == 0
    run.step()
    assert run.pruner.finish().macs[1] <= 0.6 * run.pruner.before.macs


def test_the_target_stays_unmet_without_a_deadline_and_force_meets_it():
    host = OTOv2(lam=1e-9, coeff=1.0, epsilon=0.0, deadline=None)
    run = start("residual", "otov2", "single", host=host)
    for _ in range(5):
        run.step()
    assert not run.pruner.done
    assert run.pruner.finish(force=True).macs[1] <= 0.6 * run.pruner.before.macs


def test_removal_in_between_does_not_change_what_is_learned():
    """Zeros that are removed early or late: the same network in the end, up to rounding."""
    ends = []
    for remove_every in (0, 1):
        host = OTOv2(lam=0.5, epsilon=0.97, deadline=None, remove_every=remove_every)
        run = start("residual", "otov2", "single", host=host, optimizer=ORACLES["plain-decay"])
        removals = 0
        while not run.pruner.done:
            before = run.pruner.progress().removed
            run.step()
            removals += run.pruner.progress().removed != before
        ends.append((removals, run.model.state_dict()))
    assert ends[0][0] == 1 < ends[1][0]
    for name, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][name], rtol=1e-3, atol=1e-5, msg=name)


# -- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"lam": 0.0}, {"amplify": -1}, {"coeff": 0}, {"epsilon": 1.0}, {"tolerance": -0.1}, {"decay_from": "start"},
        {"deadline": 1.5}, {"deadline": 0}, {"remove_every": -1}, {"min_kept": 0},
    ],
)  # fmt: skip
def test_wrong_settings(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        OTOv2(**wrong)


def test_the_published_pull_depends_on_the_optimizer():
    p = [nn.Parameter(torch.zeros(1))]
    assert OTOv2().pull(torch.optim.SGD(p, lr=0.1)) == (1e-3, 2, 10)
    assert OTOv2().pull(torch.optim.AdamW(p)) == OTOv2().pull(torch.optim.Adam(p)) == (1e-2, 20, 1000)
    assert OTOv2(lam=5e-4).pull(torch.optim.SGD(p, lr=0.1)) == (5e-4, 2, 10)
