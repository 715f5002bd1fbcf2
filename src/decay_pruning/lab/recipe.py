"""Recipes: everything that a run depends on, as one tree of dataclasses that a TOML file fills.

[data]          which images, or a data set of your own with its loss and metric
[model]         which network
[dense]         how the dense start is trained, or where its weights lie
[sparse]        optional: epochs of sparse learning between dense start and pruning, the same for all arms
[prune]         how training goes on while (and after) structures are pruned
  .target       what is to be left
  .host         who picks (`kind`, then that host's own settings)
  .smooth       how picks fade
  .rectify      when they are let go; `rectify = false` for never
  .distill      optional: the dense start as a teacher
[arms.NAME]     optional: ways to prune of your own, as further arms
[report]        what is measured and kept
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from decay_pruning import hosts
from decay_pruning.budget import Target
from decay_pruning.checks import Count, NotNegative, Positive, Share, Whole, check
from decay_pruning.decay import SmoothPruning
from decay_pruning.errors import ConfigError
from decay_pruning.hosts import DepGraph, Host, SparseLearning
from decay_pruning.lab import data as data_sets
from decay_pruning.lab import models, own, settings
from decay_pruning.lab.data import Data
from decay_pruning.lab.distillation import Distillation
from decay_pruning.lab.plugins import OwnArm, OwnHost
from decay_pruning.lab.results import ARMS
from decay_pruning.lab.trainer import TrainSettings
from decay_pruning.rectify import SelfRectifying

#: Hosts by their `kind`.
HOSTS: Mapping[str, type] = {**hosts.HOSTS, "own": OwnHost}


@dataclass(frozen=True)
class DataSettings:
    """Which images, or other samples.

    Attributes:
        name: "digits", "cifar10" or "imagefolder", or "module:function" for your own, a function that returns
            `lab.task.TensorData`.
        options: what else your own function takes.
        beside: a folder that its module is looked for in first; of a recipe file, its own.
        root: folder of the data; digits need none.
        size: height and width to scale down to.
        train_limit, test_limit: use only so many images of each part.
        validation: share of the training images, in [0, 1), that is held out and tested on instead of the
            test images, so that settings can be chosen without looking at those.
        workers: processes that decode images (image folders only).
    """

    name: str = "digits"
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: str | None = None
    root: str | None = None
    size: Whole | None = None
    train_limit: Whole | None = None
    test_limit: Whole | None = None
    validation: Share = 0.0
    workers: Count = 0

    def __post_init__(self) -> None:
        check(self)

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
            options=self.options,
            beside=self.beside,
        )
        return data_sets.split(data, self.validation, seed=0) if self.validation else data


@dataclass(frozen=True)
class ModelSettings:
    """Which network.

    Attributes:
        name: one of the zoo, or "module:function" for your own.
        options: what else it takes, such as stem = "cifar" for resnet50.
        beside: a folder that the module of your own is looked for in first; of a recipe file, its own.
    """

    name: str = "resnet-digits"
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: str | None = None

    def __post_init__(self) -> None:
        check(self)

    def build(self, data: Data, seed: int) -> nn.Module:
        """A fresh network that fits the data, with weights that depend on the seed alone."""
        channels, size, _ = data.shape if len(data.shape) == 3 else (None, None, None)
        classes = len(data.classes) or None
        return models.build(
            self.name,
            classes=classes,
            channels=channels,
            size=size,
            seed=seed,
            beside=self.beside,
            **self.options,
        )


@dataclass(frozen=True)
class Dense(TrainSettings):
    """How the dense start is trained.

    Attributes:
        epochs: 0 where the model comes with its weights.
        weights: a file with its weights, in place of any training.
    """

    at_least_one_step: ClassVar[bool] = False

    weights: str | None = None


@dataclass(frozen=True)
class Sparse(TrainSettings):
    """Sparse learning between the dense start and pruning, done once for all arms (see `SparseLearning`)."""

    strength: float = SparseLearning.strength
    alpha: float = SparseLearning.alpha
    every: int = SparseLearning.every

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.learning  # which has the ranges

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
        distill: how the dense start teaches, all arms alike, or None.
    """

    start: NotNegative = 0.0
    target: Target = field(default_factory=lambda: Target(macs=0.5))
    host: Host = field(default_factory=DepGraph, metadata=settings.Kinds(lambda: HOSTS, "depgraph").metadata)
    smooth: SmoothPruning = field(default_factory=SmoothPruning)
    rectify: SelfRectifying | None = field(default_factory=SelfRectifying)
    distill: Distillation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start >= self.epochs:
            raise ConfigError(f"start = {self.start} must lie within the {self.epochs} epochs of this phase")


@dataclass(frozen=True)
class ReportSettings:
    """What is measured and kept.

    Attributes:
        eval_every: epochs from one test to the next.
        latency_batch: images in the batch whose forward pass is timed.
        save_models: keep the pruned model of every run (not of those in `lab.peers`).
    """

    eval_every: Positive = 1.0
    latency_batch: Whole = 64
    save_models: bool = False

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on, but for its seed and arm.

    Attributes:
        name: short, for folders: a plain one, without separators.
        title: for reports.
        device: "auto" takes a GPU where there is one.
        arms: name → an arm of your own.
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
    arms: Mapping[str, OwnArm] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)
        for arm in self.arms:
            if arm in ARMS or not re.fullmatch(r"[a-z][a-z0-9-]*", arm):
                raise ConfigError(
                    f"arms.{arm}: an arm of your own has a name of small letters, digits and hyphens, and none of "
                    f"{', '.join(ARMS)}"
                )
        if not _is_folder_name(self.name):
            raise ConfigError(
                f"name must be that of one plain folder, without / \\ : and the like, not {self.name[:60]!r}"
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

    def facts_of_start(self, data: Data, seed: int) -> dict[str, Any]:
        """Everything that the start of all arms depends on, as plain values.

        Raises:
            OSError: `dense.weights` cannot be read.
        """
        values = self.to_dict()
        parts = {name: values[name] for name in ("device", "data", "model", "dense", "sparse")}
        shared = Recipe.from_dict(parts).to_dict()  # once more, so that 10 and 10.0 are the same
        del shared["report"], shared["data"]["root"], shared["data"]["workers"]
        for section, what in (("data", "data set"), ("model", "model")):
            name, beside = shared[section]["name"], shared[section].pop("beside")
            if ":" in name:
                shared[section]["code"] = own.fingerprint(name, what, beside)
        if not shared["data"]["options"]:
            del shared["data"]["options"]
        shared["prune"] = values["prune"]["host"] if self.sparse is not None else None
        if self.dense.weights is not None:
            shared["dense"] = hashlib.sha256(Path(self.dense.weights).expanduser().read_bytes()).hexdigest()
        return {
            "recipe": shared,
            "data": [data.name, data.note, len(data.labels("train")), list(data.shape)],
            "seed": seed,
        }

    def key_of_start(self, data: Data, seed: int) -> str:
        """A short hash of `facts_of_start`, for a file's name.

        Raises:
            OSError: `dense.weights` cannot be read.
        """
        facts = self.facts_of_start(data, seed)
        text = json.dumps([facts["recipe"], *facts["data"], seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


#: Names that mean a device under Windows, whatever follows the first dot.
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{name}{i}" for name in ("COM", "LPT") for i in range(10))}


def _is_folder_name(name: str) -> bool:
    """Whether this is the name of one folder, on any system."""
    return (
        name.isprintable()
        and not set(name) & set('/\\:*?"<>|')
        and name == name.strip().rstrip(".")
        and 0 < len(name.encode(errors="replace")) <= 200
        and name.partition(".")[0].upper() not in _DEVICES
    )


def load(path: str | Path, assignments: Iterable[str] = ()) -> Recipe:
    """Read a recipe, with "dotted.key=value" assignments that overrule the file.

    Raises:
        ConfigError: a missing file, invalid TOML, an unknown key or a wrong value.
    """
    path = Path(path)
    values = settings.read(path)
    values.setdefault("name", path.stem)
    values = settings.override(values, assignments)
    prune, arms = values.get("prune"), values.get("arms")
    sections = [
        values.get("data"),
        values.get("model"),
        prune.get("host") if isinstance(prune, dict) else None,
    ]
    for section in [*sections, *(arms.values() if isinstance(arms, dict) else ())]:
        if isinstance(section, dict) and ":" in str(section.get("name")):
            section.setdefault("beside", str(path.parent.resolve()))
    return Recipe.from_dict(values)
