"""Importance: one number per structure, from the values of its slices (as DepGraph and its relatives define it).

Each layer of a layer group gives every structure a value, and the values are put together over the layers. Whether they
are then made comparable between layer groups is a choice of its own, the normalizer.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from decay_pruning import surgery
from decay_pruning.errors import ConfigError
from decay_pruning.structures import Coupling, LayerGroup, Role, StructureSet
from decay_pruning.valueless import is_valueless

logger = logging.getLogger("decay_pruning")


class Importance(ABC):
    """Scores all structures of one layer group."""

    @abstractmethod
    def score(self, model: nn.Module, group: LayerGroup) -> Tensor | None:
        """Shape (S,), in the order of `ids`; None where there is nothing to say."""


def check_values(model: nn.Module) -> None:
    """Raise `ConfigError` where there are no weights to score structures by."""
    if is_valueless(model):
        raise ConfigError(
            "an importance reads weights, and the model is on the meta device, where it has none: leave the host out, "
            "and the plan takes the same share of every layer group"
        )


def scores(importance: Importance, model: nn.Module, structures: StructureSet) -> dict[str, Tensor]:
    """Layer group → shape (S,), on the CPU, in the order of `ids`.

    Layer groups that the importance has nothing to say about are left out, with a warning in the log.

    Raises:
        ConfigError: the model is on the meta device, and the importance reads weights.
    """
    if not isinstance(importance, Random):
        check_values(model)
    found = {}
    for name, group in structures.groups.items():
        score = importance.score(model, group)
        if score is None:
            kind = type(importance).__name__
            logger.warning("%s gives no score to layer group %r: it is never picked", kind, name)
        else:
            found[name] = score
    return found


Reduction = Literal["mean", "sum"]
Normalizer = Literal["none", "mean", "max", "sum"]

#: Name → what the scores of a layer group are divided by.
NORMALIZERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "mean": torch.mean,
    "max": torch.max,
    "sum": torch.sum,
}


class _OverLayers(Importance):
    """What each layer says, put together.

    Args:
        reduction: of the values of all layers, their "mean" or "sum".
    """

    roles = frozenset({Role.ROW, Role.COLUMN, Role.SCALE})

    def __init__(self, reduction: Reduction = "mean") -> None:
        self.reduction = reduction

    @torch.no_grad()
    def score(self, model: nn.Module, group: LayerGroup) -> Tensor | None:
        values = [
            value
            for coupling, module, tensor in _layers(model, group)
            if coupling.role in self.roles
            and (value := self.of_layer(group, coupling, module, tensor)) is not None
        ]
        if not values:
            return None
        total = sum(values[1:], values[0])
        return self.put_together(total / len(values) if self.reduction == "mean" else total)

    def put_together(self, values: Tensor) -> Tensor:
        """The last word on all structures of the layer group."""
        return values

    @abstractmethod
    def of_layer(
        self, group: LayerGroup, coupling: Coupling, module: nn.Module, tensor: nn.Parameter
    ) -> Tensor | None:
        """One value per structure from one layer, or None."""


class Magnitude(_OverLayers):
    """Σ|w|^p over the rows, columns and scales of a structure."""

    def __init__(self, p: int = 2, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.p = p

    def of_layer(
        self, group: LayerGroup, coupling: Coupling, module: nn.Module, tensor: nn.Parameter
    ) -> Tensor | None:
        return _per_structure(tensor.detach().abs().pow(self.p), coupling, group)


class LAMP(Magnitude):
    """Magnitude, divided by the sum of all that are at least as large (layer-adaptive magnitude pruning)."""

    def put_together(self, values: Tensor) -> Tensor:
        ascending, order = values.sort()
        rest = values.sum() - torch.cat([ascending.new_zeros(1), ascending.cumsum(0)[:-1]])
        return torch.zeros_like(values).scatter_(0, order, ascending / rest)


class BatchNormScale(Magnitude):
    """|γ| of batch-norms alone (network slimming)."""

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__(1, reduction)

    def of_layer(
        self, group: LayerGroup, coupling: Coupling, module: nn.Module, tensor: nn.Parameter
    ) -> Tensor | None:
        return super().of_layer(group, coupling, module, tensor) if isinstance(module, _BatchNorm) else None


class Taylor(_OverLayers):
    """Σ|w · ∂loss/∂w|: how much the loss would change, to first order."""

    def of_layer(
        self, group: LayerGroup, coupling: Coupling, module: nn.Module, tensor: nn.Parameter
    ) -> Tensor | None:
        if tensor.grad is None:
            return None
        gradient = tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad
        return _per_structure((tensor.detach() * gradient).abs(), coupling, group)


class GeometricMedian(_OverLayers):
    """Distance to all other structures of the layer (filter pruning by geometric median), over squared weights."""

    roles = frozenset({Role.ROW, Role.COLUMN})

    def of_layer(
        self, group: LayerGroup, coupling: Coupling, module: nn.Module, tensor: nn.Parameter
    ) -> Tensor | None:
        count = torch.bincount(coupling.owner, minlength=len(group))
        if int(count.min()) != int(count.max()):
            return None
        order = coupling.position[torch.argsort(coupling.owner, stable=True)].to(tensor.device)
        slices = tensor.detach().movedim(coupling.dim, 0)[order].reshape(len(group), -1).square()
        return torch.cdist(slices[None], slices[None])[0].sum(0).cpu()


class Random(Importance):
    """A number between 0 and 1."""

    def score(self, model: nn.Module, group: LayerGroup) -> Tensor | None:
        return torch.rand(len(group))


def _layers(model: nn.Module, group: LayerGroup) -> Iterator[tuple[Coupling, nn.Module, nn.Parameter]]:
    for coupling in group.couplings:
        module, leaf = surgery.parent(model, coupling.tensor)
        tensor = getattr(module, leaf)
        if isinstance(tensor, nn.Parameter):
            yield coupling, module, tensor


def _per_structure(values: Tensor, coupling: Coupling, group: LayerGroup) -> Tensor:
    """Sum over the slice of each structure, on the CPU."""
    rest = [d for d in range(values.ndim) if d != coupling.dim]
    along = (values.sum(rest) if rest else values).float().cpu()
    return torch.zeros(len(group)).index_add_(0, coupling.owner, along[coupling.position])


#: Name → a new importance. "activation" has hooks of its own, see `activations`.
IMPORTANCES: Mapping[str, Callable[[Reduction], Importance]] = {
    "magnitude": lambda reduction: Magnitude(2, reduction),
    "magnitude-l1": lambda reduction: Magnitude(1, reduction),
    "taylor": Taylor,
    "fpgm": GeometricMedian,
    "lamp": lambda reduction: LAMP(2, reduction),
    "random": lambda _: Random(),
    "bn-scale": BatchNormScale,
}
