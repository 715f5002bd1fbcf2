"""Every field of every dataclass of settings, and every public argument, refuses every kind of nonsense."""

import dataclasses
import types
import typing

import numpy as np
import pytest
import torch
from torch import nn

import decay_pruning
from decay_pruning import (
    ConfigError,
    Custom,
    DepGraph,
    GateDecorator,
    Goal,
    OTOv2,
    Phase,
    SelfRectifying,
    SmoothPruning,
    SparseLearning,
    Target,
    choose,
    latency,
    measure,
)
from decay_pruning.budget import as_target
from decay_pruning.checks import above, at_least, check
from decay_pruning.hosts.base import as_picks
from decay_pruning.lab import peers, recipe, trainer

from .registry import start


def no_picks(scene, goal):
    return {}


#: Settings, and what has to be said to make them.
SETTINGS = {
    Target: {},
    SmoothPruning: {},
    SelfRectifying: {},
    Goal: {"of": "macs", "at_most": 1.0},
    Phase: {"name": "tick", "step": 0},
    DepGraph: {},
    OTOv2: {},
    GateDecorator: {},
    SparseLearning: {},
    Custom: {"function": no_picks},
    trainer.TrainSettings: {},
    recipe.DataSettings: {},
    recipe.ModelSettings: {},
    recipe.Dense: {},
    recipe.Sparse: {},
    recipe.Prune: {},
    recipe.ReportSettings: {},
    recipe.Recipe: {},
    peers.GrowingReg: {},
    peers.Peer: {"removals": (0.0,)},
}
#: What users read but do not make.
RESULTS = {
    "Cost",
    "Coupling",
    "Event",
    "LayerGroup",
    "Exported",
    "Plan",
    "Progress",
    "PruningReport",
    "Scene",
    "StructureSet",
}

#: Fields in which a number below zero makes sense.
SIGNED = {"t_rate", "t_len"}
NONSENSE = {
    "object": object(),
    "none": None,
    "yes": True,
    "text": "zzzzzz",
    "bytes": b"1",
    "nan": float("nan"),
    "infinity": float("inf"),
    "minus infinity": -float("inf"),
    "numpy nan": np.float32("nan"),
    "complex": 1j,
    "huge": 10**5000,
    "too large": 2**63,
    "negative": -1,
    "negative share": -0.5,
    "tensor": torch.tensor(0.5),
    "array": np.array([-0.5, 0.5]),
    "function": no_picks,
    "class": int,
    "list of objects": [object()],
    "mapping of objects": {object(): object()},
}


def kinds(hint):
    """The plain types that a hint allows, ranges aside."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {kind for option in typing.get_args(hint) for kind in kinds(option)}
    return {typing.get_origin(hint) or hint}


def is_fine(value, allowed, hint):
    """Whether this is no nonsense for a field of such a kind."""
    if isinstance(value, str):
        return str in allowed and "OneOf" not in str(hint)
    if callable(value) and not isinstance(value, type):
        return any("Callable" in str(kind) for kind in allowed)
    return (value is None and type(None) in allowed) or (value is True and bool in allowed)


FIELDS = [(cls, field.name) for cls in SETTINGS for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=lambda each: getattr(each, "__name__", each))
def test_nonsense_in_a_field(cls, field):
    allowed = kinds(typing.get_type_hints(cls)[field])
    hint = typing.get_type_hints(cls, include_extras=True)[field]
    for kind, value in NONSENSE.items():
        if is_fine(value, allowed, hint) or (field in SIGNED and kind.startswith("negative")):
            continue
        try:
            cls(**{**SETTINGS[cls], field: value})
        except ConfigError as error:
            assert field in str(error), kind
            assert "\n" not in str(error) and len(str(error)) < 400, kind
        else:
            pytest.fail(f"{kind} was taken")


def test_every_public_dataclass_is_known_here():
    public = {n for n in decay_pruning.__all__ if dataclasses.is_dataclass(getattr(decay_pruning, n))}
    assert public - RESULTS == {cls.__name__ for cls in SETTINGS} & public


def test_a_new_field_is_checked_without_a_line():
    @dataclasses.dataclass(frozen=True)
    class New:
        steps: int = 1

        def __post_init__(self):
            check(self, "new")

    with pytest.raises(ConfigError, match=r"^new\.steps must be a whole number, got 1\.0$"):
        New(1.0)


def test_numbers_of_numpy_become_pythons():
    host = DepGraph(
        rounds=np.int64(3), min_kept=np.float32(0.5), ignored=["conv1"], allow_inexact=np.bool_(True)
    )
    assert host == DepGraph(rounds=3, min_kept=0.5, ignored=("conv1",), allow_inexact=True)
    assert [type(x) for x in (host.rounds, host.min_kept, host.allow_inexact)] == [int, float, bool]
    assert as_target(np.float64(0.25)) == as_target(0.25) == Target(macs=0.25)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: DepGraph(importance="magnitud"), r"did you mean 'magnitude'\?"),
        (lambda: DepGraph(scope="globl"), r"did you mean 'global'\?"),
        (lambda: OTOv2(decay_from="half space"), r"did you mean 'half-space'\?"),
        (lambda: DepGraph(ignored="conv1"), "list of names of modules, got 'conv1'"),
        (lambda: DepGraph(heads={"qkv": 0}), r"host\.heads\['qkv'\] must be at least 1, got 0"),
        (
            lambda: OTOv2(deadline=1.5),
            "above 0 and at most 1 as a share of the training that is left, got 1.5",
        ),
        (
            lambda: OTOv2(deadline="soon"),
            "a number of optimizer steps or a share of the training .* got 'soon'",
        ),
        (lambda: Target(macs=torch.ones(2)), r"got a tensor of shape \(2,\)"),
    ],
)
def test_messages(made, message):
    with pytest.raises(ConfigError, match=message):
        made()


def test_ranges_in_words():
    assert str(above(0, below=1)) == "between 0 and 1"
    assert str(at_least(0, below=1)) == "at least 0 and below 1"
    assert str(above(0, most=1)) == "above 0 and at most 1"


# -- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [*NONSENSE.values(), 0, 1, 1.0], ids=[*NONSENSE, "0", "1", "1.0"])
def test_nonsense_as_a_target(value):
    with pytest.raises(ConfigError, match="target"):
        as_target(value)


@pytest.mark.parametrize("argument", ["repeats", "warmup"])
@pytest.mark.parametrize("value", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_for_latency(argument, value):
    with pytest.raises(ConfigError, match=argument):
        latency(nn.Linear(2, 2), torch.ones(1, 2), **{argument: value})


def test_what_is_no_model():
    for function in (measure, latency):
        with pytest.raises(ConfigError, match="model must be a Module, got"):
            function("resnet", torch.ones(1))


@pytest.fixture(scope="module")
def pruner():
    return start("residual", "depgraph", "single").pruner


def test_picks_come_in_any_iterable_of_whole_numbers(pruner):
    for ids in (
        [3, 1, 1], {1, 3}, (i for i in (3, 1)), np.array([1, 3]), torch.tensor([3, 1]), range(1, 4, 2),
        {1: 0, 3: 0}.keys(), [np.int32(1), torch.tensor(3)], np.array([1, 3], dtype=object), frozenset({1, 3}),
    ):  # fmt: skip
        picks = as_picks({"conv1": ids}, pruner.structures)
        assert picks == {"conv1": [1, 3]} and all(type(i) is int for i in picks["conv1"])
    assert as_picks({"conv1": torch.zeros(0, dtype=torch.int64)}, pruner.structures) == {}


@pytest.mark.parametrize(
    "ids",
    [
        None, 3, "01", b"01", [1.0], [True], [None], ["1"], [[1]], np.array([0.5]), np.ones((2, 2), dtype=int),
        torch.tensor([1.0]), torch.tensor(1), torch.ones(4, dtype=torch.bool), np.ones(4, dtype=bool), {1: 2},
        [torch.ones(2)], (x for x in (1, 0.5)), object(),
    ],
    ids=lambda each: type(each).__name__,
)  # fmt: skip
def test_picks_of_something_else(pruner, ids):
    with pytest.raises(ConfigError, match="picks of layer group 'conv1' must be whole numbers"):
        as_picks({"conv1": ids}, pruner.structures)


@pytest.mark.parametrize(
    "picks",
    [None, 3, "conv1", [("conv1", [1])], {"conv1"}, (x for x in ())],
    ids=lambda each: type(each).__name__,
)
def test_picks_that_are_no_mapping(pruner, picks):
    with pytest.raises(ConfigError, match="a host returns a mapping"):
        as_picks(picks, pruner.structures)


def test_picks_from_a_layer_group_that_does_not_exist(pruner):
    with pytest.raises(ConfigError, match=r"'cnv1', which is no layer group; did you mean 'conv1'\?"):
        as_picks({"cnv1": [1]}, pruner.structures)
    with pytest.raises(ConfigError, match="which is no layer group"):
        as_picks({7: [1]}, pruner.structures)


@pytest.mark.parametrize(
    "argument",
    [
        {"scope": "globl"}, {"scope": None}, {"min_kept": 1.0}, {"min_kept": -1}, {"min_kept": float("nan")},
        {"min_kept": True}, {"round_to": 0}, {"round_to": 2.0}, {"strict": 1}, {"strict": None},
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_for_choose(pruner, argument):
    scene, goal = pruner._scene(), pruner._goal(1.0)
    scores = {name: torch.rand(len(group)) for name, group in pruner.structures.groups.items()}
    with pytest.raises(ConfigError, match=next(iter(argument))):
        choose(scene, scores, goal, **argument)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "scores are a mapping"),
        ([1.0], "scores are a mapping"),
        ({"cnv1": torch.ones(4)}, r"no layer group 'cnv1'; did you mean 'conv1'\?"),
        ({"conv1": torch.ones(3, 3)}, r"one per structure; got shape \(3, 3\)"),
        ({"conv1": 1.0}, r"one per structure; got shape \(\)"),
        ({"conv1": "high"}, "must be numbers, got 'high'"),
        ({"conv1": None}, "must be numbers, got None"),
        ({"conv1": torch.full((8,), 1j)}, "real numbers"),
    ],
)
def test_scores_that_do_not_fit(pruner, scores, message):
    with pytest.raises(ConfigError, match=message):
        choose(pruner._scene(), scores, pruner._goal(1.0))


def test_scores_without_a_rank_and_in_plain_lists(pruner):
    scene, goal = pruner._scene(), pruner._goal(1.0)
    scores = {name: [float(i) for i in range(len(group))] for name, group in pruner.structures.groups.items()}
    assert choose(scene, scores, goal) == choose(scene, {n: torch.tensor(s) for n, s in scores.items()}, goal)
    scores["conv1"][0] = float("nan")
    with pytest.raises(ConfigError, match="'conv1' contain NaN"):
        choose(scene, scores, goal)
