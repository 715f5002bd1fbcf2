"""A host and an arm of one's own come into a recipe as "module:function", and are compared with the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from decay_pruning.errors import ConfigError
from decay_pruning.lab import compare, recipe, report, results

from .test_compare import _one_thread as _one_thread

MODULE = """
from decay_pruning import Custom, Pruner, SmoothPruning, choose

def last_first(rounds=1):
    def pick(scene, goal):
        groups = scene.structures.groups
        return choose(scene, {name: -group.ids.float() for name, group in groups.items()}, goal)
    return Custom(pick, rounds=rounds)

def bare():
    return last_first().function

def none(rounds): return 3

def hurried(model, example_inputs, optimizer, target, host, total_steps, on_event, steps=2):
    return Pruner(
        model, example_inputs, optimizer, target, host=host, total_steps=total_steps, on_event=on_event,
        smooth=SmoothPruning(steps=steps), rectify=None,
    )

class Sparing:
    done = True
    def __init__(self, model): self.model = model
    def progress(self): return self
    macs = params = decaying = held = released = removed = 0
    def norms(self): return {}
    def phase(self): return None
    def finish(self): return None

def sparing(model): return Sparing(model)
"""
RECIPE = """
device = "cpu"
data = { name = "digits", train_limit = 64, test_limit = 32 }
[dense]
epochs = 1
batch_size = 32
[prune]
epochs = 3
batch_size = 32
lr = 0.01
smooth = { steps = 3 }
target = { macs = 0.6 }
[prune.host]
kind = "own"
name = "my_methods:last_first"
options = { rounds = 2 }
[arms.hurried]
name = "my_methods:hurried"
options = { steps = 1 }
[arms.sparing]
name = "my_methods:sparing"
[report]
latency_batch = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "my_methods.py").write_text(MODULE)
    (tmp_path / "mine.toml").write_text(RECIPE)
    return tmp_path / "mine.toml"


def test_they_are_paired_with_the_others(file: Path, tmp_path: Path) -> None:
    mine = recipe.load(file)
    assert recipe.Recipe.from_dict(mine.to_dict()) == mine
    found = compare.compare(mine, ["sparing", "hurried", "dense", "sp"], [0], tmp_path / "out", jobs=2)
    assert found.arms == ["dense", "sp", "hurried", "sparing"]
    assert len({run.accuracy_start for run in found.runs}) == 1
    by_arm = {run.arm: run for run in found.runs}
    assert by_arm["dense"].rows[-1]["accuracy"] == by_arm["sparing"].rows[-1]["accuracy"]
    for arm in ("sp", "hurried"):
        before, after = by_arm[arm].macs
        assert after <= 0.6 * before and by_arm[arm].report is not None
    assert by_arm["sp"].accuracy_removed != by_arm["hurried"].accuracy_removed or (
        by_arm["sp"].rows != by_arm["hurried"].rows
    )
    widths = by_arm["sp"].report["widths"]  # type: ignore[index]
    assert any(after < before for before, after in widths.values())
    assert results.load(tmp_path / "out" / results.FILE).arms == found.arms
    page = report.render(found)
    assert "hurried" in page and "sparing" in page


def test_a_row_for_each_run() -> None:
    run = results.Run(
        "sp", 3, 90.0, 95.0, None, (10, 5), (8, 4), (0.2, 0.1), 7, 1.5, report={"picked": 4, "a": []}
    )
    figures = run.figures()
    assert figures["macs_before"] == 10 and figures["macs_after"] == 5 and figures["picked"] == 4
    assert figures["accuracy_removed"] is None and figures["arm"] == "sp" and "a" not in figures
    pandas = pytest.importorskip("pandas", reason="a DataFrame needs pandas")
    frame = results.Result({}, {}, runs=(run, run)).frame()
    assert isinstance(frame, pandas.DataFrame) and list(frame["seed"]) == [3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prune.host.name=my_methods:bare", None),
        ("prune.host.name=my_methods:none", "host must be a host"),
        ("prune.host.name=my_methods:lost_first", "did you mean 'last_first'"),
        ("prune.host.options.round=3", "has no option 'round'; did you mean 'rounds'|no option 'round'"),
        ("arms.sp.name=my_methods:hurried", "arms.sp: an arm of your own has a name"),
        ("arms.hurried.name=my_methods:gone", "has no function 'gone'"),
    ],
)
def test_what_is_none_is_said_at_once(file: Path, change: str, message: str | None) -> None:
    if message is None:
        assert recipe.load(file, [change, "prune.host.options={}"]).prune.host.rounds == 1
        return
    with pytest.raises(ConfigError, match=message):
        recipe.load(file, [change])


def test_an_arm_that_is_none(file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no arm is called 'hurry'.*hurried, sparing.*did you mean 'hurried'"
    ):
        compare.compare(recipe.load(file), ["hurry"], [0], tmp_path / "out")
