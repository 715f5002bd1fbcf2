"""What a model costs, and what it will cost when picked structures are gone.

1 MAC (multiply-accumulate) = 2 FLOPs. MACs are counted on the example inputs (see `counting`): give a batch of one to
get the figure that papers print.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Annotated, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from decay_pruning.checks import Count, Whole, above, as_inputs, check, checked, shown
from decay_pruning.counting import count
from decay_pruning.errors import ConfigError
from decay_pruning.peak import MemoryModel
from decay_pruning.proof import mapped
from decay_pruning.speed import LatencyModel, Runtime, as_runtime, passes
from decay_pruning.structures import Picks, Place, Role, StructureSet
from decay_pruning.valueless import is_valueless

#: How far a measured latency may lie above its target.
WITHIN = 0.05


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates for the example inputs, parameters, and removable structures.

    Attributes:
        macs, params, structures: numbers.
        latency: seconds of a forward pass, where the target is one of latency.
        memory: peak bytes of a forward pass, where the target is one of memory.
        measured: the latency was measured in a model of just these widths, not predicted.
    """

    macs: int
    params: int
    structures: int = 0
    latency: float | None = None
    memory: int | None = None
    measured: bool = field(default=False, compare=False)


Quantity = Literal["macs", "params", "structures", "latency", "memory"]
#: What is left of something, and less than all of it.
Kept = Annotated[float, above(0, below=1, what="the fraction to keep")]
#: A number of a unit, such as "12 ms".
Amount = Annotated[str, 'an amount such as "12 ms" or "300 MiB"']
_SECONDS = {"us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}
_BYTES: dict[str, float] = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 1e3, "mb": 1e6, "gb": 1e9}
_UNITS: dict[str, tuple[dict[str, float], str]] = {
    "latency": (_SECONDS, "12 ms"),
    "memory": (_BYTES, "300 MiB"),
}


@dataclass(frozen=True)
class Target:
    """What is to be left: exactly one of five, each as a fraction of the original model in (0, 1).

    Latency and memory can be absolute, too: `Target(latency="12 ms")`, `Target(memory="300 MiB")`. Both are those of a
    forward pass on the example inputs, on the device that the model is on.

    >>> Target(macs=0.5).of, Target(params=0.1).keep, Target(latency="12 ms").at_most(0.040)
    ('macs', 0.1, 0.012)

    Attributes:
        macs, params, structures: see `Cost`.
        latency: of a forward pass. Predicted from a table of times by width, which is measured where it has gaps and
            kept on disk; measured at the end, and met within 5 %.
        memory: peak of a forward pass without gradients: weights, inputs and what is alive of the activations.
        batch: size of the batch for latency and memory, made by repeating the example inputs; None for theirs.
        runtime: what the latency is of: "eager" (None), "compiled" (`torch.compile`), or a function of yours, (model,
            example inputs) → seconds.
        per_cost: whether the host's scores are weighed by what a structure costs of this, so that of two that score
            alike the dearer goes first; None for yes with latency and memory, and for no with the others.

    Raises:
        ConfigError: none or several are given, or one is neither in (0, 1) nor an amount.
    """

    macs: Kept | None = None
    params: Kept | None = None
    structures: Kept | None = None
    latency: Kept | Amount | None = None
    memory: Kept | Amount | None = None
    batch: Whole | None = None
    runtime: Literal["eager", "compiled"] | Callable[[nn.Module, Any], float] | Runtime | None = None
    per_cost: bool | None = None

    def __post_init__(self) -> None:
        for name in _UNITS:
            value: Any = getattr(self, name)
            if isinstance(value, Real) and not isinstance(value, bool) and not 0 < cast(Any, value) < 1:
                raise ConfigError(
                    f"target.{name} must be between 0 and 1 as the fraction to keep, or an amount such as "
                    f"{_UNITS[name][1]!r}; got {shown(value)}"
                )
        check(self, "target")
        given = {k: getattr(self, k) for k in get_args(Quantity) if getattr(self, k) is not None}
        if len(given) != 1:
            raise ConfigError(
                f"give one target, of macs, params, structures, latency or memory; got {given or 'none'}"
            )
        if isinstance(value := getattr(self, self.of), str):
            _parsed(self.of, value)
        if self.of not in _UNITS and self.batch is not None:
            raise ConfigError(f"target.batch is for latency and memory, not for {self.of}")
        if self.of != "latency" and self.runtime is not None:
            raise ConfigError(f"target.runtime is for latency, not for {self.of}")

    @cached_property
    def of(self) -> Quantity:
        """What is counted."""
        return next(name for name in get_args(Quantity) if getattr(self, name) is not None)

    @property
    def keep(self) -> float:
        """The fraction of it that is to be left.

        Raises:
            ConfigError: the target is an amount.
        """
        if isinstance(value := getattr(self, self.of), str):
            raise ConfigError(f"the target is {value} of {self.of}, and no fraction")
        return float(value)

    @property
    def weighs(self) -> bool:
        """Whether the host's scores are weighed by what a structure costs."""
        return self.of in _UNITS if self.per_cost is None else self.per_cost

    def at_most(self, before: float) -> float:
        """How much may be left where there was so much: a number, seconds, or bytes."""
        value = getattr(self, self.of)
        return _parsed(self.of, value) if isinstance(value, str) else before * float(value)

    def __str__(self) -> str:
        value = getattr(self, self.of)
        return f"{self.of} to {value if isinstance(value, str) else f'{100 * value:.3g} %'}"


def _parsed(of: str, text: str) -> float:
    """An amount in seconds or bytes.

    Raises:
        ConfigError: it is none.
    """
    units, example = _UNITS[of]
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*([^\W\d]+)\s*", text, re.IGNORECASE)
    unit = found and units.get(found[2].lower())
    if not found or not unit or not 0 < float(found[1]) < math.inf:
        raise ConfigError(
            f"target.{of} is an amount such as {example!r} (in {', '.join(units)}), not {text!r}"
        )
    return float(found[1]) * unit


def amount(of: Quantity, value: float) -> str:
    """A number of something, in words: "12.3 ms of latency"."""
    if of == "latency":
        return f"{1000 * value:.4g} ms of latency"
    if of == "memory":
        return f"{value / 2**20:.4g} MiB of memory"
    return f"{value:,.0f} {of}"


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
    return statistics.median(passes(model, example_inputs, repeats=repeats, warmup=warmup))


def memory(model: nn.Module, example_inputs: Any) -> int:
    """Peak bytes of a forward pass without gradients: weights, inputs and what is alive of the activations.

    Raises:
        ConfigError: no model or no inputs are given.
        GraphError: the model does not run on these inputs.
    """
    return MemoryModel(checked(model, nn.Module, "model"), as_inputs(example_inputs)).now


def batched(example_inputs: Any, batch: int | None) -> Any:
    """Example inputs in a batch of this size: tensors whose first dimension is the batch are repeated along it."""
    sizes: list[int] = []
    if batch is None:
        return example_inputs

    def repeated(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] == 0:
            return tensor
        sizes.append(tensor.shape[0])
        if tensor.shape[0] != sizes[0]:
            return tensor
        return torch.cat([tensor] * -(-batch // sizes[0]))[:batch].contiguous()

    return mapped(example_inputs, repeated)


class CostModel:
    """Predicts the cost after a removal from the widths alone.

    A tensor that keeps given fractions of its dimensions keeps their product of its parameters, and a product of
    tensors keeps the fractions of all widths along its axes (see `counting`). Exact for layers; for products of
    activations, such as attention, as good as their widths can be followed, until the model is counted again.

    Args:
        model: the model.
        example_inputs: see `Pruner`.
        structures: what can be removed.
        target: latency or memory are predicted where it is one of these.
        like: the costs before a removal, with what has been learned of the latency.

    Attributes:
        now: the cost at the last count.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        structures: StructureSet,
        target: Target | None = None,
        like: CostModel | None = None,
    ) -> None:
        self._latency: LatencyModel | None = None
        self._memory: MemoryModel | None = None
        if target is not None and target.of == "latency":
            inputs, before = batched(example_inputs, target.batch), None if like is None else like._latency
            runtime = as_runtime(target.runtime)
            self._latency = LatencyModel(model, inputs, structures, runtime, before)
        if target is not None and target.of == "memory":
            self._memory = MemoryModel(model, batched(example_inputs, target.batch))
        self._numel = {name: p.numel() for name, p in model.named_parameters()}
        self._macs: dict[tuple[tuple[Place, float], ...], int] = {}  # makers → all products that have these
        products = count(model, example_inputs)
        for product in products:
            key = tuple(sorted(product.makers.items()))
            self._macs[key] = self._macs.get(key, 0) + product.macs
        self._structures = structures
        self.now = replace(
            Cost(sum(p.macs for p in products), _params(model), len(structures), measured=True),
            latency=None if self._latency is None else self._latency.now,
            memory=None if self._memory is None else self._memory.now,
        )
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
        kept = self._kept(removed)
        structures = self.now.structures - sum(int(mask.sum()) for mask in removed.values())
        share: dict[str, float] = {}
        for (tensor, _), left in kept.items():
            share[tensor] = share.get(tensor, 1.0) * left
        params = sum(self._numel.get(tensor, 0) * (1 - left) for tensor, left in share.items())
        macs = 0.0
        for makers, cost in self._macs.items():
            macs += cost * math.prod(kept[place] ** power for place, power in makers if place in kept)
        return Cost(
            round(macs),
            round(self.now.params - params),
            structures,
            latency=None if self._latency is None else self._latency.after(kept),
            memory=None if self._memory is None else self._memory.after(kept),
            measured=structures == self.now.structures,
        )

    def _kept(self, removed: Mapping[str, Tensor]) -> dict[Place, float]:
        """The fraction that is left of every place from which something goes."""
        gone: dict[Place, int] = {}
        for name, mask in removed.items():
            if bool(mask.any()):
                for place, number in self._count[name]:
                    gone[place] = gone.get(place, 0) + int(number[mask].sum())
        return {place: 1 - number / self._structures.sizes[place] for place, number in gone.items()}

    def step(self, name: str) -> int:
        """The step of a layer group's width below which narrower is not faster; 1 where it is not known."""
        return 1 if self._latency is None else self._latency.step(name)

    def try_out(self, removed: Mapping[str, Tensor]) -> Cost | None:
        """The cost once these are gone with the latency measured, not predicted; None where that cannot be done.

        What is learned makes later predictions better. The model is as it was afterwards.
        """
        if self._latency is None:
            return None
        picks = {
            name: self._structures.groups[name].ids[mask].tolist()
            for name, mask in removed.items()
            if mask.any()
        }
        self._latency.try_out(picks, self._kept(removed))
        return self.after(removed)

    def price(self, name: str, of: Quantity, gone: Mapping[str, Tensor]) -> float:
        """What one structure of a layer group costs in the network that is left when these are gone.

        At least 1, or a little of what a structure costs on average; of latency it is the average over a step.
        """
        whole = float(getattr(self.now, of))
        least = 1.0 if of not in _UNITS else 0.01 * whole / max(1, self.now.structures)
        live = (~gone[name]).nonzero().flatten()[: self.step(name) if of == "latency" else 1]
        with_it = {**gone, name: gone[name].index_fill(0, live, True)}
        before, after = (float(getattr(self.after(each), of)) for each in (gone, with_it))
        return max(least, (before - after) / max(1, live.numel()))

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
