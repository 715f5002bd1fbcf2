"""A run goes on bit for bit from a checkpoint of `torch.distributed.checkpoint`, in one process too."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict

from decay_pruning import ConfigError, DepGraph, Pruner, Stateful

from .registry import build_model, example, start

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def write(tmp_path):
    def write(states):
        dcp.save(states, checkpoint_id=tmp_path, no_dist=True)

    return write


@pytest.fixture
def read(tmp_path):
    def read(states):
        dcp.load(states, checkpoint_id=tmp_path, no_dist=True)

    return read


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def states(run):
    model, optimizer = get_state_dict(run.model, run.optimizer)
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize(
    ("host", "arm", "stop"), [("depgraph", "sr", 2), ("depgraph-rounds", "paper", 7), ("gates", "sp", 5)]
)
def test_it_goes_on(write, read, host, arm, stop):
    run = start("plain", host, arm, optimizer=adam)
    for _ in range(stop):
        run.step()
    write({"pruner": Stateful(run.pruner)} | states(run))
    other = start("plain", host, arm, optimizer=adam)
    for _ in range(stop):
        next(other.batches)
    read({"pruner": Stateful(other.pruner)})
    read(found := states(other))
    set_state_dict(
        other.model, other.optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
    )
    for _ in range(10):
        assert run.step() == other.step()
    assert run.pruner.progress() == other.pruner.progress()


def test_what_is_no_state_of_this_pruner_is_refused(write, read):
    run, other = start("plain", "depgraph"), start("plain", "custom")
    write({"pruner": Stateful(run.pruner)})
    with pytest.raises(ConfigError, match="DepGraph"):
        read({"pruner": Stateful(other.pruner)})
    with pytest.raises(ConfigError, match="no state of a pruner"):
        Stateful(run.pruner).load_state_dict({"state": b"something else"})
    with pytest.raises(ConfigError, match="pruner must be"):
        Stateful(DepGraph())


def test_the_step_that_fills_an_optimizers_state_is_none():
    """torch makes one, at learning rate 0 and on gradients of zero, before it saves or loads."""
    model = build_model("plain")
    optimizer = adam(model.parameters())
    pruner = Pruner(model, example(), optimizer, 0.5, total_steps=50)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state and pruner.progress().step == 0 and not pruner.progress().decaying
    optimizer.param_groups[0]["lr"] = 0.0  # a schedule that begins at zero
    model(example()).sum().backward()
    optimizer.step()
    assert pruner.progress().step == 1 and pruner.progress().decaying
