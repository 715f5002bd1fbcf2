"""Distillation: while structures fade, the network also learns to answer as the dense one does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_pruning.checks import Positive, check
from decay_pruning.errors import ConfigError


@dataclass(frozen=True)
class Distillation:
    """The dense start as a teacher (Hinton et al., arXiv 1503.02531).

    The loss is (1 − weight) · the task's + weight · how far the outputs are from the teacher's: of a classifier
    T² · KL(teacher ‖ student) of both softmaxes at temperature T, of other tasks what their data name (`imitation`).

    Attributes:
        weight: above 0, at most 1.
        temperature: T; only for classifiers.
    """

    weight: Positive = 0.5
    temperature: Positive = 2.0

    def __post_init__(self) -> None:
        check(self)
        if self.weight > 1:
            raise ConfigError(f"weight is a share of the loss, at most 1, not {self.weight}")


class Teacher:
    """A copy of a model as it is now, and how far others are from it.

    Args:
        imitation: (outputs, teacher's outputs) → a mean over the batch; None for the softmax of a classifier.
    """

    def __init__(
        self, model: nn.Module, how: Distillation, imitation: Callable[[Any, Any], Tensor] | None
    ) -> None:
        self.how, self._imitation = how, imitation or self._divergence
        self._model = copy.deepcopy(model).requires_grad_(False).eval()

    def blend(self, loss: Tensor, outputs: Any, inputs: Tensor) -> Tensor:
        """The task's loss of a batch and the distance to the teacher, in one."""
        with torch.no_grad():
            target = self._model(inputs)
        return (1 - self.how.weight) * loss + self.how.weight * self._imitation(outputs, target)

    def _divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        t = self.how.temperature
        mine, theirs = (F.log_softmax(each / t, dim=1) for each in (outputs, target))
        return t * t * F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
