"""Watching: reads, step by step, the figures by which self-rectifying judges, and keeps their averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from decay_pruning.decay import joint
from decay_pruning.fading import Fading
from decay_pruning.rectify import SelfRectifying
from decay_pruning.resistance import Parallel, Resistance, c_rate, of_gradient, worth
from decay_pruning.slices import Gradients, Reading, SliceBatch, Values
from decay_pruning.structures import Role, StructureSet


class Network(NamedTuple):
    """What there is to read."""

    structures: StructureSet
    parameters: Mapping[str, Tensor]
    optimizer: Optimizer
    roles: frozenset[Role]
    gradients: Gradients


class Watch:
    """Reads what `rectify` asks for around each optimizer step, and nothing else.

    Attributes:
        kept: the decaying weights as smooth pruning left them in the last step: what the next step starts from. They
            are read anew where this is None.
    """

    def __init__(self, rectify: SelfRectifying) -> None:
        self._rectify = rectify
        self.kept: Values | None = None
        self._kept_of: SliceBatch | None = None
        self._parallel: tuple[SliceBatch, Parallel] | None = None
        self._now: tuple[list[bool], list[Callable[[], Mapping[str, Tensor]]]] | None = None

    def keep(self, batch: SliceBatch, values: Values | None) -> None:
        """Remember the weights that the next step starts from."""
        self.kept, self._kept_of = values, batch

    def forget(self) -> None:
        """A step was given up: read everything anew."""
        self.kept = self._kept_of = self._parallel = self._now = None

    def rest(self) -> None:
        """Nothing is observed in this step."""
        self._now = None

    def kept_of(self, batch: SliceBatch) -> Values | None:
        """What is remembered of this batch."""
        return self.kept if self._kept_of is batch else None

    def wants(self, fading: Fading, step: int) -> list[bool] | None:
        """Which cohorts are observed in the step after `step`; None where none is."""
        watched = [self._rectify.observes(step + 1 - begun, steps) for begun, steps in fading.cohorts[0]]
        return watched if any(watched) else None

    def needs_weights(self, fading: Fading, step: int) -> bool:
        """Whether the weights have to be known that the step after `step` starts from."""
        return "step" in self._rectify.sources and self.wants(fading, step) is not None

    def before(
        self, fading: Fading, step: int, network: Network, gone: Mapping[str, Tensor], scale: Tensor | None
    ) -> None:
        """Before the optimizer's step: read gradients, which are `scale` times too large.

        Args:
            fading: the decaying structures.
            step: steps done.
            network: what to read.
            gone: layer group → bool, parallel to its ids: what decays or is held.
            scale: of a gradient scaler.
        """
        self._now = None
        wanted = self.wants(fading, step)
        if wanted is None:
            return
        batch, sources = fading.batch, self._rectify.sources
        gradients = network.gradients
        found: list[Callable[[], Mapping[str, Tensor]]] = []
        if "gradient" in sources:
            found.append(self._of_gradient(fading, network, gradients, scale))
        if "group" in sources:
            if self._parallel is None or self._parallel[0] is not batch:
                parallel = Parallel(network.structures, batch, gone, network.parameters, network.roles)
                self._parallel = batch, parallel
            c_len = self._parallel[1].later(gradients)
            found.append(lambda: {"c_len": c_len()})
        if "step" in sources and self.kept_of(batch) is None:
            self.keep(batch, batch.values(network.parameters))
        self._now = wanted, found

    def _of_gradient(
        self, fading: Fading, network: Network, gradients: Gradients, scale: Tensor | None
    ) -> Callable[[], Mapping[str, Tensor]]:
        """What gradients say, as they are now, when it is asked for."""
        batch, figures = fading.batch, self._rectify.figures
        rate = _learning_rates(batch, network)
        of_slice: Callable[[], Any]
        if figures == ("first_order",):
            product = batch.moments_per_slot_later(network.parameters, gradients, only_product=True)
            return lambda: {"first_order": (product()[0] if scale is None else product()[0] / scale).abs()}
        if figures == ("worth",) or not isinstance(rate, Tensor):
            of_slice = batch.moments_per_slot_later(network.parameters, gradients)
        else:
            moments = batch.moments_later(network.parameters, gradients)
            of_slice = lambda: [batch.per_slot(each) for each in _with_rates(moments(), rate)]  # noqa: E731

        def found() -> Mapping[str, Tensor]:
            ww, wg, gg, *weighed = of_slice()
            lr_wg = weighed[0] if weighed else wg if figures == ("worth",) else wg * rate
            if scale is not None:
                wg, gg, lr_wg = wg / scale, gg / scale**2, lr_wg / scale
            if figures == ("worth",):
                return {"worth": worth(ww, wg, fading.joint_start)}
            return of_gradient(ww, wg, gg, lr_wg, fading.joint_start, fading.steps_there)

        return found

    def after(self, fading: Fading, parameters: Mapping[str, Tensor]) -> tuple[Fading, Reading | None]:
        """After the optimizer's step: what it did to the decaying weights, and the averages with this step in them.

        Returns:
            the same structures, and what was read of their weights, which is valid until they change.
        """
        if self._now is None:
            return fading, None
        (wanted, earlier), self._now = self._now, None
        batch, reading, stepped = fading.batch, None, "step" in self._rectify.sources
        if stepped or not batch.whole:  # of shards, all is added up at once
            reading = batch.read(parameters, since=self.kept_of(batch) if stepped else None)
        found = {name: figure for figures in earlier for name, figure in figures().items()}
        if stepped:
            assert reading is not None and reading.grown is not None and reading.moved is not None
            found["c_rate"] = c_rate(
                joint(batch, reading.norms),
                batch.per_slot(reading.grown),
                batch.per_slot(reading.moved),
                fading.joint_start,
                fading.steps_there,
                self._rectify.rate_per,
            )
        return self._averaged(fading, wanted, found), reading

    def _averaged(self, fading: Fading, wanted: list[bool], found: Mapping[str, Tensor]) -> Fading:
        """All of a cohort have been observed as often."""
        figures = self._rectify.figures
        first = fading.first_of_cohorts
        seen = [int(n) + watched for n, watched in zip(fading.seen.numpy()[first], wanted, strict=True)]
        weights = [self._rectify.weight(max(n, 1)) * w for n, w in zip(seen, wanted, strict=True)]
        now = found[figures[0]][None] if len(figures) == 1 else torch.stack([found[name] for name in figures])
        mean = torch.lerp(fading.mean, now, fading.of_cohorts(weights))
        counts = np.array(seen)[fading.cohorts[1].numpy()]
        return fading.with_averages(mean, torch.from_numpy(counts))

    def averages(self, fading: Fading) -> Resistance:
        """The averages by name; NaN where a figure is not measured."""
        rows = dict(zip(self._rectify.figures, fading.mean, strict=True))
        none = torch.full(
            (fading.batch.slots,), torch.nan, dtype=fading.mean.dtype, device=fading.mean.device
        )
        return Resistance(*(rows.get(name, none) for name in Resistance._fields))


def _with_rates(moments: tuple[Tensor, Tensor, Tensor], rates: Tensor) -> Sequence[Tensor]:
    ww, wg, gg = moments
    return ww, wg, gg, wg * rates


def _learning_rates(batch: SliceBatch, network: Network) -> Tensor | float:
    """η of each slice, shape (slices,), or one number where all are the same."""
    groups = network.optimizer.param_groups
    if len(groups) == 1 and not isinstance(groups[0]["lr"], Tensor):
        return float(groups[0]["lr"])
    rate = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
    at_place = [rate.get(id(network.parameters[name]), 0.0) for name, _ in batch.places]
    return torch.tensor(at_place, dtype=batch.dtype, device=batch.device)[batch.slice_place]
