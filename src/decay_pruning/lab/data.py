"""Image data sets as uint8 tensors, and batches that depend on nothing but (seed, epoch).

`load` reads a data set once, `Batches` crops, flips and normalises it where the training runs. The
order of the images and every crop and flip are a pure function of (seed, epoch), so that two arms
of a comparison, or the two halves of a resumed run, see the same data.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decay_pruning.errors import ConfigError, DataError
from decay_pruning.lab import own
from decay_pruning.lab.task import TOP1, VALIDATION_SEED, Loss, Metric, Samples, Split, TensorData

logger = logging.getLogger(__name__)

#: Where an augmentation is asked for by name.
AUGMENTATIONS = ("crop", "flip")
DATA_SETS = ("digits", "cifar10", "imagefolder")

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
_CIFAR10: tuple[str, ...] = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set that fits in memory.

    Attributes:
        name: what to call it wherever a figure from it is shown.
        train_x, test_x: shape (N, C, H, W), uint8.
        train_y, test_y: shape (N,), int64.
        mean, std: shape (C,), float32, of the training pixels scaled to [0, 1].
        classes: class names; their order is that of the labels.
        note: where the data came from and what was done to it, for reports.
        loss: cross-entropy if not given.
        metric: what is measured on the test images.
        imitation: see `lab.task.TensorData`.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    std: Tensor
    classes: tuple[str, ...]
    note: str = ""
    loss: Loss | None = None
    metric: Metric = TOP1
    imitation: Callable[[Any, Any], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    def labels(self, split: Split) -> Tensor:
        return self.train_y if split == "train" else self.test_y


@dataclass(frozen=True, eq=False)
class FolderData:
    """Images in class folders, decoded when they are needed.

    Attributes:
        train_files, test_files: paths of the images, parallel to `train_y` and `test_y` (int64).
        size: height and width, in pixels, that images are cropped to.
    Everything else is as in `ImageData`.
    """

    name: str
    train_files: tuple[str, ...]
    train_y: Tensor
    test_files: tuple[str, ...]
    test_y: Tensor
    mean: Tensor
    std: Tensor
    classes: tuple[str, ...]
    size: int
    note: str = ""
    loss: Loss | None = None
    metric: Metric = TOP1
    imitation: Callable[[Any, Any], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return 3, self.size, self.size

    def labels(self, split: Split) -> Tensor:
        return self.train_y if split == "train" else self.test_y


Data = ImageData | FolderData | TensorData


def load(
    spec: str,
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    beside: str | os.PathLike[str] | None = None,
) -> Data:
    """Read a data set.

    Args:
        spec: "digits" (scikit-learn's 1,797 handwritten digits, no download), "cifar10" (the original pickled
            batches, or Parquet files in the Hugging Face schema), "imagefolder" (train/<class>/… and
            val/<class>/… or test/<class>/…), or "module:function" for your own: a function that returns `TensorData`,
            `ImageData` or `FolderData`. It is called with `options`, and with those of the following that are given.
        root: folder of the data; digits need none.
        size: height and width to scale down to ("imagefolder": to crop to, 224 if not given).
        train_limit, test_limit: keep only so many images of each part.
        options: further arguments of a function of your own.
        beside: a folder that its module is looked for in first.

    Raises:
        ConfigError: an unknown `spec`, an impossible size or limit, or a function that cannot be imported or called.
        DataError: the data is missing, incomplete or unreadable.
    """
    if ":" not in spec and spec not in DATA_SETS:
        near = get_close_matches(spec, DATA_SETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = f"choose one of {', '.join(DATA_SETS)}, or module:function for your own"
        raise ConfigError(f"unknown data set {spec!r}: {known}{hint}")
    for key, value in (("size", size), ("train_limit", train_limit), ("test_limit", test_limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{key} must be at least 1, got {value}")
    if ":" in spec:
        given = {"root": root, "size": size, "train_limit": train_limit, "test_limit": test_limit}
        given = {key: value for key, value in given.items() if value is not None}
        return _own(spec, {**given, **(options or {})}, beside)
    if options:
        raise ConfigError(f"data set {spec!r} has no options; those are for a function of your own")
    if spec == "digits":
        data = _digits()
    else:
        if root is None:
            raise DataError(f"data set {spec!r} needs the folder that it lies in: give its path as root")
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise DataError(f"data set {spec!r}: there is no folder {folder}")
        if spec == "imagefolder":
            return _image_folder(folder, size or 224, train_limit, test_limit)
        data = _cifar10(folder)
    return _finished(data, size, train_limit, test_limit)


def _own(spec: str, options: Mapping[str, Any], beside: str | os.PathLike[str] | None) -> Data:
    """What a function of your own returns."""
    data = own.call(own.find(spec, "data set", beside), f"data set {spec!r}", {}, options)
    if not isinstance(data, Data):
        raise ConfigError(f"{spec} returned {type(data).__name__}, not TensorData, ImageData or FolderData")
    return data


def split(data: Data, fraction: float, seed: int) -> Data:
    """Hold out a part of the training images, class by class, as the new test part.

    Settings can then be chosen without looking at the real test images. Of samples that are made on the fly as many
    are made from a seed that no run has.

    Args:
        fraction: share of the training images to hold out, in (0, 1).
        seed: chooses which.
    """
    if isinstance(data, FolderData):
        raise ConfigError("data.validation works on data sets that fit in memory, not on image folders")
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction of the validation split must lie between 0 and 1, got {fraction}")
    labels = data.labels("train")
    count = round(fraction * len(labels))
    if not 0 < count < len(labels):
        raise DataError(f"{len(labels)} images cannot be split with fraction {fraction}")
    name = f"{data.name} (validation)"
    if isinstance(data, TensorData) and callable(data.train):
        x, y = data.train(VALIDATION_SEED, 0)
        note = (
            f"{data.note} Tested on {count:,} samples made like the training ones, from another seed.".strip()
        )
        return replace(data, name=name, test=(x[:count], y[:count]), note=note)
    order = torch.randperm(len(labels), generator=_generator(seed))
    held = torch.zeros(len(labels), dtype=torch.bool)
    of_classes = labels.dim() == 1 and not labels.is_floating_point()
    held[_spread(labels, count, order) if of_classes else order[:count]] = True
    if isinstance(data, TensorData):
        x, y = data.samples("train")
        note = f"{data.note} Tested on {count:,} held-out training samples (seed {seed}).".strip()
        return replace(data, name=name, train=(x[~held], y[~held]), test=(x[held], y[held]), note=note)
    return replace(
        data,
        name=name,
        train_x=data.train_x[~held],
        train_y=data.train_y[~held],
        test_x=data.train_x[held],
        test_y=data.train_y[held],
        note=f"{data.note} Tested on {count} held-out training images (seed {seed}).".strip(),
    )


class Batches:
    """The batches of a data set, normalised, on a device.

    `epoch(n)` yields ``(x, y)`` with x of shape (B, C, H, W), float32, and y of shape (B,), int64; or samples of
    your own as they are. Training batches are shuffled, augmented, and all of one size (what is left of an epoch
    is left out, other images each time). Test batches come in order, unaugmented and complete.

    Args:
        data: what to read.
        batch_size: images in a batch, over all processes.
        seed: with the epoch's number, decides order and augmentation.
        device: where the images are kept and the batches made.
        augment: of "crop" (zero padding by an eighth of the size and a random crop; a random resized crop for
            image folders) and "flip" (left to right).
        train: shuffled and augmented batches of the training part, or plain ones of the test part.
        split: part to read, if not the one that goes with `train`.
        channels_last: memory format of x.
        rank, world: this process and how many there are; each batch is dealt out to them.
        workers: processes that decode images (image folders only).

    Raises:
        ConfigError: an unknown augmentation, or a batch that does not divide by `world` or exceeds the data.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        augment: Sequence[str] = (),
        *,
        train: bool = True,
        split: Split | None = None,
        channels_last: bool = False,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        for name in augment:
            if name not in AUGMENTATIONS:
                raise ConfigError(f"unknown augmentation {name!r}: choose from {', '.join(AUGMENTATIONS)}")
        if augment and isinstance(data, TensorData):
            raise ConfigError(f"augment is for images: {data.name} has to augment its samples itself")
        part = split or ("train" if train else "test")
        self.labels = data.labels(part)
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if train and (batch_size > len(self.labels) or batch_size % world):
            raise ConfigError(
                f"batch_size {batch_size} must divide by the number of processes ({world}) and not exceed "
                f"the {len(self.labels)} training images of {data.name}"
            )
        self.data, self.train, self.batch_size, self.seed = data, train, batch_size, seed
        self.device = torch.device(device)
        self.augment = tuple(augment) if train else ()
        self.rank, self.world, self.workers = rank, world, workers
        self._part: Split = part
        if isinstance(data, TensorData):
            return
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._mean = (255 * data.mean).view(1, -1, 1, 1).to(self.device)
        self._scale = (1 / (255 * data.std)).view(1, -1, 1, 1).to(self.device)
        if isinstance(data, ImageData):
            self._x = (data.train_x if part == "train" else data.test_x).to(self.device)
            self._y = self.labels.to(self.device)
        else:
            self._files = data.train_files if part == "train" else data.test_files

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.labels), self.batch_size)
        return full + (not self.train and rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `number` (from 0)."""
        generator = _generator(self.seed, number)
        count = len(self.labels)
        order = torch.randperm(count, generator=generator) if self.train else torch.arange(count)
        parts = [part[self.rank :: self.world] for part in _chunks(order, self.batch_size)[: len(self)]]
        if isinstance(self.data, FolderData):
            return self._decoded(self.data, parts, number)
        if isinstance(self.data, TensorData):
            samples = self.data.samples(self._part, self.seed, number)
            return self._as_they_are(samples, parts)
        return self._resident([part.to(self.device) for part in parts], generator)

    def _as_they_are(self, samples: Samples, parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = (p.to(self.device, torch.float32 if p.is_floating_point() else None) for p in samples)
        for rows in parts:
            rows = rows.to(self.device)
            yield x[rows], y[rows]

    def _resident(self, parts: list[Tensor], generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        count, _, height, width = self._x.shape
        pad = (max(1, height // 8), max(1, width // 8)) if "crop" in self.augment else (0, 0)
        top = torch.randint(0, 2 * pad[0] + 1, (count,), generator=generator)
        left = torch.randint(0, 2 * pad[1] + 1, (count,), generator=generator)
        flip = torch.randint(0, 2, (count,), generator=generator) * ("flip" in self.augment)
        draws = torch.stack([top, left, flip], 1).to(self.device)
        for rows in parts:
            x = self._x[rows]
            if self.augment:
                x = _crop_and_flip(x, pad, *draws[rows].unbind(1))
            yield self._normalised(x), self._y[rows]

    def _decoded(self, data: FolderData, parts: list[Tensor], number: int) -> Iterator[tuple[Tensor, Tensor]]:
        dataset = _Decoder(self._files, self.labels, data.size, self.augment, (self.seed, number))
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=[part.tolist() for part in parts],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for x, y in loader:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            yield self._normalised(x), y

    def _normalised(self, x: Tensor) -> Tensor:
        # The copy sets all strides anew: with one channel, a permuted batch would pass for channels_last.
        x = x.to(torch.float32, memory_format=self._format)
        return x.sub_(self._mean).mul_(self._scale)


def _generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on all of `key`."""
    state = np.random.SeedSequence([part % 2**64 for part in key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _crop_and_flip(x: Tensor, pad: tuple[int, int], top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Image b of x (B, C, H, W), zero-padded, from row top[b] and column left[b], mirrored where flip[b]."""
    batch, _, height, width = x.shape
    x = F.pad(x, (pad[1], pad[1], pad[0], pad[0]))
    across = torch.arange(width, device=x.device)
    across = torch.where(flip[:, None] == 1, across.flip(0), across)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + across
    image = torch.arange(batch, device=x.device)[:, None, None]
    # Indices on both sides of a slice put the sliced dimension last: (B, H, W, C).
    return x[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class _Decoder(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Image files → uint8 tensors (3, size, size), cropped as a function of (seed, epoch, index)."""

    def __init__(
        self, files: Sequence[str], labels: Tensor, size: int, augment: Sequence[str], key: tuple[int, int]
    ) -> None:
        self.files, self.labels, self.size, self.augment, self.key = files, labels, size, augment, key

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = _need("PIL.Image", "an image folder")
        try:
            with image.open(self.files[index]) as opened:
                picture = opened.convert("RGB")
        except OSError as error:
            raise DataError(f"cannot decode {self.files[index]}: {error}") from error
        draw = torch.rand(5, generator=_generator(*self.key, index)).tolist()
        if "crop" in self.augment:
            box = _random_box(picture.width, picture.height, *draw[:4])
        else:
            box = _center_box(picture.width, picture.height)
        picture = picture.resize((self.size, self.size), image.Resampling.BILINEAR, box=box)
        if "flip" in self.augment and draw[4] < 0.5:
            picture = picture.transpose(image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1), self.labels[index]


Box = tuple[float, float, float, float]


def _random_box(width: int, height: int, area: float, aspect: float, left: float, top: float) -> Box:
    """A box of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3 from four numbers in [0, 1)."""
    ratio = (4 / 3) ** (2 * aspect - 1)
    pixels = (0.08 + 0.92 * area) * width * height
    w, h = min(width, (pixels * ratio) ** 0.5), min(height, (pixels / ratio) ** 0.5)
    x, y = left * (width - w), top * (height - h)
    return x, y, x + w, y + h


def _center_box(width: int, height: int) -> Box:
    """The middle 7/8 of the shorter side, as a square (224 of 256)."""
    side = 0.875 * min(width, height)
    x, y = (width - side) / 2, (height - side) / 2
    return x, y, x + side, y + side


def _need(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{purpose} needs {package}: pip install 'decay-pruning[lab]'") from error


def _chunks(x: Tensor, length: int = 4096) -> list[Tensor]:
    return [x[start : start + length] for start in range(0, len(x), length)]


def _spread(labels: Tensor, count: int, order: Tensor) -> Tensor:
    """`count` indices in which each class has its share: evenly spaced after sorting by label."""
    by_label = order[labels[order].argsort(stable=True)]
    return by_label[torch.arange(count) * len(labels) // count]


def _finished(
    data: ImageData, size: int | None, train_limit: int | None, test_limit: int | None
) -> ImageData:
    """Cut to the limits, scale down, and measure mean and standard deviation."""
    train_x, test_x = data.train_x[:train_limit], data.test_x[:test_limit]
    note = data.note
    height = train_x.shape[-1]
    if size is not None and size > height:
        raise ConfigError(f"size {size} exceeds the {height} pixels of {data.name}: nothing is scaled up")
    if size is not None and size < height:
        train_x, test_x = _smaller(train_x, size), _smaller(test_x, size)
        note = f"{note} Scaled down to {size}×{size}.".strip()
    if len(train_x) < len(data.train_x) or len(test_x) < len(data.test_x):
        note = f"{note} Only {len(train_x):,} training and {len(test_x):,} test images.".strip()
    mean, std = _moments(train_x)
    return replace(
        data,
        train_x=train_x,
        train_y=data.train_y[:train_limit],
        test_x=test_x,
        test_y=data.test_y[:test_limit],
        mean=mean,
        std=std,
        note=note,
    )


def _smaller(x: Tensor, size: int) -> Tensor:
    """Area average to size × size, in chunks, rounded back to uint8."""
    parts = [F.adaptive_avg_pool2d(part.float(), size).round_().byte() for part in _chunks(x)]
    return torch.cat(parts)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, pixels in [0, 1]; float32, shape (C,)."""
    total = torch.zeros(2, x.shape[1], dtype=torch.float64)
    for part in _chunks(x):
        values = part.float() / 255
        total += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))]).double()
    mean, square = total / (x.numel() / x.shape[1])
    std = (square - mean.square()).clamp_min(0).sqrt()
    return mean.float(), std.clamp_min(1e-3).float()


def _digits() -> ImageData:
    bunch = _need("sklearn.datasets", "the data set 'digits'").load_digits()
    x = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    y = torch.from_numpy(bunch.target.astype(np.int64))
    test = torch.zeros(len(y), dtype=torch.bool)
    test[_spread(y, 360, torch.arange(len(y)))] = True
    return ImageData(
        name="digits",
        train_x=x[~test],
        train_y=y[~test],
        test_x=x[test],
        test_y=y[test],
        mean=torch.zeros(1),
        std=torch.ones(1),
        classes=tuple(str(digit) for digit in range(10)),
        note="1,797 handwritten digits of 8×8 pixels (scikit-learn); every fifth of a class is a test image.",
    )


def _cifar10(root: Path) -> ImageData:
    batches = next((d for d in (root, root / "cifar-10-batches-py") if (d / "data_batch_1").is_file()), None)
    if batches is not None:
        train = [_pickled_batch(batches / f"data_batch_{i}") for i in range(1, 6)]
        test_x, test_y = _pickled_batch(batches / "test_batch")
        train_x, train_y = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
        name, note, classes = "CIFAR-10", "The original pickled batches.", _CIFAR10
    else:
        places = (root, root / "data", root / "plain_text")
        folder = next((d for d in places if any(d.glob("train-*.parquet"))), None)
        if folder is None:
            raise DataError(
                f"no CIFAR-10 in {root}: expected the files data_batch_1 … test_batch (also in "
                "cifar-10-batches-py/) or train-*.parquet and test-*.parquet (also in data/ or plain_text/)"
            )
        train_x, train_y, classes, kind = _parquet(folder, "train")
        test_x, test_y, test_classes, _ = _parquet(folder, "test")
        if classes != test_classes:
            raise DataError(f"{folder}: training and test files name different classes")
        name = "CIFAR-10 (JPEG)" if kind == "JPEG" else "CIFAR-10"
        note = f"Parquet files with {kind} images."
    top = max(int(train_y.max()), int(test_y.max()))
    if min(int(train_y.min()), int(test_y.min())) < 0 or top >= len(classes):
        raise DataError(f"{root}: labels must lie in 0 … {len(classes) - 1}, found {top}")
    if train_x.shape[1:] != test_x.shape[1:]:
        shapes = f"training images are {tuple(train_x.shape[1:])}, test images {tuple(test_x.shape[1:])}"
        raise DataError(f"{root}: {shapes} (channels, height, width); they must be alike")
    return ImageData(name, train_x, train_y, test_x, test_y, torch.zeros(3), torch.ones(3), classes, note)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers and refuses everything else: no file can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return np.empty(0).__reduce__()[0]  # wherever this version of numpy keeps it
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a CIFAR-10 batch")


def _pickled_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One batch file → images (N, 3, 32, 32) uint8 and labels (N,) int64."""
    if not path.is_file():
        raise DataError(f"CIFAR-10 is incomplete: {path} is missing")
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        pixels, labels = content[b"data"], content[b"labels"]
        x = torch.from_numpy(np.array(pixels, dtype=np.uint8)).reshape(-1, 3, 32, 32)
        y = torch.tensor(labels, dtype=torch.int64)
    except Exception as error:  # a damaged pickle can raise almost anything
        raise DataError(f"{path} is not a CIFAR-10 batch, or damaged ({error}): fetch it again") from error
    if len(x) != len(y) or not len(y):
        raise DataError(f"{path} is damaged: {len(x)} images and {len(y)} labels")
    return x, y


def _parquet(folder: Path, part: str) -> tuple[Tensor, Tensor, tuple[str, ...], str]:
    """Images, labels, class names and encoding of all `part`-*.parquet files in `folder`."""
    files = sorted(folder.glob(f"{part}-*.parquet"))
    if not files:
        raise DataError(f"CIFAR-10 is incomplete: no {part}-*.parquet in {folder}")
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]
    tensors, meta = _cached(f"decoded-{part}-{key}.safetensors", lambda: _decode_parquet(files))
    return tensors["x"], tensors["y"], tuple(meta["classes"]), meta["kind"]


def _decode_parquet(files: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    parquet = _need("pyarrow.parquet", "CIFAR-10 in Parquet")
    image = _need("PIL.Image", "CIFAR-10 in Parquet")
    images: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    classes, kind = _CIFAR10, ""
    for path in files:
        logger.info("decoding %s (once; the result is cached)", path)
        try:
            table = parquet.read_table(path)
        except Exception as error:  # pyarrow has its own, partly private, error types
            raise DataError(f"{path} is not a Parquet file, or damaged ({error}): fetch it again") from error
        column = next((name for name in ("img", "image") if name in table.column_names), None)
        if column is None or "label" not in table.column_names:
            raise DataError(f"{path} has the columns {table.column_names}; expected 'img' and 'label'")
        classes = _class_names(table.schema.metadata) or classes
        for row, cell in enumerate(table.column(column).to_pylist()):
            try:
                with image.open(io.BytesIO(cell["bytes"])) as opened:
                    kind = kind or str(opened.format)
                    images.append(np.array(opened.convert("RGB")))
            except Exception as error:  # Pillow raises many types on damaged bytes
                raise DataError(f"{path}, row {row}: the image cannot be decoded ({error})") from error
        labels += table.column("label").to_pylist()
    if not images:
        raise DataError(f"{files[0].parent}: the Parquet files hold no images")
    try:
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        y = torch.tensor(labels, dtype=torch.int64)
    except (ValueError, TypeError) as error:
        reason = f"images of different sizes, or missing labels ({error})"
        raise DataError(f"{files[0].parent}: {reason}") from error
    return {"x": x, "y": y}, {"classes": list(classes), "kind": kind}


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """Class names in the schema metadata that the Hugging Face Hub writes, if they are there."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None


Decoded = tuple[dict[str, Tensor], dict[str, Any]]


def _cached(name: str, decode: Callable[[], Decoded]) -> Decoded:
    """`decode()`, or what it gave last time: kept in the user's cache folder, never in the folder of the data."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decay-pruning"
    try:
        with safe_open(place / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["meta"])
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        logger.warning("the cached %s is damaged (%s) and made anew", place / name, error)
    tensors, meta = decode()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            save_file(tensors, Path(scratch) / name, metadata={"meta": json.dumps(meta)})
            os.replace(Path(scratch) / name, place / name)
    except (OSError, SafetensorError) as error:
        logger.warning("cannot cache decoded images in %s (%s); they are decoded each time", place, error)
    return tensors, meta


def _image_folder(root: Path, size: int, train_limit: int | None, test_limit: int | None) -> FolderData:
    train = root / "train"
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise DataError(f"{root} must hold train/ and val/ (or test/), and in each a folder for every class")
    classes = tuple(sorted(folder.name for folder in train.iterdir() if folder.is_dir()))
    if not classes:
        raise DataError(f"{train} holds no class folders")
    strangers = sorted({folder.name for folder in test.iterdir() if folder.is_dir()} - set(classes))
    if strangers:
        raise DataError(f"{test}: no training images for the classes {', '.join(strangers)}")
    train_files, train_y = _files(train, classes, train_limit)
    test_files, test_y = _files(test, classes, test_limit)
    return FolderData(
        name=root.resolve().name,
        train_files=train_files,
        train_y=train_y,
        test_files=test_files,
        test_y=test_y,
        mean=torch.tensor(_IMAGENET_MEAN),
        std=torch.tensor(_IMAGENET_STD),
        classes=classes,
        size=size,
        note=f"{len(train_y):,} training and {len(test_y):,} test images, cropped to {size}×{size}.",
    )


def _files(folder: Path, classes: Sequence[str], limit: int | None) -> tuple[tuple[str, ...], Tensor]:
    """Paths and labels of all images in the class folders; with a limit, each class keeps its share."""
    found = [
        (str(path), label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _IMAGE_SUFFIXES
    ]
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    labels = torch.tensor([label for _, label in found])
    if limit is not None and limit < len(found):
        keep = _spread(labels, limit, torch.arange(len(found))).tolist()
        return tuple(found[i][0] for i in keep), labels[keep]
    return tuple(path for path, _ in found), labels
