"""removal="at finish": what has faded is held at zero, no shape changes, and one cut at the end is the same network."""

import copy

import pytest
import torch
from torch import nn

from decay_pruning import BudgetError, Pruner, SmoothPruning, load, save

from .registry import batches, build_model, everywhere, example, start

STEPS = 30


def shapes(model):
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


@everywhere
def test_no_shape_changes_before_the_end(model_name, host_name, tmp_path):
    run = start(model_name, host_name, "sp", removal="at finish")
    before = shapes(run.model)
    for _ in range(STEPS):
        run.step()
        assert shapes(run.model) == before
    assert run.pruner.done, "the target is met by what is held"
    assert run.pruner.progress().removed == 0 and run.pruner.progress().held > 0
    run.model.eval()
    x, _ = next(batches(9))
    with torch.no_grad():
        wide = run.model(x)
    report = run.pruner.finish()
    assert report.removed > 0 and report.macs[1] <= 0.6 * report.macs[0]
    assert shapes(run.model) != before
    with torch.no_grad():
        assert torch.allclose(run.model(x), wide, atol=1e-5)
    save(run.model, tmp_path / "pruned.safetensors")
    fresh = load(build_model(model_name), tmp_path / "pruned.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(fresh(x), run.model(x))
    run.model.train()
    for _ in range(2):
        run.step()


def test_it_is_the_network_that_a_cut_at_once_makes():
    """Zeros take no part: the same structures go, and what stays learns the same."""
    ends = []
    for removal in ("at once", "at finish"):
        torch.manual_seed(0)
        model = build_model("residual").double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        pruner = Pruner(
            model, example(torch.float64), optimizer, 0.6, removal=removal, smooth=SmoothPruning(steps=4)
        )
        stream = batches(1, torch.float64)
        for _ in range(12):
            x, y = next(stream)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        ends.append((pruner.finish(), model.state_dict()))
    (once, a), (finish, b) = ends
    assert once.widths == finish.widths and once.removed == finish.removed
    for name, value in a.items():
        assert torch.allclose(value, b[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_nothing_revives_what_is_held(optimizer):
    """Not momentum, not Adam, not weight decay, not clipping."""
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    }[optimizer]
    model = build_model("residual")
    made = make(model.parameters())
    pruner = Pruner(model, example(), made, 0.6, removal="at finish", smooth=SmoothPruning(steps=3))
    stream = batches(1)
    for step in range(20):
        x, y = next(stream)
        made.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        made.step()
        if step < 3:
            continue
        held = [
            parameter.index_select(c.dim, c.position[torch.isin(c.owner, group.rows(ids))])
            for name, ids in pruner.engine.held.items()
            for group in [pruner.structures.groups[name]]
            for c in group.couplings
            if (parameter := dict(model.named_parameters()).get(c.tensor)) is not None
        ]
        assert held and not any(bool(part.any()) for part in held)


def test_rounds_go_on_while_nothing_is_cut():
    run = start("residual", "depgraph-rounds", "sp", removal="at finish")
    for _ in range(STEPS):
        run.step()
    assert run.pruner.progress().round >= 2 and run.pruner.finish().removed > 0


def test_resume_of_what_is_held():
    run = start("residual", "depgraph", "sp", removal="at finish")
    for _ in range(8):
        run.step()
    states = copy.deepcopy([run.pruner.state_dict(), run.model.state_dict(), run.optimizer.state_dict()])
    again = start("residual", "depgraph", "sp", removal="at finish")
    for part, state in zip((again.pruner, again.model, again.optimizer), states, strict=True):
        part.load_state_dict(state)
    for _ in range(8):
        next(again.batches)
    for _ in range(4):
        run.step(), again.step()
    assert run.pruner.finish() == again.pruner.finish()
    for (name, a), b in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_too_early_is_an_error_and_training_goes_on():
    run = start("residual", "depgraph", "sp", removal="at finish")
    run.step()
    with pytest.raises(BudgetError, match="still decaying"):
        run.pruner.finish()
    for _ in range(10):
        run.step()
    assert run.pruner.finish().removed > 0
