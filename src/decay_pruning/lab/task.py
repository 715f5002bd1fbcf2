"""What a network is trained for: samples, a loss and a metric, of your own if need be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from decay_pruning.errors import ConfigError

Split = Literal["train", "test"]
#: Inputs and targets: two tensors with a row for each sample.
Samples = tuple[Tensor, Tensor]
#: (outputs of the model, targets) → the mean over a batch, a tensor of one number.
Loss = Callable[[Any, Tensor], Tensor]
#: The seed of the samples that stand in for the test samples under `data.validation`; no run has it.
VALIDATION_SEED = 2**31 - 1


@dataclass(frozen=True)
class Scale:
    """How a figure is to be read.

    Attributes:
        name: what it is called in tables and reports.
        unit: "%" for shares, which are shown times 100; anything else is written behind the plain mean.
        higher_is_better: or the other way round.
    """

    name: str = "top-1"
    unit: str = "%"
    higher_is_better: bool = True

    def to_dict(self) -> dict[str, Any]:
        """What a result keeps of it."""
        return {"name": self.name, "unit": self.unit, "higher_is_better": self.higher_is_better}

    @property
    def title(self) -> str:
        """The name as the head of a column."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def word(self) -> str:
        """What it is called in a sentence."""
        return "accuracy" if self.name == "top-1" else self.name

    @property
    def of(self) -> str:
        """The unit after a comma, as labels of axes and columns have it."""
        return f", {self.unit}" if self.unit else ""

    def show(self, value: float, digits: int = 2) -> str:
        """A value and its unit."""
        return f"{value:.{digits}f} {self.unit}".rstrip()


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the largest output is that of the right class."""
    return outputs.argmax(1).eq(targets)


@dataclass(frozen=True)
class Metric(Scale):
    """What is measured on the test samples: the mean of a score that each of them gets.

    Attributes:
        score: (outputs of the model, targets) → a score for each sample of the batch; shares lie in [0, 1].
    """

    score: Callable[[Any, Tensor], Tensor] = hits

    def total(self, outputs: Any, targets: Tensor) -> Tensor:
        """The sum over a batch.

        Raises:
            ConfigError: `score` gave something else than a number for each sample.
        """
        scores = self.score(outputs, targets)
        if not isinstance(scores, Tensor) or scores.shape != targets.shape[:1]:
            what = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ConfigError(
                f"the metric {self.name!r} gave {what} for a batch of {len(targets)}: it must give each sample a score"
            )
        return scores.double().sum()

    def mean(self, total: float, count: int) -> float:
        """The figure that is shown, from the sum over all samples.

        Raises:
            ConfigError: it is not a finite number.
        """
        value = (100 if self.unit == "%" else 1) * total / count
        if not math.isfinite(value):
            raise ConfigError(f"the metric {self.name!r} is {value}: a figure is needed")
        return value


TOP1 = Metric()


@dataclass(frozen=True, eq=False)
class TensorData:
    """A data set of your own, whose samples go into the model as they are (floating-point ones as float32).

    Attributes:
        name: what to call it wherever a figure from it is shown.
        train: inputs and targets, or, for data that is made on the fly, a function of (seed, epoch) that makes those of
            an epoch, always as many.
        test: inputs and targets.
        loss: cross-entropy if not given.
        metric: what is measured on the test samples.
        classes: class names, where there are classes.
        note: where the data came from and what was done to it, for reports.
        imitation: (outputs, outputs of a teacher) → the mean of their distance over a batch, for distillation where the
            loss is not cross-entropy.
    """

    name: str
    train: Samples | Callable[[int, int], Samples]
    test: Samples
    loss: Loss | None = None
    metric: Metric = TOP1
    classes: tuple[str, ...] = ()
    note: str = ""
    imitation: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        _check(self.test, f"the test samples of {self.name}")
        if not callable(self.train):
            _check(self.train, f"the training samples of {self.name}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input of one sample."""
        return tuple(self.test[0].shape[1:])

    def labels(self, split: Split) -> Tensor:
        """The targets; of training samples that are made on the fly, those of the first epoch of seed 0."""
        return (self._first if split == "train" else self.test)[1]

    def samples(self, split: Split, seed: int = 0, epoch: int = 0) -> Samples:
        """Inputs and targets; seed and epoch matter where they are made on the fly.

        Raises:
            ConfigError: what was made are not as many inputs and targets as the first time.
        """
        if split == "test" or not callable(self.train):
            return self._first if split == "train" else self.test
        made, here = self.train(seed, epoch), f"the training samples of {self.name}"
        _check(made, here)
        if len(made[1]) != len(self._first[1]):
            raise ConfigError(
                f"{here} are {len(made[1]):,} in epoch {epoch} and were {len(self._first[1]):,}"
            )
        return made

    @cached_property
    def _first(self) -> Samples:
        if not callable(self.train):
            return self.train
        made = self.train(0, 0)
        _check(made, f"the training samples of {self.name}")
        return made


def _check(samples: object, what: str) -> None:
    if not (
        isinstance(samples, tuple | list)
        and len(samples) == 2
        and all(isinstance(part, Tensor) and part.dim() for part in samples)
    ):
        raise ConfigError(f"{what} must be two tensors, inputs and targets")
    inputs, targets = samples
    if len(inputs) != len(targets) or not len(inputs):
        raise ConfigError(f"{what} are {len(inputs):,} inputs and {len(targets):,} targets")


def is_floating(data: Any) -> bool:
    """Whether the inputs are floating-point numbers, as images are."""
    return not isinstance(data, TensorData) or data.test[0].is_floating_point()


def blank(data: Any, count: int, device: torch.device) -> Tensor:
    """Zeros of the shape and type of `count` inputs, for counting and timing."""
    dtype = torch.float32 if is_floating(data) else data.test[0].dtype
    return torch.zeros(count, *data.shape, device=device, dtype=dtype)
