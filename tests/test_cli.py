"""The command line: arguments in, calls and files out, errors in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import decay_pruning
from decay_pruning import cli
from decay_pruning.errors import ConfigError
from decay_pruning.hosts import HOSTS
from decay_pruning.lab import models, results

RECIPE = """
title = "Tiny"
device = "cpu"
[data]
train_limit = 128
test_limit = 60
[dense]
epochs = 1
batch_size = 64
[prune]
epochs = 3
batch_size = 64
lr = 0.05
smooth = { steps = 3 }
target = { macs = 0.6 }
[report]
latency_batch = 2
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    yield
    torch.set_num_threads(before)


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("host", list(HOSTS))
def test_inspect(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["inspect", "resnet-digits", "--host", host])
    shown = capsys.readouterr().out
    assert "feeds the model's output" in shown
    model = models.build("resnet-digits")
    plan = decay_pruning.inspect(model, torch.zeros(1, *models.example_shape("resnet-digits")), HOSTS[host]())
    assert all(name in shown for name in plan.widths)
    assert f"{plan.now.structures} structures in {len(plan.widths)} layer groups" in shown
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in shown


def test_inspect_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["inspect", "resnet-digits"])
    real = capsys.readouterr().out
    cli.main(["inspect", "resnet-digits", "--meta"])
    meta = capsys.readouterr().out
    assert meta.replace(" on a shrunken twin: the model is on the meta device", "") == real


def test_inspect_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mynet_cli.py").write_text(
        "from torch import nn\n"
        "def make(classes=3):\n"
        "    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, classes))\n"
    )
    cli.main(["inspect", "mynet_cli:make", "--channels", "2", "--size", "8"])
    assert "5 structures in 1 layer groups" in capsys.readouterr().out


def test_run_then_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["run", "tiny.toml", "--set", "prune.rectify=false", "--seed", "4"])
    shown = capsys.readouterr().out
    out = tmp_path / "runs" / "tiny"
    assert (out / "models" / "sp-4.safetensors").is_file() and (out / "report.html").is_file()
    assert "removed" in shown and "sp-4.safetensors" in shown
    result = results.load(out / "result.json")
    assert [(r.arm, r.seed) for r in result.runs] == [("sp", 4)]

    (out / "report.html").unlink()
    cli.main(["report", "runs/tiny/result.json", "--figure", "figure.svg"])
    assert "Tiny" in (out / "report.html").read_text()
    assert (tmp_path / "figure.svg").read_text().startswith("<svg")


def test_compare_resumes_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ["compare", "tiny.toml", "--arms", "sp", "--seeds", "1", "--out", "here"]
    cli.main([*first, "--set", "prune.smooth.steps=2", "dense.lr=0.05", "--set", "prune.lr=0.04"])
    result = results.load(tmp_path / "here" / "result.json")
    assert result.recipe["prune"]["smooth"]["steps"] == 2
    assert (result.recipe["dense"]["lr"], result.recipe["prune"]["lr"]) == (0.05, 0.04)
    capsys.readouterr()
    arguments = ["compare", "tiny.toml", "--arms", "single,sp", "--seeds", "0,2", "--out", "here"]
    cli.main([*arguments, "--set", "prune.smooth.steps=2", "dense.lr=0.05", "prune.lr=0.04"])
    shown = capsys.readouterr().out
    assert "sp     seed 0" not in shown and "single seed 0" in shown and "sp     seed 2" in shown
    assert "vs single" in shown and "±" in shown
    assert len(results.load(tmp_path / "here" / "result.json").runs) == 4
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "resnet57"], "did you mean 'resnet56'?"),
        (["run", "tini.toml"], "there is no recipe tini.toml; did you mean tiny.toml?"),
        (["run", "tiny.toml", "--set", "prune.smoth.steps=3"], "prune.smoth; did you mean prune.smooth?"),
        (["run", "tiny.toml", "--set", "data.name=cifar10"], "give its path as root"),
        (
            ["run", "tiny.toml", "--set", "data.name=cifar10", "data.root=nowhere"],
            "there is no folder nowhere",
        ),
        (["compare", "tiny.toml", "--arms", "sp,signle"], "did you mean 'single'?"),
        (
            ["compare", "tiny.toml", "--seeds", "many"],
            "--seeds takes how many (5) or which (0,3,4), not 'many'",
        ),
        (["report", "result.json"], "there is no result file result.json"),
        (["report", "tiny.toml"], "not a readable result file"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failing(arguments, capsys)
    assert message in error and error.startswith("decay-pruning: ")
    assert error.count("\n") == 1 and "Traceback" not in error


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "bogus" in failing(["bogus"], capsys)
    assert "--arsm" in failing(["compare", "tiny.toml", "--arsm", "sp"], capsys)


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    result = ["run", "tiny.toml", "--out", "file/below"]
    assert "file" in failing(result, capsys)


@pytest.mark.parametrize(
    ("words", "seeds"), [("3", [0, 1, 2]), ("7,", [7]), ("2, 5", [2, 5]), ("0,0", [0, 0])]
)
def test_seeds(words: str, seeds: list[int]) -> None:
    assert cli._seeds(words) == seeds


@pytest.mark.parametrize("words", ["", "0", "-1", "1,-2", "x", "1.5"])
def test_wrong_seeds(words: str) -> None:
    with pytest.raises(ConfigError, match="--seeds takes"):
        cli._seeds(words)


def test_without_the_lab_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "decay_pruning.lab.recipe", None)
    monkeypatch.delattr("decay_pruning.lab.recipe", raising=False)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "recipes/digits.toml"])
    assert stop.value.code == 2
    assert "decay-pruning[lab]" in capsys.readouterr().err
