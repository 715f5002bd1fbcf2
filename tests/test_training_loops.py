"""Loops as people have them: closures, wrapped optimizers, averages beside; refusals that come early, and once."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from decay_pruning import (
    BudgetError,
    ConfigError,
    DecayPruningError,
    Pruner,
    SelfRectifying,
    SmoothPruning,
    SurgeryError,
    prune_like,
    surgery,
)

from .registry import HOSTS, Run, batches, build_model, example, start


def loss_of(run: Run) -> torch.Tensor:
    x, y = next(run.batches)
    return nn.functional.cross_entropy(run.model(x), y)


# -- closures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_name", list(HOSTS))
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_is_the_plain_loop_bit_for_bit(host_name, by_keyword):
    ends = []
    for closes in (False, True):
        run = start("residual", host_name, "sr")
        for _ in range(14):
            if not closes:
                run.step()
                continue

            def closure(run=run):
                loss = loss_of(run)
                run.optimizer.zero_grad()
                loss.backward()
                return loss

            loss = run.optimizer.step(closure=closure) if by_keyword else run.optimizer.step(closure)
            assert loss is not None and loss.requires_grad
        ends.append((run.pruner.progress(), run.model.state_dict()))
    assert ends[0][0] == ends[1][0]
    assert ends[0][0].removed > 0 or ends[0][0].released > 0
    for name, value in ends[0][1].items():
        assert torch.equal(value, ends[1][1][name]), name


class Twice(torch.optim.SGD):
    """Calls its closure two times, as line searches do."""

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        return super().step(closure)


def test_a_closure_that_is_called_twice_is_refused_once():
    run = start("residual", "depgraph", "sp", optimizer=lambda p: Twice(p, lr=0.01))
    with pytest.raises(ConfigError, match="more than once in a step"):
        run.optimizer.step(lambda: loss_of(run))


def test_a_closure_that_raises_changes_nothing():
    run = start("residual", "otov2", "sr")
    run.step()
    before = copy.deepcopy(run.model.state_dict())

    def closure():
        raise ValueError("no more data")

    with pytest.raises(ValueError, match="no more data"):
        run.optimizer.step(closure)
    assert all(torch.equal(v, before[name]) for name, v in run.model.state_dict().items())
    assert run.pruner.progress().step == 1


# -- wrappers --------------------------------------------------------------------------------------------------


class Sharp(torch.optim.Optimizer):
    """Two half steps by hand around an inner optimizer, and state of its own in the parameters' shape."""

    def __init__(self, params, inner):
        super().__init__(params, {})
        self.base_optimizer = inner(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def climb(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["home"] = p.detach().clone()
            p.add_(p.grad, alpha=0.01)

    @torch.no_grad()
    def come_back(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["home"])
        self.base_optimizer.step()


class Slow:
    """Lookahead as most people write it: no `torch.optim.Optimizer` itself."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def test_two_half_steps_around_an_inner_optimizer():
    run = start(
        "residual", "depgraph", "sr", optimizer=lambda p: Sharp(p, lambda g: torch.optim.SGD(g, lr=0.05))
    )
    for _ in range(12):
        loss_of(run).backward()
        run.optimizer.climb()
        run.optimizer.zero_grad()
        loss_of(run).backward()
        run.optimizer.come_back()
        run.optimizer.zero_grad()
    assert run.pruner.finish().removed > 0
    for p in run.model.parameters():
        assert run.optimizer.state[p]["home"].shape == p.shape


def test_a_wrapper_that_is_no_optimizer():
    run = start("residual", "depgraph", "sp", optimizer=lambda p: Slow(torch.optim.SGD(p, lr=0.05)))
    for _ in range(6):
        loss_of(run).backward()
        run.optimizer.step()
        run.optimizer.optimizer.zero_grad()
    assert run.pruner.finish().removed > 0


# -- refused early, and once -----------------------------------------------------------------------------------


class Matrices(torch.optim.SGD):
    """Keeps a list of matrices for each weight, from its first step on."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("factors", [torch.eye(n) for n in p.shape])
        return super().step(closure)


class Flat(torch.optim.SGD):
    """Keeps everything of a weight in one vector."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("flat", p.detach().flatten().clone())
        return super().step(closure)


@pytest.mark.parametrize("kind", [Matrices, Flat])
@pytest.mark.parametrize("started", [False, True])
def test_state_that_cannot_be_cut_is_said_before_anything_fades(kind, started):
    def optimizer(parameters):
        made = kind(list(parameters), lr=0.01)
        if started:
            made.step()
        return made

    if started:
        with pytest.raises(ConfigError, match=kind.__name__):
            start("plain", "depgraph", "sp", optimizer=optimizer)
        return
    run = start("plain", "depgraph", smooth=SmoothPruning(steps=10), optimizer=optimizer)
    with pytest.raises(ConfigError, match=kind.__name__):
        run.step()
    for _ in range(12):
        run.step()
    assert run.pruner.progress().removed == 0
    with pytest.raises(BudgetError, match=f"given up at step .*{kind.__name__}"):
        run.pruner.finish()


def test_lbfgs_is_refused_when_the_pruner_is_made():
    with pytest.raises(ConfigError, match="LBFGS keeps one flat history"):
        start("plain", "depgraph", optimizer=lambda p: torch.optim.LBFGS(p))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapper_inside_the_model_is_refused_by_name(wrap):
    model = nn.Sequential(wrap(build_model("plain")), nn.Linear(5, 5))
    with pytest.raises(ConfigError, match=r"wrapped in (DataParallel|OptimizedModule), inside of the model"):
        Pruner(model, example(), torch.optim.SGD(model.parameters(), lr=0.1), 0.5, total_steps=10)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("wrap", "removal"),
    [
        (nn.DataParallel, None),
        (partial(torch.compile, backend="eager"), None),
        (partial(torch.compile, backend="eager"), "at once"),
    ],
    ids=["DataParallel", "compiled", "compiled, at once"],
)
def test_a_wrapped_model_is_looked_into(wrap, removal):
    """It trains through its wrapper to the same network as without."""
    ends = []
    for wrapped in (False, True):
        model = build_model("residual")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        train = wrap(model) if wrapped else model
        settings = {"smooth": SmoothPruning(steps=3), "removal": removal or "at finish"}
        if wrapped and removal is None:
            del settings["removal"]
        pruner = Pruner(train, example(), optimizer, 0.6, **settings)
        assert pruner.model is model and pruner.removal == (removal or "at finish")
        stream = batches(1)
        for _ in range(6):
            x, y = next(stream)
            optimizer.zero_grad()
            nn.functional.cross_entropy(train(x), y).backward()
            optimizer.step()
        ends.append((pruner.finish(), model.state_dict()))
    assert ends[0][0] == ends[1][0] and ends[0][0].removed > 0
    for name, value in ends[0][1].items():
        assert torch.allclose(value, ends[1][1][name], atol=1e-6), name


def test_a_wrapper_that_keeps_shapes_and_a_cut_at_once_are_refused():
    model = build_model("plain")
    with pytest.raises(ConfigError, match=r"DataParallel, which keeps the shapes.*wrap it afterwards"):
        Pruner(
            nn.DataParallel(model), example(), torch.optim.SGD(model.parameters(), lr=0.1), 0.5,
            removal="at once", smooth=SmoothPruning(steps=3),
        )  # fmt: skip


def test_a_removal_that_is_refused_is_said_once(monkeypatch):
    run = start("plain", "depgraph", "sp")

    def refused(*_, **__):
        raise SurgeryError("removal undone, the model is as it was: no")

    monkeypatch.setattr(surgery, "remove", refused)
    errors = []
    for _ in range(10):
        try:
            run.step()
        except DecayPruningError as error:
            errors.append(error)
    assert len(errors) == 1
    assert run.pruner.progress().held == 0
    weight = run.model.conv1.weight.detach()
    assert bool(weight.flatten(1).norm(dim=1).gt(0).all()), "what had faded is free to grow again"
    with pytest.raises(BudgetError, match="removal undone"):
        run.pruner.finish()


@pytest.mark.parametrize("host_name", list(HOSTS))
def test_cancel_takes_the_pruner_off(host_name):
    run = start("residual", host_name, "sr")
    for _ in range(3):
        run.step()
    run.pruner.cancel()
    before = run.pruner.progress()
    widths = [p.shape for p in run.model.parameters()]
    for _ in range(10):
        run.step()
    assert run.pruner.progress().step == before.step
    assert [p.shape for p in run.model.parameters()] == widths
    assert not run.optimizer._optimizer_step_pre_hooks and not run.optimizer._optimizer_step_post_hooks
    with pytest.raises(BudgetError, match="cancelled"):
        run.pruner.finish()


@pytest.mark.parametrize("kind", ["picked", "released", "removed"])
def test_a_callback_that_raises_leaves_the_pruner_as_it_should_be(kind):
    def on_event(event):
        if event.kind == kind:
            raise ValueError(kind)

    always = SelfRectifying(-1.0, -1.0, "outward_and_regrowth", max_share=0.3)
    run = start("residual", "depgraph", smooth=SmoothPruning(steps=4), rectify=always, on_event=on_event)
    raised = 0
    for _ in range(20):
        try:
            run.step()
        except ValueError:
            raised += 1
    assert raised
    assert run.pruner.finish().macs[1] <= 0.6 * run.pruner.before.macs


# -- copies ----------------------------------------------------------------------------------------------------


def same_shapes(a: nn.Module, b: nn.Module) -> bool:
    return [(n, t.shape) for n, t in a.state_dict().items()] == [
        (n, t.shape) for n, t in b.state_dict().items()
    ]


@pytest.mark.parametrize("late", [False, True])
def test_an_average_follows_by_itself(late):
    run = start("residual", "depgraph-rounds", "sp")
    made = {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True}
    average = None if late else AveragedModel(run.model, **made)
    other = build_model("residual", seed=5)
    others = AveragedModel(other, **made)
    for _ in range(20):
        run.step()
        if average is None:
            average = AveragedModel(run.model, **made)
        average.update_parameters(run.model)
        others.update_parameters(other)
    assert run.pruner.finish().removed > 0
    assert same_shapes(average.module, run.model)
    assert same_shapes(others.module, other), "an average of another model of the same shape is left alone"
    for _ in range(40):
        average.update_parameters(run.model)
    x, _ = next(run.batches)
    torch.testing.assert_close(average.module.eval()(x), run.model.eval()(x), rtol=1e-4, atol=1e-4)


class Moving:
    """An average as Ultralytics and timm have it: the copy is an attribute."""

    def __init__(self, model):
        self.ema = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model):
        for mine, theirs in zip(self.ema.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)


@pytest.mark.parametrize("bare", [False, True])
def test_copies_that_are_named_follow(bare):
    model = build_model("residual")
    moving = Moving(model)
    run = start("residual", "depgraph", "sp", also=[moving.ema if bare else moving])
    for _ in range(10):
        run.step()
        moving.update(run.model)
    assert run.pruner.finish().removed > 0
    assert same_shapes(moving.ema, run.model)


def test_what_is_no_copy_is_refused():
    with pytest.raises(ConfigError, match="also: Plain is no copy"):
        start("residual", "depgraph", "sp", also=[build_model("plain")])


def test_a_fresh_copy_is_cut_like_the_model():
    run = start("residual", "depgraph-rounds", "sp")
    fresh, halfway = build_model("residual", seed=3), None
    for _ in range(20):
        run.step()
        if run.pruner.progress().removed and halfway is None:
            halfway = copy.deepcopy(run.model)
    assert run.pruner.finish().removed > 0
    bare = fresh.state_dict()
    prune_like(bare, run.model)
    for each in (fresh, halfway):
        prune_like(each, run.model)
        assert same_shapes(each, run.model)
    assert bare.keys() == fresh.state_dict().keys()
    assert all(torch.equal(bare[name], tensor) for name, tensor in fresh.state_dict().items())
    with pytest.raises(SurgeryError):
        prune_like(build_model("plain"), run.model)
    for wrong in (build_model("plain").state_dict(), bare):  # other names; cut already
        before = dict(wrong)
        with pytest.raises(SurgeryError, match="state dict"):
            prune_like(wrong, run.model)
        assert all(wrong[name] is tensor for name, tensor in before.items())


def test_a_pruner_says_where_it_stands():
    run = start("residual", "depgraph", "sp")
    assert repr(run.pruner) == (
        "Pruner(DepGraph, macs to 60 %: step 0, 100.0 % of MACs; 0 decaying, 0 held, 0 released, 0 removed)"
    )
    for _ in range(2):
        run.step()
    assert f"step 2, 100.0 % of MACs; {len(run.pruner.engine.decaying)} decaying" in str(run.pruner)
    run.pruner.cancel()
    assert repr(run.pruner).endswith("given up: it was cancelled)")
