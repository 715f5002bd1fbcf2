"""Recipes: everything that a run depends on, as one tree of dataclasses that a TOML file fills.

[data]          which images
[model]         which network
[dense]         how the dense start is trained, or where its weights lie
[sparse]        optional: epochs of sparse learning between dense start and pruning, the same for all arms
[prune]         how training goes on while (and after) structures are pruned
  .target       what is to be left
  .host         who picks (`kind`, then that host's own settings)
  .smooth       how picks fade
  .rectify      when they are let go; `rectify = false` for never
[report]        what is measured and kept
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from decay_pruning.budget import Target
from decay_pruning.decay import SmoothPruning
from decay_pruning.errors import ConfigError
from decay_pruning.hosts import HOSTS, DepGraph, Host, SparseLearning
from decay_pruning.lab import data as data_sets
from decay_pruning.lab import models, settings
from decay_pruning.lab.data import Data
from decay_pruning.lab.trainer import TrainSettings
from decay_pruning.rectify import SelfRectifying


@dataclass(frozen=True)
class DataSettings:
    """Which images.

    Attributes:
        name: "digits", "cifar10" or "imagefolder".
        root: folder of the data; digits need none.
        size: height and width to scale down to.
        train_limit, test_limit: use only so many images of each part.
        validation: share of the training images, in [0, 1), that is held out and tested on instead of the
            test images, so that settings can be chosen without looking at those.
        workers: processes that decode images (image folders only).
    """

    name: str = "digits"
    root: str | None = None
    size: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    validation: float = 0.0
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ConfigError(f"validation is a share in [0, 1), not {self.validation}")

    def load(self) -> Data:
        """Read the images.

        Raises:
            ConfigError, DataError: see `lab.data.load`.
        """
        data = data_sets.load(
            self.name,
            root=self.root,
            size=self.size,
            train_limit=self.train_limit,
            test_limit=self.test_limit,
        )
        if not self.validation:
            return data
        if not isinstance(data, data_sets.ImageData):
            raise ConfigError("data.validation works on data sets that fit in memory, not on image folders")
        return data_sets.split(data, self.validation, seed=0)


@dataclass(frozen=True)
class ModelSettings:
    """Which network.

    Attributes:
        name: one of the zoo, or "module:function" for your own.
        options: what else it takes, such as stem = "cifar" for resnet50.
    """

    name: str = "resnet-digits"
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, data: Data, seed: int) -> nn.Module:
        """A fresh network that fits the data, with weights that depend on the seed alone."""
        channels, size, _ = data.shape
        classes = len(data.classes)
        return models.build(
            self.name, classes=classes, channels=channels, size=size, seed=seed, **self.options
        )


@dataclass(frozen=True)
class Dense(TrainSettings):
    """How the dense start is trained.

    Attributes:
        weights: a file with its weights, in place of any training.
    """

    weights: str | None = None


@dataclass(frozen=True)
class Sparse(TrainSettings):
    """Sparse learning between the dense start and pruning, done once for all arms (see `SparseLearning`)."""

    strength: float = SparseLearning.strength
    alpha: float = SparseLearning.alpha
    every: int = SparseLearning.every

    @property
    def learning(self) -> SparseLearning:
        """The regulariser's settings."""
        return SparseLearning(self.strength, self.alpha, self.every)


@dataclass(frozen=True)
class Prune(TrainSettings):
    """How training goes on from the dense start, in one go, while structures fade and after they are gone.

    Attributes:
        start: epochs before the first pick.
        target: what is to be left of the dense model.
        host: who picks.
        smooth: how picks fade.
        rectify: when they are let go again, or None.
    """

    start: float = 0.0
    target: Target = field(default_factory=lambda: Target(macs=0.5))
    host: Host = field(default_factory=DepGraph, metadata=settings.Kinds(lambda: HOSTS, "depgraph").metadata)
    smooth: SmoothPruning = field(default_factory=SmoothPruning)
    rectify: SelfRectifying | None = field(default_factory=SelfRectifying)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < self.epochs:
            raise ConfigError(f"start = {self.start} must lie within the {self.epochs} epochs of this phase")


@dataclass(frozen=True)
class ReportSettings:
    """What is measured and kept.

    Attributes:
        eval_every: epochs from one test to the next.
        latency_batch: images in the batch whose forward pass is timed.
        save_models: keep the pruned model of every run (not of those in `lab.peers`).
    """

    eval_every: float = 1.0
    latency_batch: int = 64
    save_models: bool = False

    def __post_init__(self) -> None:
        if self.eval_every <= 0 or self.latency_batch < 1:
            raise ConfigError("eval_every must be above 0 and latency_batch at least 1")


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on, but for its seed and arm.

    Attributes:
        name: short, for folders.
        title: for reports.
        device: "auto" takes a GPU where there is one.
    """

    name: str = "recipe"
    title: str = ""
    device: Literal["auto", "cpu"] = "auto"
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    dense: Dense = field(default_factory=Dense)
    sparse: Sparse | None = None
    prune: Prune = field(default_factory=Prune)
    report: ReportSettings = field(default_factory=ReportSettings)

    def __post_init__(self) -> None:
        name = self.name
        if (
            not isinstance(name, str)
            or name.strip(" .") != name
            or not 0 < len(name.encode(errors="replace")) <= 200
            or any(c in '/\\:*?"<>|' or not c.isprintable() for c in name)
        ):
            raise ConfigError(
                f'the name of a recipe is that of a folder, without any of / \\ : * ? " < > | and no dot at its '
                f"ends, not {name!r}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """From plain values, such as those of a result file.

        Raises:
            ConfigError: an unknown key or a wrong value; the message names the dotted key.
        """
        return settings.build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` gives the recipe back."""
        values: dict[str, Any] = settings.plain(self)
        return values

    def key_of_start(self, data: Data, seed: int) -> str:
        """A short hash of `facts_of_start`, for its file's name.

        Raises:
            OSError: `dense.weights` cannot be read.
        """
        facts = json.dumps(self.facts_of_start(data, seed), sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:12]

    def facts_of_start(self, data: Data, seed: int) -> list[Any]:
        """Everything that the start of all arms depends on: settings, data set, seed.

        Raises:
            OSError: `dense.weights` cannot be read.
        """
        values = self.to_dict()
        parts = {name: values[name] for name in ("device", "data", "model", "dense", "sparse")}
        shared = Recipe.from_dict(parts).to_dict()  # once more, so that 10 and 10.0 are the same
        del shared["report"], shared["data"]["root"], shared["data"]["workers"]
        shared["prune"] = values["prune"]["host"] if self.sparse is not None else None
        if self.dense.weights is not None:
            shared["dense"] = hashlib.sha256(Path(self.dense.weights).expanduser().read_bytes()).hexdigest()
        return [shared, data.name, data.note, len(data.labels("train")), data.shape, seed]


def load(path: str | Path, assignments: Iterable[str] = ()) -> Recipe:
    """Read a recipe, with "dotted.key=value" assignments that overrule the file.

    Raises:
        ConfigError: a missing file, invalid TOML, an unknown key or a wrong value.
    """
    path = Path(path)
    values = settings.read(path)
    values.setdefault("name", path.stem)
    return Recipe.from_dict(settings.override(values, assignments))
