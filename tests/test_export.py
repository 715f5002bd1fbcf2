"""What is exported computes what the model does, in any batch, or no file appears."""

import sys

import pytest
import torch
from torch import nn

from decay_pruning import (
    ConfigError,
    ExportError,
    Pruner,
    SmoothPruning,
    Target,
    cli,
    export,
    exporting,
    save,
)

X = torch.randn(2, 3, 8, 8)


def net(width=16):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(width, 4),
    )  # fmt: skip


def pruned():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(model, X, optimizer, Target(macs=0.5), smooth=SmoothPruning.one_step(), total_steps=3)
    model(X).square().mean().backward()
    optimizer.step()
    pruner.finish()
    return model


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(exporting, "_ROUNDS", 1)


@pytest.mark.filterwarnings("ignore")  # of the exporters themselves
@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_the_command_writes_what_the_model_computes(to, tmp_path, monkeypatch, capsys):
    for name in ("onnx", "onnxruntime", "onnxscript") if to == "onnx" else ():
        pytest.importorskip(name)
    model = pruned()
    save(model, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "mine_to_export", sys.modules[__name__])
    arguments = ["--model", f"{__name__}:net", "--to", to, "--size", "8"]
    cli.main(["export", str(tmp_path / "model.safetensors"), *arguments])
    said = capsys.readouterr().out
    assert "any batch" in said and "batch 32: torch" in said
    (path,) = [p for p in tmp_path.iterdir() if p.suffix in (".onnx", ".pt2")]
    x = torch.randn(5, 3, 8, 8)
    found = exporting._RUNS[to](path)(x)[0]
    torch.testing.assert_close(found, model.eval()(x), rtol=1e-3, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 2  # nothing else is left


class OneBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 3)

    def forward(self, x):
        return self.line(x.reshape(2, -1, 4))


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_one_batch_says_so_and_named_inputs_work(tmp_path):
    model = OneBatch()
    model.train()
    found = export(model, {"x": torch.randn(2, 8)}, tmp_path / "a.pt2", "torch")
    assert not found.any_batch and found.difference < 1e-5 and "example inputs only" in str(found)
    assert model.training and list(found.seconds) == [2]


@pytest.mark.filterwarnings("ignore")
def test_what_computes_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(exporting._RUNS, "torch", lambda path: lambda inputs: [net(8)(inputs) + 1])
    with pytest.raises(ExportError, match="computes something else"):
        export(net().eval(), X, tmp_path / "a.pt2", "torch")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(exporting._NEEDS, "onnx", ("no_such_package",))
    with pytest.raises(ExportError, match=r"needs no_such_package: pip install 'decay-pruning\[export\]'"):
        export(net(), X, tmp_path / "a.onnx")


def test_nonsense(tmp_path):
    with pytest.raises(ConfigError, match="to must be one of onnx, torch, got 'tflite'"):
        export(net(), X, tmp_path / "a", "tflite")
    with pytest.raises(ExportError, match="there is no folder"):
        export(net(), X, tmp_path / "none" / "a.pt2", "torch")
    with pytest.raises(ExportError, match="cannot be exported"):
        export(net(), torch.randn(2, 5, 8, 8), tmp_path / "a.pt2", "torch")
