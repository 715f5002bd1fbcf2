"""The recipes of docs/trainers.md run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(name, folder, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def halved(output, keep=0.5):
    macs = re.search(r"MACs +([\d,]+) -> ([\d,]+)", output)
    assert macs, output
    before, after = (int(figure.replace(",", "")) for figure in macs.groups())
    return after <= keep * before


def test_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    output = run("with_accelerate", tmp_path)
    assert re.search(r"stopped with [1-9]\d* structures decaying", output)
    assert halved(output) and float(re.findall(r"([\d.]+) %$", output)[-1]) > 80


def test_timm(tmp_path):
    pytest.importorskip("timm")
    output = run("with_timm", tmp_path)
    assert halved(output) and "difference 0.0\n" in output


def test_ultralytics(tmp_path):
    pytest.importorskip("ultralytics")
    output = run("with_ultralytics", tmp_path)
    assert halved(output, 0.7) and "difference 0.0\n" in output


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert halved(run("with_tensorboard", tmp_path, tmp_path / "logs"))
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"pruning/macs", "pruning/released", "picked/0"} <= names
    assert events.Scalars("pruning/macs")[-1].value < events.Scalars("pruning/macs")[0].value


STAND_IN = """
import json
class Run:
    summary = {}
    def log(self, row): rows.append(row)
    def finish(self): json.dump({"rows": rows, "summary": self.summary}, open("logged.json", "w"))
rows = []
def init(project, config): return Run()
"""


def test_wandb(tmp_path):
    """By its interface alone: a stand-in, no account."""
    import json

    (tmp_path / "wandb.py").write_text(STAND_IN)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert halved(run("with_wandb", tmp_path, PYTHONPATH=path))
    logged = json.loads((tmp_path / "logged.json").read_text())
    assert {"loss", "pruning/macs", "pruning/decaying"} <= logged["rows"][0].keys()
    assert any("picked/0" in row for row in logged["rows"]) and logged["summary"]["macs"]


def test_accelerate_at_once(tmp_path):
    """The hooks of docs/trainers.md: the pruner's state before the weights."""
    accelerate = pytest.importorskip("accelerate")
    import torch
    from torch import nn

    from decay_pruning import Pruner, SmoothPruning, Target

    x, y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3

    def start():
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True)
        plain = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
        model, optimizer = accelerator.prepare(plain, torch.optim.Adam(plain.parameters(), 1e-3))
        smooth = SmoothPruning(steps=3)
        pruner = Pruner(plain, x[:1], optimizer, Target(macs=0.3), smooth=smooth, removal="at once")
        accelerator.register_save_state_pre_hook(
            lambda models, weights, folder: torch.save(pruner.state_dict(), f"{folder}/pruner.pt")
        )
        accelerator.register_load_state_pre_hook(
            lambda models, folder: pruner.load_state_dict(
                torch.load(f"{folder}/pruner.pt", weights_only=True)
            )
        )
        return accelerator, model, optimizer, pruner

    def train(steps):
        for _ in range(steps):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()

    accelerator, model, optimizer, pruner = start()
    train(5)
    assert pruner.report().removed
    accelerator.save_state(str(tmp_path))
    train(3)
    want = [p.detach().clone() for p in model.parameters()]
    accelerator, model, optimizer, pruner = start()
    accelerator.load_state(str(tmp_path))
    train(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want, strict=True))
