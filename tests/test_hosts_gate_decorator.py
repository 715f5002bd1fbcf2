"""Gate Decorator against a plain version of the original: gates as layers of their own, masks, loops over channels."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decay_pruning import (
    BudgetError,
    ConfigError,
    GateDecorator,
    Pruner,
    SelfRectifying,
    SmoothPruning,
    Target,
    surgery,
)
from decay_pruning.graph import Graph
from decay_pruning.hosts.gates import GatedBatchNorm2d, Gates, fold, gate
from decay_pruning.lab import models
from decay_pruning.lab.data import ImageData
from decay_pruning.lab.trainer import TrainSettings, train

from .registry import batches, build_model, example, start

LR = (0.01, 0.05)
SETTINGS: dict[str, Any] = {
    "tick": 3,
    "tock": 4,
    "ticks": 2,
    "lr_min": LR[0],
    "lr_max": LR[1],
    "strength": 1e-2,
}


# ------------------------------------------------------------------------------- the original in plain loops


class PlainGate(nn.Module):
    """A layer, then a gate per channel, then a mask. Batch-norm keeps a scale of one, and its gate trains."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.trains = isinstance(layer, nn.BatchNorm2d)
        with torch.no_grad():
            if self.trains:
                self.phi = nn.Parameter(layer.weight.clone())
                layer.bias.div_(layer.weight)
                layer.weight.fill_(1)
                layer.weight.requires_grad_(False)
            else:
                self.phi = nn.Parameter(torch.ones_like(layer.bias))
        self.mask = torch.ones_like(self.phi)
        self.area = 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.area = y[0, 0].numel()
        shape = [1, -1] + [1] * (y.ndim - 2)
        return y * (self.phi * self.mask).view(shape)


class Original:
    """Tick and Tock by hand.

    Args:
        groups: layer group → the layers whose gates it joins.
    """

    def __init__(self, model: nn.Module, groups: dict[str, list[str]], host: GateDecorator) -> None:
        self.model, self.host = model, host
        self.gates = {}
        for group, names in groups.items():
            self.gates[group] = [PlainGate(getattr(model, name)) for name in names]
            for name, made in zip(names, self.gates[group], strict=True):
                setattr(model, name, made)
        every = [g for joined in self.gates.values() for g in joined]
        self.trained = [g for g in every if g.trains]
        still = {id(g.phi) for g in every if not g.trains}
        self.optimizer = torch.optim.SGD(
            [p for p in model.parameters() if id(p) not in still], lr=1.0, momentum=0.9, weight_decay=1e-3
        )

    def step(self, x: Tensor, y: Tensor, lr: float, *, sparse: bool) -> float:
        loss = nn.functional.cross_entropy(self.model(x), y)
        total = loss
        if sparse:
            for g in self.trained:
                total = total + self.host.strength * g.phi.abs().sum()
        self.model.zero_grad()
        total.backward()
        if sparse:  # a still gate is multiplied into its layer after every step
            for g in [g for joined in self.gates.values() for g in joined if not g.trains]:
                for p in g.layer.parameters():
                    p.grad += self.host.strength * p.detach()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return float(loss.detach())

    def tock(self, stream: Any) -> list[float]:
        losses = []
        half = self.host.tock / 2
        for i in range(self.host.tock):
            up = i / half if i < half else (self.host.tock - i) / half
            losses.append(self.step(*next(stream), LR[0] * (1 - up) + LR[1] * up, sparse=True))
        return losses

    def tick(self, stream: Any) -> list[float]:
        convolutions = [m for m in self.model.modules() if isinstance(m, nn.Conv2d)]
        for m in convolutions:
            m.requires_grad_(False)
        self.scores = {group: [0.0] * len(joined[0].phi) for group, joined in self.gates.items()}
        losses = []
        for _ in range(self.host.tick):
            before = {id(g): g.phi.detach().clone() for joined in self.gates.values() for g in joined}
            losses.append(self.step(*next(stream), LR[0], sparse=False))
            for group, joined in self.gates.items():
                for g in joined:
                    for channel in range(len(g.phi)):
                        self.scores[group][channel] += abs(
                            float(before[id(g)][channel] * g.phi.grad[channel])
                        )
        for m in convolutions:
            m.requires_grad_(True)
        return losses

    def mask(self) -> dict[str, list[int]]:
        """Mask the lowest share of the live gates; which channels went."""
        smallest = min(g.area for joined in self.gates.values() for g in joined)
        candidates, live = {}, 0
        for group, joined in self.gates.items():
            alive = [c for c in range(len(joined[0].mask)) if joined[0].mask[c] > 0]
            live += len(alive) * len(joined)
            keep = max(1, int(self.host.min_kept * len(joined[0].mask)))
            for c in alive:
                self.scores[group][c] -= sum(self.host.eta * g.area / smallest * len(alive) for g in joined)
            ranked = sorted(alive, key=lambda c: self.scores[group][c])
            candidates[group] = ranked[: len(alive) - keep]
        each = [self.scores[g][c] for g, cs in candidates.items() for c in cs for _ in self.gates[g]]
        threshold = sorted(each)[int(live * self.host.share)]
        gone = {g: sorted(c for c in cs if self.scores[g][c] <= threshold) for g, cs in candidates.items()}
        for group, channels in gone.items():
            for g in self.gates[group]:
                g.mask[channels] = 0
        return {group: channels for group, channels in gone.items() if channels}


GROUPS = {
    "residual": {"conv1": ["bn1", "bn3"], "conv2": ["bn2"]},
    "plain": {"conv1": ["bn1"], "conv2": ["bn2"], "fc1": ["fc1"]},
}


@pytest.mark.parametrize("model_name", list(GROUPS))
@pytest.mark.parametrize(
    "more",
    [{"share": 0.1}, {"share": 0.1, "eta": 2e-3}, {"share": 0.1, "min_kept": 0.6}],
    ids=lambda m: str(m),
)
def test_several_ticks_equal_the_original(model_name, more):
    host = GateDecorator(**SETTINGS, **more)
    model = build_model(model_name).double()
    model(example(torch.float64).expand(4, -1, -1, -1))  # running statistics that are not the first ones
    original = Original(copy.deepcopy(model), GROUPS[model_name], host)
    events: list[Any] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3)
    pruner = Pruner(
        model,
        example(torch.float64),
        optimizer,
        Target(structures=0.6 if "min_kept" in more else 0.45),
        host=host,
        smooth=SmoothPruning.one_step(),
        on_event=events.append,
    )
    assert type(model.bn1) is GatedBatchNorm2d
    probe = next(batches(9, torch.float64))[0]
    ours, theirs = batches(1, torch.float64), batches(1, torch.float64)
    rounds = 0
    while not pruner.done:
        tock = rounds % host.ticks == 0
        expected = original.tock(theirs) if tock else []
        expected += original.tick(theirs)
        scores: dict[str, Tensor] = {}
        losses = []
        for _ in expected:
            phase = pruner.phase()
            assert phase is not None and phase.lr is not None
            optimizer.param_groups[0]["lr"] = phase.lr
            x, y = next(ours)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            scores = pruner._picker._by_group(pruner._picker._scored(pruner._scene()))
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses == pytest.approx(expected, rel=1e-9)
        before = {name: list(values) for name, values in original.scores.items()}
        picks = original.mask()
        picked = {e.group: list(e.indices) for e in events if e.kind == "removed"}
        events.clear()
        for name, values in before.items():
            there = [i for i, v in enumerate(values) if v > 0]
            assert scores[name][there].tolist() == pytest.approx([values[i] for i in there], rel=1e-7)
        if pruner.done:  # the last picks stop at the target
            assert all(set(ids) <= set(picks[name]) for name, ids in picked.items())
            break
        assert picked == picks
        for mode in (True, False):
            with torch.no_grad():
                a, b = (
                    copy.deepcopy(model).train(mode)(probe),
                    copy.deepcopy(original.model).train(mode)(probe),
                )
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        rounds += 1
    assert rounds >= 2, "too few rounds to prove much"
    assert pruner.phase().name == "fine-tune"


def test_a_tick_moves_no_convolution_and_a_tock_moves_all():
    run = start("plain", "gates", "single", host=GateDecorator(**SETTINGS, share=0.05))
    for n in range(10):
        name = run.pruner.phase().name
        before = {k: p.detach().clone() for k, p in run.model.named_parameters()}
        run.step()
        same_shape = [k for k, p in run.model.named_parameters() if p.shape == before[k].shape]
        moved = {k for k in same_shape if not torch.equal(before[k], dict(run.model.named_parameters())[k])}
        assert any(k.startswith("conv") for k in moved) == (name == "tock"), (n, name)
        assert {"fc2.weight", "fc2.bias"} & moved and (name == "tock") == (n % 10 < 4)


# ---------------------------------------------------------------------------------------- gates in, gates out


class Dimensions(nn.Module):
    """Batch-norms of one, two and three dimensions, one of them with a plain mean, one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.bn3 = nn.Conv3d(1, 6, 3), nn.BatchNorm3d(6, momentum=None)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)
        self.conv1, self.bn1 = nn.Conv1d(16, 8, 1), nn.BatchNorm1d(8)
        self.fc, self.bn0, self.out = nn.Linear(16, 10), nn.BatchNorm1d(10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn3(self.conv3(x)).relu().flatten(1, 2)
        x = self.bn2(self.conv2(x)).relu().flatten(1, 2)
        x = self.bn1(self.conv1(x)).relu().flatten(1)
        return self.out(self.bn0(self.fc(x)).relu())


def lively() -> nn.Module:
    torch.manual_seed(0)
    model = Dimensions()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight.uniform_(-1.5, 1.5)
                m.weight[m.weight.abs() < 0.2] = 0.2
                m.bias.uniform_(-1, 1)
        model.bn3.weight[2] = model.bn3.bias[2] = 0.0
    return model


def test_gates_change_neither_outputs_nor_statistics():
    plain = lively().double()
    gated = copy.deepcopy(plain)
    classes = [type(m) for m in plain.modules()]
    assert gate(gated) == ["bn3", "bn2", "bn1", "bn0"]
    assert {type(m).__name__ for n, m in gated.named_modules() if n.startswith("bn")} == {
        "GatedBatchNorm1d",
        "GatedBatchNorm2d",
        "GatedBatchNorm3d",
    }
    x = torch.randn(5, 1, 4, 6, 6)
    for mode in (True, True, False):
        torch.testing.assert_close(
            gated.train(mode)(x.double()), plain.train(mode)(x.double()), rtol=1e-10, atol=1e-12
        )
        single, other = copy.deepcopy(gated).float(), copy.deepcopy(plain).float()
        torch.testing.assert_close(single(x), other(x), rtol=1e-5, atol=1e-6)
    for name, buffer in gated.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), msg=name)
    assert fold(gated) == ["bn3", "bn2", "bn1", "bn0"]
    assert [type(m) for m in gated.modules()] == classes
    for name, p in gated.named_parameters():
        torch.testing.assert_close(p, plain.get_parameter(name), msg=name)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_in_single_precision_gates_cost_no_more_than_the_last_bit_of_a_bias(mode):
    """VGG16 amplifies what is changed in its first layers, so it is held against its own distance from float64."""
    model = models.build("vgg16-bn", seed=0)
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.3, 1.5)
                m.bias.uniform_(-1, 1)
        model(x)
        gated = copy.deepcopy(model).train(mode)
        assert len(gate(gated)) == 13
        model.train(mode)
        for a, b in zip(gated.modules(), model.modules(), strict=True):
            if isinstance(b, nn.BatchNorm2d):
                last = torch.nextafter(b.bias.abs(), torch.tensor(torch.inf)) - b.bias.abs()
                assert bool(((a.bias * a.weight - b.bias).abs() <= last).all())
                y = torch.randn(32, b.num_features, 4, 4)
                before, after = copy.deepcopy(b)(y), copy.deepcopy(a)(y)
                assert float((after - before).norm() / before.norm()) < 1e-6
                assert float((after - before).abs().max()) < 1e-6
        exact = copy.deepcopy(model).double()(x.double())
        plain, ours = (copy.deepcopy(m)(x).double() for m in (model, gated))
    assert float((ours - plain).norm()) < 3 * float((plain - exact).norm())
    if not mode:
        assert float((ours - plain).norm() / plain.norm()) < 1e-6


def test_batch_norms_that_cannot_be_gated_stay_as_they_are(caplog):
    model = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(3)), nn.BatchNorm2d(4, affine=False)).append(
        nn.SyncBatchNorm(4)
    )
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[1].bias[2] = 11.0
    model.append(nn.BatchNorm2d(4))
    model[5].weight = model[2].weight
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with caplog.at_level(logging.INFO, "decay_pruning"):
        assert gate(model) == []
    assert "1 gets no gates: in 1 channels its bias is over 10 times its scale" in caplog.text
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("arm", ["single", "sp", "sr"])
def test_the_user_gets_plain_classes_back(arm):
    run = start("residual", "gates", arm)
    while not run.pruner.done:
        assert type(run.model.bn1) is GatedBatchNorm2d
        run.step()
        assert run.pruner.progress().step < 60
    assert [type(m) for m in run.model.modules()] == [type(m) for m in build_model("residual").modules()]
    assert run.model.bn2.num_features == run.model.conv2.out_channels < 12


def test_folding_at_the_end_changes_nothing():
    run = start("residual", "gates", "sp", target=0.2)
    for _ in range(3):
        run.step()
    assert run.pruner.progress().decaying
    assert fold(copy.deepcopy(run.model)) == ["bn1", "bn2", "bn3"]
    with torch.no_grad():
        before = copy.deepcopy(run.model).eval()(example())
    fold(run.model)
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(example()), before, rtol=1e-5, atol=1e-6)


def test_gates_of_layers_without_batch_norm_are_those_that_one_would_insert():
    """φ·∂L/∂φ of a gate behind a convolution or linear layer, by autograd, for φ = 1."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5),
    )  # fmt: skip
    x, y = next(batches(1))
    structures = Graph(model, x[:1]).structures
    inserted = {}

    def insert(layer: nn.Module, name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            phi = inserted[name] = torch.ones(out.shape[1], requires_grad=True)
            return out * phi.view(1, -1, *[1] * (out.ndim - 2))

        return layer.register_forward_hook(hook)

    for name in ("1", "3", "6"):
        insert(model.get_submodule(name), name)
    nn.functional.cross_entropy(model(x), y).backward()
    parameters = dict(model.named_parameters())
    widths = {name: len(group) for name, group in structures.groups.items()}
    gates = Gates(structures, widths, (), parameters)
    assert widths == {"0": 2, "3": 4, "6": 8} and gates.joined == dict.fromkeys(widths, 1)
    found = gates.sums(parameters, {name: p.grad for name, p in parameters.items()})
    parts = [inserted[name].grad.abs() for name in ("1", "3", "6")]
    parts[0] = parts[0].view(2, 3).sum(1)  # three channels are one structure
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 2.0**14])
def test_sparsity_of_gates_of_layers_without_batch_norm_is_that_of_gates_that_one_would_insert(scale):
    """Under SGD, a gate of 1 that only λ|φ| moves, and that is multiplied into its layer after each step."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=scale is not None)
    host = GateDecorator(tick=1, tock=5, strength=0.1, lr_min=0.5, lr_max=0.5)
    Pruner(model, torch.randn(1, 3, 8, 8), optimizer, 0.5, host=host, smooth=SmoothPruning.one_step())
    plain = copy.deepcopy(model)
    for _ in range(3):
        optimizer.zero_grad()
        loss = 0 * model(torch.randn(2, 3, 8, 8)).sum()
        if scale is None:
            loss.backward()
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
    phi = torch.ones((), requires_grad=True)
    for _ in range(3):
        (pull,) = torch.autograd.grad(host.strength * phi.abs(), phi)
        after = phi.detach() - 0.5 * pull
        with torch.no_grad():
            for layer in (plain[3], plain[6]):
                layer.weight *= after
                layer.bias *= after
            plain[1].weight -= 0.5 * host.strength * plain[1].weight.sign()
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected, msg=name)


# ------------------------------------------------------------------------------------- decaying and releasing


def test_gates_alone_fall_on_a_straight_line():
    events: list[Any] = []
    run = start(
        "residual",
        "gates",
        host=GateDecorator(tick=2, tock=0, share=0.2, strength=0.0),
        smooth=SmoothPruning(steps=5, slices="gates"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        on_event=events.append,
    )
    first = run.model.bn2.weight.detach().clone()
    run.step()
    rest = []
    for _ in range(4):
        run.step()
        rest.append(run.model.bn2.weight.detach().clone())
    picked = [i for e in events if e.group == "conv2" for i in e.indices]
    others = [i for i in range(12) if i not in picked]
    assert picked
    for n, phi in enumerate(rest, start=1):
        torch.testing.assert_close(phi[picked], first[picked] * (1 - n / 5))
        assert torch.equal(phi[others], first[others])


def test_release_looks_at_the_joined_gate_vector():
    run = start(
        "residual",
        "gates",
        host=GateDecorator(tick=1, tock=0, share=0.9),
        smooth=SmoothPruning(steps=6, slices="gates"),
        rectify=SelfRectifying(t_rate=1.0, criterion="outward", warmup=0.0),
        target=Target(structures=0.3),
    )
    run.step()
    run.optimizer.zero_grad()
    x, y = next(run.batches)
    nn.functional.cross_entropy(run.model(x), y).backward()
    phi = torch.stack([run.model.bn1.weight, run.model.bn3.weight]).detach()
    gradient = torch.stack([run.model.bn1.weight.grad, run.model.bn3.weight.grad])
    expected = (-(phi * gradient).sum(0) / phi.norm(dim=0) / gradient.norm(dim=0)).tolist()
    run.optimizer.step()
    seen = {key: values["outward"] for key, values in run.pruner.engine.resistance().items()}
    joined = [i for group, i in seen if group == "conv1"]
    assert joined
    for i in joined:
        assert seen["conv1", i] == pytest.approx(expected[i], rel=1e-4)


@pytest.mark.parametrize("decay_in", ["tick", "own"])
def test_nothing_is_picked_while_something_decays(decay_in):
    """A decaying gate is neither ranked again nor counted, and has finished before anything is removed."""
    events: list[Any] = []
    phases = []
    host = GateDecorator(tick=2, tock=3, ticks=2, share=0.1, decay_in=decay_in)
    run = start(
        "residual",
        "gates",
        host=host,
        smooth=SmoothPruning(steps=5),
        on_event=events.append,
        target=Target(structures=0.4),
    )
    while not run.pruner.done:
        phases.append(run.pruner.phase().name)
        run.step()
        assert len(phases) < 80
    waiting: set[tuple[str, int]] = set()
    picks = 0
    for step in sorted({e.step for e in events}):
        now = {kind: {(e.group, i) for e in events if (e.kind, e.step) == (kind, step) for i in e.indices}
               for kind in ("picked", "removed")}  # fmt: skip
        if now["removed"]:
            assert now["removed"] == waiting
            waiting = set()
        if now["picked"]:
            assert not waiting
            waiting, picks = now["picked"], picks + 1
    assert picks > 3
    assert phases[:5] == ["tock"] * 3 + ["tick"] * 2
    # N = 5: the pick's own step, then four more
    assert phases[5:9] == (["decay"] * 4 if decay_in == "own" else ["tick"] * 4)
    assert ("decay" in phases) == (decay_in == "own")
    assert phases.count("tock") == 3 * (1 + picks // 2) - 3 * (picks % 2 == 0)


def test_fractions_are_shares_of_the_way_from_pick_to_pick():
    host = GateDecorator(tick=6, tock=8, ticks=2)
    run = start("residual", "gates", host=host, smooth=SmoothPruning(steps=0.5), total_steps=400)
    for _ in range(8 + 6):
        run.step()
    assert run.pruner.engine._fading.steps.unique().tolist() == [5]


def test_start_waits_and_fine_tuning_lasts_to_the_end():
    host = GateDecorator(tick=1, tock=2, ticks=1, share=0.9, lr_min=0.01, lr_max=0.03)
    run = start("residual", "gates", "single", host=host, start=3, total_steps=26, target=0.6)
    story = []
    for _ in range(26):
        phase = run.pruner.phase()
        story.append((None, None) if phase is None else (phase.name, phase.lr))
        run.step()
    assert story[:3] == [(None, None)] * 3
    assert story[3:6] == [("tock", 0.01), ("tock", 0.03), ("tick", 0.01)]
    assert [name for name, _ in story[6:]] == ["fine-tune"] * 20
    assert max(lr for _, lr in story[6:]) == story[16][1] == pytest.approx(0.03)
    assert story[6][1] == pytest.approx(0.01)
    without = start("residual", "gates", "single", host=host)
    for _ in range(4):
        without.step()
    assert without.pruner.phase().name == "fine-tune" and without.pruner.phase().lr is None


def test_by_force_and_by_plan_before_there_are_scores():
    run = start("residual", "gates", "sp", target=0.5)
    with torch.no_grad():
        run.model.bn2.weight[[2, 5, 7]] *= 1e-3
    plan = run.pruner.plan()
    assert plan.after.macs <= 0.5 * plan.now.macs and {2, 5, 7} <= set(plan.picks["conv2"])
    report = run.pruner.finish(force=True)
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert type(run.model.bn1) is nn.BatchNorm2d


def test_scores_and_sparsity_do_not_depend_on_the_scale_of_the_loss():
    """A fused optimizer gets gradients that are still scaled."""
    seen = []
    for scale in (1.0, 2.0**14):
        host = GateDecorator(tick=9, tock=3, strength=0.1)
        run = start(
            "residual", "gates", host=host, optimizer=lambda p: torch.optim.SGD(p, lr=0.05, fused=True)
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(6):
            x, y = next(run.batches)
            run.optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(run.model(x), y)).backward()
            scaler.step(run.optimizer)
            scaler.update()
        seen.append((run.pruner._picker.state_dict()["scores"], run.model.bn2.weight.detach().clone()))
    (scores, gates), (same_scores, same_gates) = seen
    assert scores.keys() == {"conv1", "conv2"} and all(bool((s > 0).all()) for s in scores.values())
    for name, score in scores.items():
        torch.testing.assert_close(score, same_scores[name], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gates, same_gates, rtol=1e-4, atol=1e-6)


def test_original_widths_count_for_what_is_kept():
    host = GateDecorator(tick=1, tock=0, share=0.3, min_kept=0.5)
    with pytest.raises(BudgetError, match=r"cannot be met.*host\.min_kept = 0\.5"):
        start("residual", "gates", host=host, target=0.2)
    run = start("residual", "gates", host=host, target=Target(structures=0.55))
    for _ in range(40):
        run.step()
    assert all(after >= before // 2 for before, after in run.pruner.finish().widths.values())


@pytest.mark.parametrize(
    "wrong",
    [{"tick": 0}, {"ticks": 0}, {"tock": -1}, {"share": 1.0}, {"min_kept": 1.5}, {"lr_min": 1.0}, {"eta": -1.0},
     {"decay_in": "tock"}, {"strength": -1.0}],
    ids=lambda w: next(iter(w)),
)  # fmt: skip
def test_wrong_settings(wrong):
    with pytest.raises(ConfigError, match=f"host.{next(iter(wrong))}"):
        GateDecorator(**wrong)


def test_a_gated_model_is_proven_like_any_other():
    """Surgery on gated batch-norm is exact, so a removal in the middle of the training is, too."""
    model = build_model("residual")
    gate(model)
    structures = Graph(model, example()).structures
    picks = {"conv1": [1, 4], "conv2": [0, 7, 9]}
    surgery.zero_(model, structures, picks)
    before = copy.deepcopy(model).eval()(example())
    surgery.remove(model, structures, picks, example_inputs=example())
    assert type(model.bn2) is GatedBatchNorm2d and model.bn2.weight.shape == (9,)
    torch.testing.assert_close(model.eval()(example()), before)


def test_the_trainer_follows_the_phases():
    images = torch.randint(
        0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(40) % 5
    data = ImageData(
        "noise", images, labels, images[:10], labels[:10], torch.full((3,), 0.5), torch.ones(3), (*"abcde",)
    )
    host = GateDecorator(tick=2, tock=4, ticks=1, share=0.9, lr_min=0.01, lr_max=0.03)

    def attach(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, total: int) -> Pruner:
        smooth = SmoothPruning.one_step()
        return Pruner(model, x[:1], optimizer, 0.6, host=host, smooth=smooth, total_steps=total, start=2)

    settings = TrainSettings(epochs=4, batch_size=10, lr=0.5, schedule="constant")
    history = train(build_model("residual"), data, settings, seed=0, pruner_factory=attach, cpu=True)
    rates = [row["lr"] for row in history.rows]
    fine_tuning = [0.01, 0.015, 0.02, 0.025, 0.03, 0.025, 0.02, 0.015]
    assert rates == pytest.approx([0.5] * 2 + [0.01, 0.02, 0.03, 0.02] + [0.01] * 2 + fine_tuning)
    assert history.report.rounds == 1
