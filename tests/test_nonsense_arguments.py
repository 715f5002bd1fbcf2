"""Arguments of the pruner and of `inspect`, and what a user's function returns: right, or one clear sentence early."""

import functools
import inspect as signatures
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from decay_pruning import (
    ConfigError,
    Custom,
    DepGraph,
    GraphError,
    OTOv2,
    Pruner,
    SelfRectifying,
    SmoothPruning,
    Target,
    inspect,
    latency,
    measure,
    schedules,
)

from .registry import build_model, example
from .test_nonsense import NONSENSE


def no_picks(scene, goal):
    return {}


def made(**other):
    """A pruner, and the hooks that it has put on its optimizer."""
    model = build_model("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = dict(model=model, example_inputs=example(), optimizer=optimizer, target=0.5, total_steps=10)
    try:
        return Pruner(**{**arguments, **other})
    finally:
        made.hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


#: Argument → what is no nonsense there, and why.
FINE = {
    "host": {"none": "DepGraph", "function": "a host"},
    "smooth": {"none": "the defaults"},
    "rectify": {"none": "never"},
    "total_steps": {"none": "unknown; another error says that N is a fraction"},
    "removal": {"none": "as the wrapper allows"},
    "on_event": {"none": "nobody listens"},
    "group": {"none": "all processes"},
    "example_inputs": {
        "tensor": "the model says itself that it does not run on it",
        "object": "a user's own class of inputs",
        "function": "as above",
        "list of objects": "as above",
    },
}
ARGUMENTS = [name for name in signatures.signature(Pruner.__init__).parameters if name != "self"]


@pytest.mark.parametrize(
    ("argument", "kind"), [(a, kind) for a in ARGUMENTS for kind in NONSENSE if kind not in FINE.get(a, {})]
)
def test_nonsense_for_the_pruner(argument, kind):
    with pytest.raises(ConfigError, match=argument) as caught:
        made(**{argument: NONSENSE[kind]})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert made.hooks == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rectify": True}, r"rectify must be SelfRectifying\(\), or None for never, got true"),
        ({"rectify": 0.5}, r"rectify must be SelfRectifying\(\)"),
        ({"rectify": SelfRectifying}, "got the class SelfRectifying"),
        ({"smooth": 20}, r"smooth must be SmoothPruning\(\), or None for its defaults, got 20"),
        ({"host": DepGraph}, r"host is the class DepGraph; make one: DepGraph\(\)"),
        ({"host": "depgraph"}, r"a host such as DepGraph\(\), or a function .* got 'depgraph'"),
        ({"target": 50}, "target.macs must be between 0 and 1 as the fraction to keep, got 50"),
        ({"target": {"macs": 0.5}}, "target must be a Target or the fraction of MACs to keep, got"),
        ({"start": 1.0}, "start must be a whole number, got 1.0"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"total_steps": "10"}, "total_steps must be a whole number or none, got '10'"),
        ({"total_steps": torch.tensor(10)}, r"total_steps must be a whole number or none, got a tensor"),
        ({"example_inputs": {1: torch.ones(1)}}, "a dict of names"),
        (
            {"on_event": no_picks},
            r"on_event must be a function that takes an Event, or None, got <function no_picks",
        ),
        ({"host": lambda scene: {}}, "host.function must be a function of 2 arguments, got <function"),
        (
            {"also": nn.Sequential(nn.Linear(1, 1))},
            "also must be a list of copies of the model, got Sequential",
        ),
        ({"on_event": []}, "on_event must be a function that takes an Event, or None, got"),
    ],
)
def test_messages(wrong, message):
    with pytest.raises(ConfigError, match=message):
        made(**wrong)


def test_numbers_of_numpy_become_pythons():
    smooth = SmoothPruning(np.int64(3))
    pruner = made(target=np.float32(0.5), start=np.int64(2), total_steps=np.int32(40), smooth=smooth)
    assert pruner.target == Target(macs=0.5)
    found = pruner.start, pruner.total_steps, smooth.steps, pruner.state_dict()["due"]
    assert {type(n) for n in found} == {int}


def test_functions_by_their_arguments():
    for listener in (print, [].append, lambda *events: None, functools.partial(lambda a, b: None, 1)):
        assert made(on_event=listener).target.keep == 0.5
    for importance in (lambda: 1, lambda group, more: 1, nn.ReLU):
        with pytest.raises(
            ConfigError, match=r"importance must be one of .* or a function of 1 argument, got"
        ):
            DepGraph(importance=importance)
    with pytest.raises(ConfigError, match=r"criterion must be .* or a function of 2 arguments or none, got"):
        SelfRectifying(criterion=lambda seen: seen)


def test_hosts_of_a_users_own():
    assert isinstance(made(host=no_picks).host, Custom)
    assert isinstance(made(host=functools.partial(no_picks)).host, Custom)
    assert isinstance(made(host=OTOv2()).host, OTOv2)


# -- inspect, measure, latency -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": ("conv1",)}, r"no option 'ignore', only ignored, .*did you mean 'ignored'\?"),
        ({"ignored": "conv1"}, "ignored must be a list of names"),
        ({"ignored": [3]}, "ignored"),
        ({"ignored": [int]}, "ignored"),
        ({"heads": {"conv1": 0}}, r"heads\['conv1'\] must be at least 1"),
        ({"heads": None}, "heads must be a mapping, got None"),
        ({"allow_inexact": 1}, "allow_inexact must be true or false, got 1"),
        ({"host": DepGraph}, "make one"),
        ({"host": 3}, "host must be a host"),
        ({"host": DepGraph(), "heads": {}}, "to the host, not beside it"),
    ],
)
def test_nonsense_for_inspect(options, message):
    with pytest.raises(ConfigError, match=message):
        inspect(build_model("residual"), example(), **options)


def test_inspect_takes_what_graphs_take():
    model = build_model("residual")
    for ignored in (["conv2"], [model.conv2], {"conv2"}):
        assert "conv2" in inspect(model, example(), ignored=ignored).unprunable
    with pytest.raises(GraphError, match="conv1: ignored, as asked"):
        inspect(model, example(), ignored=[nn.Conv2d])


@pytest.mark.parametrize("function", [measure, latency, inspect])
@pytest.mark.parametrize(
    "inputs", [None, "x", 3, True, np.ones((1, 3, 8, 8)), nn.ReLU(), {3: torch.ones(1)}], ids=str
)
def test_what_are_no_inputs(function, inputs):
    with pytest.raises(ConfigError, match="example_inputs must be a tensor"):
        function(build_model("residual"), inputs)


# -- what a user's function returns ------------------------------------------------------------------------------


def test_picks_that_do_not_exist_are_told_before_anything_is_touched():
    for ids in ([99], [-1], itertools.count(), [10**30]):
        with pytest.raises(ConfigError, match=r"layer group 'conv1' has no structure .* \(any more\)"):
            made(host=lambda scene, goal, ids=ids: {"conv1": ids}).plan()


@pytest.mark.parametrize(
    "picks",
    [None, 1, ["conv1"], {"conv1": 1.0}, {"conv1": [0.5]}, {"conv1": [True]}, {"conv1": None}, {3: [1]}],
    ids=str,
)
def test_picks_that_are_none_in_a_training(picks):
    pruner = made(host=lambda scene, goal: picks)
    pruner.model(example()).sum().backward()
    with pytest.raises(ConfigError, match=r"a host (returns|picked)|picks of layer group"):
        pruner._optimizer.step()


def test_picks_of_a_generator_lead_to_the_target():
    def halves(scene, goal):
        return {name: (int(i) for i in g.ids[: len(g) // 2]) for name, g in scene.structures.groups.items()}

    pruner = made(host=halves, smooth=SmoothPruning.one_step())
    pruner.model(example()).sum().backward()
    pruner._optimizer.step()
    assert pruner.finish().widths["conv2"] == (12, 6)


@pytest.mark.parametrize(
    "schedule",
    [int, functools.partial(schedules.exponential, rate=0), lambda n: 1.0, lambda n, N: None, lambda n, N: True,
     lambda n, N: torch.tensor(1.0), lambda n, N: float("nan"), lambda n, N: n / N],
)  # fmt: skip
def test_what_is_no_schedule(schedule):
    with pytest.raises(ConfigError, match="schedule"):
        SmoothPruning(schedule=schedule)


def test_a_schedule_may_count_in_numpy():
    assert SmoothPruning(schedule=lambda n, N: np.float32(1) - np.float32(n / N)).left(1, 4) == 0.75
