"""What a model costs, and what it will cost when picked structures are gone.

1 MAC (multiply-accumulate) = 2 FLOPs. MACs are counted on the example inputs (see `counting`): give a batch of one to
get the figure that papers print.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from decay_pruning.checks import Count, Whole, above, as_inputs, check, checked
from decay_pruning.counting import count
from decay_pruning.errors import ConfigError
from decay_pruning.keeping import contents
from decay_pruning.proof import copied
from decay_pruning.structures import Picks, Place, Role, StructureSet
from decay_pruning.surgery import call
from decay_pruning.valueless import is_valueless


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates for the example inputs, parameters, and removable structures."""

    macs: int
    params: int
    structures: int = 0


Quantity = Literal["macs", "params", "structures"]
#: What is left of something, and less than all of it.
Kept = Annotated[float, above(0, below=1, what="the fraction to keep")]


@dataclass(frozen=True)
class Target:
    """What is to be left: exactly one of three fractions of the original model, each in (0, 1).

    >>> Target(macs=0.5).of, Target(params=0.1).keep
    ('macs', 0.1)

    Raises:
        ConfigError: none or several are given, or one is not in (0, 1).
    """

    macs: Kept | None = None
    params: Kept | None = None
    structures: Kept | None = None

    def __post_init__(self) -> None:
        check(self, "target")
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise ConfigError(f"give one target, of macs, params or structures; got {given or 'none'}")

    @property
    def of(self) -> Quantity:
        """What is counted."""
        return next(name for name in get_args(Quantity) if getattr(self, name) is not None)

    @property
    def keep(self) -> float:
        """The fraction of it that is to be left."""
        return float(getattr(self, self.of))


def as_target(target: Target | float) -> Target:
    """A target as the user gives it: a bare number is the fraction of MACs.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(target, Real) and not isinstance(target, bool):
        return Target(macs=cast(float, target))
    found: Target = checked(target, Annotated[Target, "a Target or the fraction of MACs to keep"], "target")
    return found


def measure(model: nn.Module, example_inputs: Any) -> Cost:
    """MACs and parameters of a model as it is.

    Raises:
        ConfigError: no model or no inputs are given.
        GraphError: the model does not run on these inputs.
    """
    model, example_inputs = checked(model, nn.Module, "model"), as_inputs(example_inputs)
    return Cost(macs=sum(product.macs for product in count(model, example_inputs)), params=_params(model))


def latency(model: nn.Module, example_inputs: Any, *, repeats: int = 20, warmup: int = 3) -> float:
    """Median seconds of a forward pass in evaluation mode, on the device that the model is on.

    Args:
        model: the model.
        example_inputs: see `Pruner`.
        repeats: timed passes.
        warmup: passes before those.

    Raises:
        ConfigError: repeats is below 1, warmup below 0, or the model on the meta device.
    """
    repeats, warmup = checked(repeats, Whole, "repeats"), checked(warmup, Count, "warmup")
    model, example_inputs = checked(model, nn.Module, "model"), as_inputs(example_inputs)
    if is_valueless(model):
        raise ConfigError(
            "the model is on the meta device, where a forward pass computes nothing: no time to measure"
        )
    times = []
    example_inputs = copied(example_inputs)
    modes = [(module, module.training) for module in model.modules()]
    put_back = contents(model.modules())
    try:
        for module, _ in modes:  # never by eval(): it may merge weights
            module.training = False
        with torch.no_grad():
            for _ in range(warmup + repeats):
                start = time.perf_counter()
                call(model, example_inputs)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
    finally:
        put_back()
        for module, mode in modes:
            module.training = mode
    return statistics.median(times[warmup:])


class CostModel:
    """Predicts the cost after a removal from the widths alone.

    A tensor that keeps given fractions of its dimensions keeps their product of its parameters, and a product of
    tensors keeps the fractions of all widths along its axes (see `counting`). Exact for layers; for products of
    activations, such as attention, as good as their widths can be followed, until the model is counted again.

    Attributes:
        now: the cost at the last count.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, structures: StructureSet) -> None:
        self._numel = {name: p.numel() for name, p in model.named_parameters()}
        self._macs: dict[tuple[tuple[Place, float], ...], int] = {}  # makers → all products that have these
        products = count(model, example_inputs)
        for product in products:
            key = tuple(sorted(product.makers.items()))
            self._macs[key] = self._macs.get(key, 0) + product.macs
        self.now = Cost(sum(p.macs for p in products), _params(model), len(structures))
        self._structures = structures
        self._count = {
            name: [
                (c.place, torch.bincount(c.owner, minlength=len(group)))
                for c in group.couplings
                if c.role is not Role.ATTRIBUTE
            ]
            for name, group in structures.groups.items()
        }

    def after(self, removed: Mapping[str, Tensor]) -> Cost:
        """Cost once these are gone: layer group → bool, parallel to its ids."""
        gone: dict[Place, int] = {}
        structures = self.now.structures
        for name, mask in removed.items():
            structures -= int(mask.sum())
            for place, number in self._count[name]:
                gone[place] = gone.get(place, 0) + int(number[mask].sum())
        kept = {place: 1 - number / self._structures.sizes[place] for place, number in gone.items()}
        share: dict[str, float] = {}
        for (tensor, _), left in kept.items():
            share[tensor] = share.get(tensor, 1.0) * left
        params = sum(self._numel.get(tensor, 0) * (1 - left) for tensor, left in share.items())
        macs = 0.0
        for makers, cost in self._macs.items():
            macs += cost * math.prod(kept[place] ** power for place, power in makers if place in kept)
        return Cost(round(macs), round(self.now.params - params), structures)

    def price(self, name: str, of: Quantity, gone: Mapping[str, Tensor]) -> float:
        """What one structure of a layer group costs in the network that is left when these are gone; at least 1."""
        live = (~gone[name]).nonzero().flatten()[:1]
        with_it = {**gone, name: gone[name].index_fill(0, live, True)}
        before, after = (float(getattr(self.after(each), of)) for each in (gone, with_it))
        return max(1.0, before - after)

    def uses(self, tensor: str) -> float:
        """MACs per element of a weight: in a convolution, the positions of its output; 0 for what is not multiplied."""
        whole = {(tensor, 0), (tensor, 1)}
        macs = sum(cost for makers, cost in self._macs.items() if whole <= {place for place, _ in makers})
        return macs / self._numel[tensor] if self._numel.get(tensor) else 0.0

    def after_picks(self, picks: Picks) -> Cost:
        """Cost once these are gone, by original indices."""
        masks = {}
        for name, ids in picks.items():
            group = self._structures.groups[name]
            masks[name] = torch.zeros(len(group), dtype=torch.bool)
            masks[name][group.rows(ids)] = True
        return self.after(masks)


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
