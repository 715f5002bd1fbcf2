"""A data set, a model, a loss and a metric of one's own come into a recipe as "module:function"."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from decay_pruning import cli
from decay_pruning.errors import ConfigError
from decay_pruning.lab import compare, data, own, recipe, results
from decay_pruning.lab.task import VALIDATION_SEED, Metric, TensorData
from decay_pruning.lab.trainer import Training, TrainSettings, evaluate

from .test_compare import _one_thread as _one_thread

MODULE = """
import torch
from torch import nn
from decay_pruning.lab.task import Metric, TensorData

def samples(count, key):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(key))
    return x, x[:, :2].sum(1, keepdim=True).sin()

def waves(count=64, tests=50, width=1):
    import helper_beside  # when it runs, not when it is imported
    return TensorData(
        "waves",
        train=lambda seed, epoch: samples(count, 1000 * seed + epoch),
        test=samples(tests, 10**6),
        loss=helper_beside.squared,
        metric=Metric("distance", unit="mV", higher_is_better=False, score=score),
    )

def score(outputs, targets):
    import helper_beside
    return helper_beside.squared(outputs, targets, "none").sum(1)

def net(width=16):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

def two(): return samples(5, 0), samples(5, 0)
def absent(): import no_such_package
def refuses(count): return waves(count)
number = 3
"""
HELPER = """
from torch.nn.functional import mse_loss

def squared(a, b, reduction="mean"):
    return mse_loss(a, b, reduction=reduction)
"""
RECIPE = """
device = "cpu"
data = { name = "wave_task:waves", options = { count = 64 } }
model = { name = "wave_task:net", options = { width = 12 } }
dense = { epochs = 0 }
[prune]
epochs = 3
batch_size = 16
lr = 0.01
optimizer = "adam"
smooth = { steps = 3 }
target = { params = 0.6 }
[report]
latency_batch = 2
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe in a folder that is not the current one."""
    folder = tmp_path / "studies"
    folder.mkdir()
    (folder / "wave_task.py").write_text(MODULE)
    (folder / "helper_beside.py").write_text(HELPER)
    (folder / "waves.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return folder / "waves.toml"


def test_a_comparison_of_ones_own(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(file), "--seeds", "2", "--arms", "dense,single,sr"]
    cli.main([*words, "--out", "alone"])
    shown = capsys.readouterr().out
    cli.main([*words, "--out", "beside", "--jobs", "2"])
    alone, beside = (results.load(f"{out}/result.json") for out in ("alone", "beside"))
    assert [run.rows for run in alone.runs] == [run.rows for run in beside.runs]
    assert len({run.accuracy for run in alone.runs}) == 6 and all(run.steps == 12 for run in alone.runs)
    assert alone.metric.to_dict() == {"name": "distance", "unit": "mV", "higher_is_better": False}
    page = Path("alone/report.html").read_text()
    run = alone.runs[0]
    assert f"distance {run.accuracy:.2f} mV" in shown and "Distance mV" in shown
    assert (
        "Distance at the end, mV" in page and "Lower distance is better." in page and "same samples" in page
    )
    for text in (shown, page):
        assert "top-1" not in text.lower() and "accuracy" not in text.lower()
    assert str(file.parent) not in Path("alone/result.json").read_text()
    cli.main([*words, "--out", "alone"])  # goes on
    assert results.load("alone/result.json").runs == alone.runs


def test_the_mean_of_scores_is_what_is_reported(file: Path) -> None:
    waves = recipe.load(file).data.load()
    model = recipe.load(file).model.build(waves, 0)
    x, y = waves.samples("test")
    expected = (model(x) - y).detach().square().mean()
    assert evaluate(model, waves) == pytest.approx(float(expected), rel=1e-5)
    halves = TensorData(
        "h", (x, y), (x, y), metric=Metric("half", score=lambda o, t: torch.arange(len(t)) % 2)
    )
    assert evaluate(model, halves) == 50


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.name=no_such_module:waves", "data set 'no_such_module:waves': cannot import the module"),
        ("data.name=wave_task:wave", r"wave_task has no function 'wave'; did you mean 'waves'\?"),
        ("data.name=wave_task:number", "wave_task has no function 'number'"),
        ("data.name=wave_task:", "wave_task has no function ''"),
        ("data.name=:waves", "data set ':waves': cannot import the module ''"),
        ("data.name=broken:waves", r"cannot import the module 'broken' \(SyntaxError: .*broken.py, line 1"),
        ("data.name=wave_task:two", "wave_task:two returned tuple, not TensorData"),
        ("data.name=wave_task:absent", "'wave_task:absent' needs what is not installed: No module named 'no_such_"),
        ("data.name=wave_task:refuses", "data set 'wave_task:refuses' cannot be built: .*'count'"),
        ("data.options.counts=3", r"has no option 'counts', only count, tests, width; did you mean 'count'\?"),
        ("data.size=8", "data set 'wave_task:waves' has no option 'size'"),
        ("data.options.tests=0", "the test samples of waves are 0 inputs and 0 targets"),
        ("model.name=wave_task:waves", "wave_task:waves returned TensorData, not an nn.Module"),
        ("prune.augment=[flip]", "augment"),
        ('prune.augment=["flip"]', "augment is for images: waves"),
        ("prune.label_smoothing=0.1", "label_smoothing is for cross-entropy, and waves has a loss of its own"),
        ("prune.epochs=0", "prune"),
        ("dense.epochs=-1", "epochs must be at least 0"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(
    file: Path, change: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / "broken.py").write_text("def waves(:\n")
    if change.startswith("data.name"):
        text = RECIPE.replace(", options = { count = 64 }", "")
        file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(file), "--seeds", "1", "--arms", "single", "--set", change])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert re.search(told, error), error


def test_modules_of_one_name_in_two_folders(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(file.parent, other)
    (other / "wave_task.py").write_text(MODULE.replace('"waves"', '"ripples"'))
    first, second = recipe.load(file), recipe.load(other / "waves.toml")
    assert [r.data.load().name for r in (first, second, first)] == ["waves", "ripples", "waves"]
    (other / "fractions.py").write_text("def f(): ...\n")
    with pytest.raises(
        ConfigError, match=r"'fractions' in .*other has the name of another one that is in use"
    ):
        own.find("fractions:f", "model", other)


def test_a_changed_module_makes_another_start(file: Path) -> None:
    def key() -> str:
        loaded = recipe.load(file)
        return loaded.key_of_start(loaded.data.load(), 0)

    before = key()
    assert key() == before
    module = file.with_name("wave_task.py")
    module.write_text(MODULE.replace(".sin()", ".cos()"))
    assert key() != before


def test_what_is_made_on_the_fly(file: Path) -> None:
    loaded = recipe.load(file)
    waves = loaded.data.load()

    def inputs(seed: int, epoch: int) -> torch.Tensor:
        batches = data.Batches(waves, 16, seed)
        parts = [x for x, _ in batches.epoch(epoch)]
        assert len(parts) == len(batches) == 4
        return torch.cat(parts)

    once = inputs(1, 2)
    assert torch.equal(once, inputs(1, 2))
    expected = waves.train(1, 2)[0]
    assert not torch.equal(once, expected) and torch.equal(once.sort(0).values, expected.sort(0).values)
    assert not torch.equal(expected.sort(0).values, inputs(1, 3).sort(0).values)
    assert not torch.equal(expected.sort(0).values, inputs(2, 2).sort(0).values)

    held = recipe.load(file, ["data.validation=0.25"]).data.load()
    assert held.name == "waves (validation)" and len(held.labels("test")) == 16
    assert torch.equal(held.test[0], waves.train(VALIDATION_SEED, 0)[0][:16])

    sizes = iter([8, 8, 7])
    shrinking = TensorData(
        "s", lambda seed, epoch: (torch.ones(n := next(sizes), 1), torch.ones(n)), waves.test
    )
    shrinking.samples("train", 0, 0)
    with pytest.raises(ConfigError, match="of s are 7 in epoch 1 and were 8"):
        shrinking.samples("train", 0, 1)


@pytest.mark.parametrize("targets", [torch.arange(40) % 4, torch.arange(40.0), torch.ones(40, 3)])
def test_held_out_samples_of_tensors(targets: torch.Tensor) -> None:
    x = torch.arange(40.0).unsqueeze(1)
    held = data.split(TensorData("t", (x, targets), (x[:1], targets[:1])), 0.3, seed=0)
    both = torch.cat([held.samples("train")[0], held.samples("test")[0]])
    assert len(held.labels("test")) == 12 and torch.equal(both.sort(0).values, x)
    if targets.dtype == torch.int64:
        assert held.labels("test").bincount().tolist() == [3, 3, 3, 3]


def toy(**more: Any) -> TensorData:
    x, y = torch.randn(32, 4), torch.arange(32) % 3
    return TensorData("toy", (x, y), (x, y), classes=("a", "b", "c"), **more)


def test_cross_entropy_and_top1_if_nothing_else_is_said() -> None:
    model = torch.nn.Linear(4, 3)
    history = Training(model, toy(), TrainSettings(epochs=60, batch_size=8, lr=0.1), seed=0, cpu=True).run()
    right = model(toy().test[0])  # other samples: chance
    assert history.rows[-1]["loss"] < history.rows[0]["loss"] and right.shape == (32, 3)
    assert toy().metric.to_dict() == {"name": "top-1", "unit": "%", "higher_is_better": True}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"metric": Metric("m", score=lambda o, t: o)}, r"the metric 'm' gave shape \(32, 3\) for a batch of 32"),
        ({"metric": Metric("m", score=lambda o, t: 1.0)}, "the metric 'm' gave float"),
        ({"metric": Metric("m", score=lambda o, t: t / 0)}, "the metric 'm' of the test samples is (inf|nan)"),
        ({"loss": lambda o, t: o.sum(1)}, r"the loss must be one number, and has the shape \(8,\)"),
    ],
)  # fmt: skip
def test_a_loss_or_metric_that_is_none(more: dict[str, Any], told: str) -> None:
    training = Training(
        torch.nn.Linear(4, 3), toy(**more), TrainSettings(epochs=1, batch_size=8), seed=0, cpu=True
    )
    with pytest.raises(ConfigError, match=told):
        training.run()


class Words(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.out = (
            torch.nn.Embedding(9, 4),
            torch.nn.Linear(4, 16),
            torch.nn.Linear(16, 2),
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(self.embedding(tokens).mean(1)).relu())


def test_whole_numbers_go_into_the_model_as_they_are(tmp_path: Path) -> None:
    tokens = torch.randint(0, 9, (24, 5))
    words = TensorData("words", (tokens, tokens[:, 0] % 2), (tokens, tokens[:, 0] % 2), classes=("0", "1"))
    start = Words()
    values = {"device": "cpu", "prune": {"epochs": 2, "batch_size": 8, "target": {"params": 0.9}}}
    run = compare.run_arm(recipe.Recipe.from_dict(values), "single", 0, words, start)
    assert run.params[1] <= 0.9 * run.params[0]


def test_a_start_that_comes_with_its_weights(file: Path, tmp_path: Path) -> None:
    loaded = recipe.load(file)
    waves = loaded.data.load()
    start = compare.dense_start(loaded, waves, 3, tmp_path / "starts")
    for mine, built in zip(start.parameters(), loaded.model.build(waves, 3).parameters(), strict=True):
        assert torch.equal(mine, built)
    assert not (tmp_path / "starts").exists()
    with pytest.raises(ConfigError, match="epochs must be above 0"):
        TrainSettings(epochs=0)
