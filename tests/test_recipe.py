"""Recipes: TOML to dataclasses and back, and errors that name the key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

import pytest

from decay_pruning import DepGraph, SelfRectifying, SmoothPruning, SparseLearning, Target, schedules
from decay_pruning.errors import ConfigError
from decay_pruning.hosts import HOSTS
from decay_pruning.lab import recipe, settings
from decay_pruning.lab.recipe import Prune, Recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    steps: int | float = 0.5
    shape: tuple[int, float] = (1, 0.5)

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise ConfigError("steps must not be 13")


@dataclass(frozen=True)
class Outer:
    needed: str
    flag: bool = False
    ratio: float = 0.5
    names: tuple[str, ...] = ()
    mode: Literal["fast", "slow"] = "fast"
    colour: Colour = Colour.RED
    heads: Mapping[str, int] = field(default_factory=dict)
    rule: str | Callable[[int], int] = "plain"
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


def test_values_become_what_the_hints_ask_for() -> None:
    built = settings.build(
        Outer,
        {
            "needed": "x",
            "ratio": 1,
            "names": ["a", "b"],
            "mode": "slow",
            "colour": "blue",
            "heads": {"attention": 4},
            "inner": {"steps": 3, "shape": [2, 1]},
            "maybe": True,
        },
    )
    assert built == Outer(
        "x",
        False,
        1.0,
        ("a", "b"),
        "slow",
        Colour.BLUE,
        {"attention": 4},
        "plain",
        Inner(3, (2, 1.0)),
        Inner(),
    )
    assert type(built.ratio) is float and type(built.inner.steps) is int
    assert settings.build(Outer, settings.plain(built)) == built


@pytest.mark.parametrize("nothing", [False, None, "none"])
def test_an_optional_section_can_be_switched_off(nothing: object) -> None:
    assert settings.build(Outer, {"needed": "x", "maybe": nothing}).maybe is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "setting needed is missing"),
        ({"needed": 5}, "needed must be text, got 5"),
        ({"needed": "x", "falg": True}, r"unknown setting falg; did you mean flag\?"),
        ({"needed": "x", "steps": 3}, r"unknown setting steps; did you mean inner\.steps\?"),
        ({"needed": "x", "qqqqq": 3}, "unknown setting qqqqq; known here: needed, flag"),
        (
            {"needed": "x", "inner": {"stesp": 3}},
            r"unknown setting inner\.stesp; did you mean inner\.steps\?",
        ),
        ({"needed": "x", "inner": 3}, "inner must be a section, got 3"),
        (
            {"needed": "x", "inner": {"steps": "many"}},
            r"inner\.steps must be a whole number or a number, got 'many'",
        ),
        ({"needed": "x", "inner": {"steps": True}}, r"inner\.steps must be .* got true"),
        ({"needed": "x", "inner": {"steps": 13}}, r"\[inner\] steps must not be 13"),
        ({"needed": "x", "maybe": {"steps": 13}}, r"\[maybe\] steps must not be 13"),
        ({"needed": "x", "inner": {"shape": [1]}}, r"inner\.shape must have 2 entries, got 1"),
        ({"needed": "x", "names": "ab"}, "names must be a list, got 'ab'"),
        ({"needed": "x", "names": ["a", 1]}, r"names\[1\] must be text, got 1"),
        (
            {"needed": "x", "mode": "fats"},
            r"mode: must be one of fast, slow, got 'fats'; did you mean 'fast'\?",
        ),
        (
            {"needed": "x", "colour": "blu"},
            r"colour: must be one of red, blue, got 'blu'; did you mean 'blue'\?",
        ),
        ({"needed": "x", "flag": 1}, "flag must be true or false, got 1"),
        ({"needed": "x", "ratio": True}, "ratio must be a number, got true"),
        ({"needed": "x", "heads": {"a": "b"}}, r"heads\.a must be a whole number, got 'b'"),
    ],
)
def test_errors_name_the_dotted_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        settings.build(Outer, values)


def test_assignments_read_toml_and_fall_back_to_text() -> None:
    values = {"prune": {"lr": 0.1, "rectify": False}}
    changed = settings.override(
        values,
        [
            "prune.lr=0.2",
            "prune.smooth.steps=50",
            "prune.milestones=[1, 2]",
            "data.root=/some where/x=y",
            'name="7"',
            "prune.rectify.t_len=1",
        ],
    )
    assert changed == {
        "prune": {"lr": 0.2, "rectify": {"t_len": 1}, "smooth": {"steps": 50}, "milestones": [1, 2]},
        "data": {"root": "/some where/x=y"},
        "name": "7",
    }
    assert values == {"prune": {"lr": 0.1, "rectify": False}}, "the original is left alone"


@pytest.mark.parametrize("wrong", ["prune.lr", "=3", "prune..lr=3", "prune.lr.x=3"])
def test_wrong_assignments(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"--set takes key=value|not a section"):
        settings.override({"prune": {"lr": 0.1}}, [wrong])


# -- the recipe itself --------------------------------------------------------------------------


def test_a_recipe_survives_the_way_to_json_and_back() -> None:
    original = Recipe(
        prune=Prune(
            target=Target(params=0.2),
            host=DepGraph(rounds=3, sparse=SparseLearning(strength=1e-3), heads={"a": 2}),
            smooth=SmoothPruning(steps=7, schedule=schedules.cosine),
            rectify=None,
        )
    )
    values = original.to_dict()
    assert values["prune"]["host"]["kind"] == "depgraph"
    assert values["prune"]["smooth"]["schedule"] == "cosine"
    again = Recipe.from_dict(values)
    assert again.to_dict() == values
    assert again.prune.host == original.prune.host and again.prune.rectify is None


@pytest.mark.parametrize("kind", HOSTS)
def test_every_host_of_the_registry_can_be_named(kind: str) -> None:
    built = Recipe.from_dict({"prune": {"host": {"kind": kind}}})
    assert type(built.prune.host) is HOSTS[kind]


def test_settings_of_host_smooth_and_rectify_are_their_dataclasses() -> None:
    built = Recipe.from_dict(
        {
            "prune": {
                "host": {"kind": "depgraph", "importance": "taylor", "sparse": True},
                "smooth": {"steps": 50, "bound": "joint"},
                "rectify": {"t_rate": 0.3},
            }
        }
    ).prune
    assert built.host == DepGraph(importance="taylor", sparse=SparseLearning())
    assert built.smooth == SmoothPruning(steps=50, bound="joint")
    assert built.rectify == SelfRectifying(t_rate=0.3)


def test_none_is_no_value_unless_it_is_one_of_the_choices() -> None:
    def prune(*assignments: str) -> Prune:
        return Recipe.from_dict(settings.override({}, assignments)).prune

    assert prune("prune.rectify=none").rectify is None
    assert prune("prune.rectify.average=none").rectify.average is None
    host = prune("prune.host.importance=magnitude", "prune.host.normalizer=none").host
    assert host.normalizer == "none"
    again = Recipe.from_dict(
        Recipe.from_dict({"prune": {"host": {"kind": "depgraph", "normalizer": "none"}}}).to_dict()
    )
    assert again.prune.host.normalizer == "none"  # type: ignore[union-attr]
    assert Recipe.from_dict(Recipe.from_dict({}).to_dict()).prune.host.normalizer is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("prune.smoth.steps=3", r"unknown setting prune\.smoth; did you mean prune\.smooth\?"),
        ("prune.steps=3", r"did you mean prune\.smooth\.steps\?"),
        ("prune.host.kind=depgrap", r"prune\.host\.kind: must be one of .*did you mean 'depgraph'\?"),
        ("prune.host.importence=taylor", r"did you mean prune\.host\.importance\?"),
        ("prune.rectify.t_rate=7", r"\[prune\.rectify\] .*t_rate"),
        ("prune.start=99", r"\[prune\] start = 99\.0 must lie within"),
        ("dense.epochs=-1", r"\[dense\] epochs must be at least 0"),
        ("data.validation=1", r"\[data\] validation must be at least 0 and below 1"),
        ("device=gpu", "device: must be one of auto, cpu"),
    ],
)
def test_wrong_settings_of_a_recipe(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(settings.override({}, [assignment]))


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    (tmp_path / "digits.toml").write_text("[prune\n")
    with pytest.raises(ConfigError, match=r"there is no recipe .*digit\.toml; did you mean .*digits\.toml\?"):
        recipe.load(tmp_path / "digit.toml")
    with pytest.raises(ConfigError, match=r"digits\.toml is not valid TOML: .*line 1"):
        recipe.load(tmp_path / "digits.toml")


def test_there_are_recipes() -> None:
    expected = {
        "digits",
        "cifar10-resnet20-quick",
        "cifar10-resnet56-depgraph",
        "cifar10-resnet56-depgraph-sparse",
        "cifar10-resnet56-gate-decorator",
        "cifar10-vgg16-gate-decorator",
        "digits-gate-decorator",
    }
    assert {path.stem for path in RECIPES} >= expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    loaded = recipe.load(path)
    assert loaded.name == path.stem and loaded.title
    assert loaded.data.root is None, "the path of the data is the user's to give"


def test_the_start_is_shared_by_what_does_not_change_it() -> None:
    base = Recipe(name="a")
    data = base.data.load()
    key = base.key_of_start(data, 0)
    for assignment, same in [
        ("prune.lr=0.5", True),
        ("prune.smooth.steps=9", True),
        ("data.root=/elsewhere", True),
        ("name=b", True),
        ("dense.lr=0.5", False),
        ("sparse=true", False),
        ("model.name=resnet20", False),
    ]:
        other = Recipe.from_dict(settings.override(base.to_dict(), [assignment]))
        assert (other.key_of_start(data, 0) == key) is same, assignment
    assert base.key_of_start(data, 1) != key
