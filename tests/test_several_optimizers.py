"""Several optimizers train one model: the steps of one are counted, the state of all is cut, none is forgotten."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn

from decay_pruning import ConfigError, Pruner, SelfRectifying, SmoothPruning, surgery

from .registry import batches, build_model, example

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


def halves(model):
    """Every second parameter, and the others: rows and norms of one structure lie in both."""
    parameters = list(model.parameters())
    return parameters[::2], parameters[1::2]


def train(model, optimizers, pruner, steps):
    stream = batches(1)
    for x, y in itertools.islice(stream, steps):
        loss = nn.functional.cross_entropy(model(x), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return pruner.finish()


def settings(**changes):
    return {"smooth": SmoothPruning(steps=4), "rectify": SelfRectifying(), "total_steps": 20} | changes


@pytest.mark.parametrize("counted", [0, 1])
def test_two_take_what_one_would(counted):
    """Whichever is counted: the same structures go, and the weights end within a step of each other's."""
    one, two = build_model("residual"), build_model("residual")
    whole = torch.optim.SGD(one.parameters(), **SGD)
    report = train(one, [whole], Pruner(one, example(), whole, 0.6, **settings(rectify=None)), 20)
    both = [torch.optim.SGD(part, **SGD) for part in halves(two)]
    order = [both[counted], both[1 - counted]]
    again = train(two, both, Pruner(two, example(), order, 0.6, **settings(rectify=None)), 20)
    assert report == again and report.removed > 0
    assert surgery.history(one).state_dict() == surgery.history(two).state_dict()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=0.1), name


@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize("removal", ["at once", "at finish"])
def test_the_state_of_all_is_cut(counted, removal):
    model = build_model("residual")
    muon_like, adam = (
        make(part)
        for make, part in zip(
            (lambda p: torch.optim.SGD(p, **SGD), torch.optim.AdamW), halves(model), strict=True
        )
    )
    both = [muon_like, adam]
    order = [both[counted], both[1 - counted]]
    report = train(model, both, Pruner(model, example(), order, 0.6, removal=removal, **settings()), 20)
    assert report.removed > 0
    for optimizer in both:
        for group in optimizer.param_groups:
            for p in group["params"]:
                shapes = {v.shape for v in optimizer.state[p].values() if v.ndim}
                assert shapes == {p.shape}
    stream = batches(2)
    for x, y in itertools.islice(stream, 3):  # and training goes on
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.isfinite(loss)


def test_what_is_held_stays_zero_whoever_steps_last():
    model = build_model("residual")
    first, last = (torch.optim.AdamW(part, lr=0.01) for part in halves(model))
    pruner = Pruner(model, example(), [first, last], 0.6, removal="at finish", smooth=SmoothPruning(steps=3))
    stream = batches(1)
    for step, (x, y) in enumerate(itertools.islice(stream, 10)):
        nn.functional.cross_entropy(model(x), y).backward()
        for optimizer in (first, last):
            optimizer.step()
            optimizer.zero_grad()
        if step < 4:
            continue
        held = pruner.engine.held
        assert held
        parameters = dict(model.named_parameters())
        for name, ids in held.items():
            group = pruner.structures.groups[name]
            rows = group.rows(ids)
            for c in group.couplings:
                if c.tensor in parameters:
                    places = c.position[torch.isin(c.owner, rows)]
                    assert not parameters[c.tensor].index_select(c.dim, places).any(), c.tensor


def test_one_that_nobody_spoke_of_is_found_before_it_moves():
    model = build_model("residual")
    known, unknown = (torch.optim.SGD(part, **SGD) for part in halves(model))
    pruner = Pruner(model, example(), known, 0.6, **settings())
    x, y = next(batches(1))
    nn.functional.cross_entropy(model(x), y).backward()
    known.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ConfigError, match=r"a SGD that the pruner does not know trains '.*give all optimizers"
    ):
        unknown.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    pruner.cancel()
    unknown.step()


def test_a_wrapper_around_one_that_was_given_is_known():
    class Twice(torch.optim.Optimizer):
        """Steps another optimizer, and has the same parameters."""

        def __init__(self, base):
            super().__init__(base.param_groups, {})
            self.base = base

        def step(self, closure=None):
            self.base.step()

    model = build_model("residual")
    base = torch.optim.SGD(model.parameters(), **SGD)
    wrapper = Twice(base)
    assert train(model, [wrapper], Pruner(model, example(), base, 0.6, **settings()), 20).removed > 0


def test_optimizers_of_other_models_are_nobodys_business():
    model, other = build_model("residual"), build_model("plain")
    mine = torch.optim.SGD(model.parameters(), **SGD)
    theirs = torch.optim.SGD(other.parameters(), **SGD)
    Pruner(model, example(), mine, 0.6, **settings())
    other(example()).sum().backward()
    theirs.step()


def test_a_pruner_that_is_dropped_leaves_nothing_behind():
    model = build_model("plain")
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    pruner = weakref.ref(Pruner(model, example(), optimizer, 0.6, **settings()))
    del optimizer
    gc.collect()
    assert pruner() is None, "only the optimizer keeps it"
    fresh = torch.optim.SGD(model.parameters(), **SGD)
    model(example()).sum().backward()
    fresh.step()


@pytest.mark.parametrize(
    ("wrong", "message"), [([], "empty list"), (None, "must be a torch.optim.Optimizer")]
)
def test_no_optimizer_at_all(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Pruner(build_model("plain"), example(), wrong, 0.6, smooth=SmoothPruning(steps=2))


def test_the_same_one_twice():
    model = build_model("plain")
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    with pytest.raises(ConfigError, match="twice"):
        Pruner(model, example(), [optimizer, optimizer], 0.6, smooth=SmoothPruning(steps=2))


class Lookahead:
    """Slow weights in plain lists, as most people have them."""

    def __init__(self, optimizer, every=3):
        self.optimizer, self.every, self.steps = optimizer, every, 0
        self.slow = [[p.detach().clone() for p in g["params"]] for g in optimizer.param_groups]

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.every == 0:
            for group, slow in zip(self.optimizer.param_groups, self.slow, strict=True):
                for p, w in zip(group["params"], slow, strict=True):
                    w.lerp_(p.detach(), 0.5)
                    p.data.copy_(w)


def test_weights_that_a_wrapper_keeps_elsewhere():
    """They cannot be cut, so it is said; held at zero until the end, everything fits."""
    model = build_model("residual")
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.05))
    with pytest.raises(ConfigError, match="Lookahead keeps tensors of the parameters' shapes in 'slow'"):
        Pruner(model, example(), optimizer, 0.6, **settings())
    report = train(
        model, [optimizer], Pruner(model, example(), optimizer, 0.6, removal="at finish", **settings()), 20
    )
    assert report.removed > 0


@pytest.mark.parametrize("removal", ["at once", "at finish"])
def test_steps_inside_of_backward_are_refused(removal):
    model = build_model("plain")
    one_each = [torch.optim.SGD([p], lr=0.01) for p in model.parameters()]
    for p, optimizer in zip(model.parameters(), one_each, strict=True):
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    Pruner(model, example(), one_each, 0.6, removal=removal, **settings())
    x, y = next(batches(1))
    with pytest.raises(ConfigError, match=r"steps inside of backward\(\)"):
        nn.functional.cross_entropy(model(x), y).backward()


def test_muon_beside_adamw():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 5)
    )
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    both = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=1e-3)]
    pruner = Pruner(model, torch.randn(2, 10), both, 0.6, **settings())
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(torch.randn(16, 10)), torch.randint(0, 5, (16,)))
        loss.backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    assert pruner.finish().removed > 0
    for optimizer in both:
        for p, state in optimizer.state.items():
            assert all(v.shape == p.shape for v in state.values() if v.ndim)
