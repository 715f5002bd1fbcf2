"""The models of the lab, by name: `build("resnet56", classes=10)`.

ResNets carry the names of torchvision (`conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`), so
that weights trained elsewhere fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from decay_pruning.errors import ConfigError, ManifestError
from decay_pruning.lab import own


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions beside a shortcut; the output is four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The identity, or a strided 1×1 convolution with batch-norm where the shape changes (option B)."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Residual network (He et al. 2016).

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks per stage; every stage after the first halves the resolution.
        widths: base width of each stage.
        stem: "cifar" (one 3×3 convolution) or "imagenet" (7×7 with stride 2, then max-pooling).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        classes: int,
        channels: int = 3,
        stem: str = "cifar",
        stem_width: int | None = None,
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ConfigError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
        large = stem == "imagenet"
        inputs = stem_width or widths[0]
        self.conv1 = nn.Conv2d(channels, inputs, *((7, 2, 3) if large else (3, 1, 1)), bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        for i, (name, depth, width) in enumerate(zip(self.stages, depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(block(inputs, width, 2 if i and not j else 1))
                inputs = block.expansion * width
            self.add_module(name, nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class VGG(nn.Module):
    """VGG with batch-norm for small images: 13 convolutions, two 512-wide linear layers, a classifier."""

    plan = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: max-pooling

    def __init__(self, *, classes: int, channels: int = 3, size: int = 32) -> None:
        super().__init__()
        if size % 32:
            raise ConfigError(f"vgg16-bn halves its input five times: size must divide by 32, got {size}")
        layers: list[nn.Module] = []
        for width in self.plan:
            if width:
                layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        inputs = channels * (size // 32) ** 2
        self.classifier = nn.Sequential(
            nn.Linear(inputs, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Self-attention whose heads can go one by one: their number is nowhere but in the shape of the weights.

    Called, and answering, as `nn.MultiheadAttention`, whose heads cannot.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: self-attention and a two-layer MLP, each beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int, own_heads: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = (
            SelfAttention(width, heads)
            if own_heads
            else nn.MultiheadAttention(width, heads, batch_first=True)
        )
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Vision transformer with learned positions and mean pooling; the defaults are those of ViT-B/16.

    With `own_heads` attention is `SelfAttention` in place of `nn.MultiheadAttention`, so that heads can be pruned.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 3,
        size: int = 224,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int | None = None,
        own_heads: bool = False,
    ) -> None:
        super().__init__()
        if size % patch or width % heads:
            raise ConfigError(
                f"vit-b: size {size} must be a multiple of patch {patch}, and width {width} of heads {heads}"
            )
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(
            *(EncoderBlock(width, heads, hidden or 4 * width, own_heads) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        make: called with classes, channels and, where it takes it, size.
        classes, channels, size: what it is usually built for (C, H and W of an example input come from here).
        about: one line for lists.
    """

    make: Callable[..., nn.Module]
    classes: int = 10
    channels: int = 3
    size: int = 32
    about: str = ""


def _cifar_resnet(depth: int) -> Entry:
    blocks = (depth - 2) // 6

    def make(*, classes: int, channels: int) -> nn.Module:
        return ResNet(BasicBlock, (blocks,) * 3, (16, 32, 64), classes=classes, channels=channels)

    return Entry(make, about=f"{depth} layers of 16, 32 and 64 channels for 32×32 images")


def _resnet_digits(*, classes: int, channels: int) -> nn.Module:
    return ResNet(BasicBlock, (2, 2), (12, 24), classes=classes, channels=channels)


def _resnet50(*, classes: int, channels: int, stem: str = "imagenet") -> nn.Module:
    widths = (64, 128, 256, 512)
    return ResNet(Bottleneck, (3, 4, 6, 3), widths, classes=classes, channels=channels, stem=stem)


#: Every model by name.
ZOO: Mapping[str, Entry] = {
    "resnet-digits": Entry(_resnet_digits, channels=1, size=8, about="a small ResNet for 8×8 images"),
    **{f"resnet{depth}": _cifar_resnet(depth) for depth in (20, 32, 56, 110)},
    "vgg16-bn": Entry(VGG, about="13 convolutions and 3 linear layers for 32×32 images"),
    "resnet50": Entry(_resnet50, classes=1000, size=224, about="bottlenecks; stem='imagenet' or 'cifar'"),
    "vit-digits": Entry(
        partial(ViT, patch=2, width=64, depth=4, heads=8, own_heads=True),
        channels=1,
        size=8,
        about="a small transformer for 8×8 images, 16 patches and 8 heads; options as vit-b",
    ),
    "vit-b": Entry(ViT, classes=1000, size=224, about="transformer; patch, width, depth, heads, hidden"),
}


def names() -> tuple[str, ...]:
    """Names of the zoo's models."""
    return tuple(ZOO)


def build(
    name: str,
    *,
    classes: int | None = None,
    channels: int | None = None,
    size: int | None = None,
    seed: int | None = None,
    beside: str | os.PathLike[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Make a model.

    Args:
        name: one of `names()`, or "module:function" for your own: a function that returns an `nn.Module`. It
            is called with `options`, and with classes, channels and size if it has parameters of these names.
        classes, channels, size: outputs, input channels, and height and width of the images. Left out, the
            zoo's models take their usual values.
        seed: of the initial weights; the global random state is left alone. None draws from the global state.
        beside: a folder that the module of your own function is looked for in first.
        options: further arguments of the model ("stem" of resnet50, "depth" of vit-b …).

    Raises:
        ConfigError: an unknown name or option, or a function that cannot be imported or called.
    """
    make: Callable[..., nn.Module]
    sizes: dict[str, int | None] = {"classes": classes, "channels": channels, "size": size}
    if ":" in name:
        make = own.find(name, "model", beside)
    else:
        entry = _entry(name)
        make = entry.make
        sizes = {key: getattr(entry, key) if value is None else value for key, value in sizes.items()}
    for key, value in sizes.items():
        if value is not None and value < 1:
            raise ConfigError(f"model {name!r}: {key} must be at least 1, got {value}")
    given = {key: value for key, value in sizes.items() if value is not None}
    with torch.random.fork_rng(devices=(), enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        model = own.call(make, f"model {name!r}", given, options)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned {type(model).__name__}, not an nn.Module")
    return model


def example_shape(name: str) -> tuple[int, int, int]:
    """(C, H, W) of the images that the zoo's model `name` is usually built for."""
    entry = _entry(name)
    return entry.channels, entry.size, entry.size


def _entry(name: str) -> Entry:
    if name not in ZOO:
        near = get_close_matches(name, ZOO, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown model {name!r}: choose one of {', '.join(ZOO)}, or module:function for your own{hint}"
        )
    return ZOO[name]


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights of an unpruned model from a local file; nothing in the file is executed.

    Takes safetensors, or a PyTorch file that holds a state dict, also one under "state_dict" or "model" and
    with the prefix "module." of DistributedDataParallel. Every name and shape must fit.

    Raises:
        ManifestError: no such file, another format, or weights of another model; `model` is as it was.
    """
    file = Path(path).expanduser()
    weights = _read_weights(file)
    expected = model.state_dict()
    # Files older than PyTorch 0.4.1 do not count batches.
    for key in expected.keys() - weights.keys():
        if key.endswith("num_batches_tracked"):
            weights[key] = expected[key]
    missing, strange = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    wrong = {key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape}
    if missing or strange or wrong:
        found = {
            "missing": sorted(missing),
            "not in the model": sorted(strange),
            "of another shape": [
                f"{key} {tuple(weights[key].shape)} for {tuple(expected[key].shape)}" for key in sorted(wrong)
            ],
        }
        listed = "; ".join(
            f"{len(keys)} {what}: {', '.join(keys[:3])}{' …' * (len(keys) > 3)}"
            for what, keys in found.items()
            if keys
        )
        raise ManifestError(f"{file} does not fit {type(model).__name__}: {listed}")
    model.load_state_dict(weights)


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ManifestError(f"there is no file {file}")
    try:
        content = load_file(file)
    except SafetensorError:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a foreign file can make the unpickler raise almost anything
            raise ManifestError(
                f"{file} is neither safetensors nor a PyTorch file of plain tensors, or damaged: {error}"
            ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ManifestError(f"{file} does not hold a state dict (parameter names with tensors)")
    return {str(key).removeprefix("module."): value for key, value in content.items()}
