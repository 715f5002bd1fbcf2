"""What a model costs, and what it will cost when picked structures are gone.

1 MAC (multiply-accumulate) = 2 FLOPs. MACs are counted by `torch.utils.flop_counter` on the example inputs: give a
batch of one to get the figure that papers print.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from decay_pruning.errors import ConfigError
from decay_pruning.structures import Picks, Place, StructureSet
from decay_pruning.surgery import call, untouched


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates for the example inputs, parameters, and removable structures."""

    macs: int
    params: int
    structures: int = 0


@dataclass(frozen=True)
class Target:
    """What is to be left: exactly one of three fractions of the original model, each in (0, 1).

    >>> Target(macs=0.5).of, Target(params=0.1).keep
    ('macs', 0.1)

    Raises:
        ConfigError: none or several are given, or one is not in (0, 1).
    """

    macs: float | None = None
    params: float | None = None
    structures: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise ConfigError(f"give one target, of macs, params or structures; got {given or 'none'}")
        [(name, keep)] = given.items()
        if not 0 < keep < 1:
            raise ConfigError(f"target.{name} is the fraction to keep, between 0 and 1; got {keep}")

    @property
    def of(self) -> str:
        """What is counted: "macs", "params" or "structures"."""
        return next(name for name, value in vars(self).items() if value is not None)

    @property
    def keep(self) -> float:
        """The fraction of it that is to be left."""
        return float(getattr(self, self.of))


def measure(model: nn.Module, example_inputs: Any) -> Cost:
    """MACs and parameters of a model as it is."""
    return Cost(macs=sum(_macs(model, example_inputs).values()), params=_params(model))


def latency(model: nn.Module, example_inputs: Any, *, repeats: int = 20, warmup: int = 3) -> float:
    """Median seconds of a forward pass in evaluation mode, on the device that the model is on."""
    times = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(warmup + repeats):
                start = time.perf_counter()
                call(model, example_inputs)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
    finally:
        for module, mode in modes:
            module.training = mode
    return statistics.median(times[warmup:])


class CostModel:
    """Predicts the cost after a removal from the widths alone.

    The MACs of a convolution or linear layer are proportional to the number of its weights, so a tensor that keeps
    given fractions of its dimensions keeps their product of its MACs and parameters. What is not tied to a weight
    (attention products) counts as constant until it is measured again.

    Attributes:
        now: the cost at the last measurement.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, structures: StructureSet) -> None:
        by_module = _macs(model, example_inputs)
        names = {id(p): name for name, p in model.named_parameters()}
        self._numel = {name: p.numel() for name, p in model.named_parameters()}
        self._macs: dict[str, float] = {}
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if path in by_module and isinstance(weight, nn.Parameter) and weight.ndim > 1:
                name = names[id(weight)]
                self._macs[name] = self._macs.get(name, 0.0) + by_module[path] / weight.numel()
        self.now = Cost(sum(by_module.values()), _params(model), len(structures))
        self._structures = structures
        self._count = {
            name: [
                (c.place, torch.bincount(c.owner, minlength=len(group)))
                for c in group.couplings
                if c.tensor in self._numel
            ]
            for name, group in structures.groups.items()
        }

    def after(self, removed: Mapping[str, Tensor]) -> Cost:
        """Cost once these are gone: layer group → bool, parallel to its ids."""
        gone: dict[Place, int] = {}
        structures = self.now.structures
        for name, mask in removed.items():
            structures -= int(mask.sum())
            for place, count in self._count[name]:
                gone[place] = gone.get(place, 0) + int(count[mask].sum())
        share: dict[str, float] = {}
        for place, number in gone.items():
            share[place[0]] = share.get(place[0], 1.0) * (1 - number / self._structures.sizes[place])
        params, macs = float(self.now.params), float(self.now.macs)
        for name, kept in share.items():
            lost = self._numel[name] * (1 - kept)
            params -= lost
            macs -= lost * self._macs.get(name, 0.0)
        return Cost(round(macs), round(params), structures)

    def uses(self, tensor: str) -> float:
        """MACs per element of a weight: in a convolution, the positions of its output; 0 for what is not multiplied."""
        return self._macs.get(tensor, 0.0)

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


def _macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs by module path, each without those of its children; "" is the model itself."""
    paths = {name for name, _ in model.named_modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # what it does in one kernel would not be counted
    try:
        with untouched(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    total = {"": counter.get_total_flops()}
    for key, ops in counter.get_flop_counts().items():
        path = key.partition(".")[2]  # the first part is the class of the model
        if path in paths and path:
            total[path] = sum(ops.values())
    own = dict(total)
    for path, flops in total.items():
        if path:
            parent = path.rpartition(".")[0]
            while parent and parent not in own:
                parent = parent.rpartition(".")[0]
            own[parent] -= flops
    return {path: flops // 2 for path, flops in own.items()}
