"""The latency of a model, now and after a removal: a table says how it changes, the whole model how much it is."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from decay_pruning import surgery
from decay_pruning.errors import DecayPruningError
from decay_pruning.ranks import agreed
from decay_pruning.speed._runtime import Runtime
from decay_pruning.speed._table import Table
from decay_pruning.speed._works import Use, uses
from decay_pruning.structures import Picks, Place, Role, StructureSet

logger = logging.getLogger("decay_pruning")

#: How far a measured time may bend the table's: what is beyond is noise.
_BENDS = (0.25, 4.0)
#: Predictions that change the time by less than this tell nothing about the bend.
_TELLING = 0.02


class LatencyModel:
    """Predicts the latency after a removal.

    now · (the table's sum after / the table's sum now) ^ bend: as a model shrinks, its layers and its overheads do not
    do so alike, and the bend is what makes up for that. It is found by timing the model cut as it would be.

    Attributes:
        now: seconds of a forward pass, measured.
        bend: 1 until a trial has told better.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        structures: StructureSet,
        runtime: Runtime,
        like: LatencyModel | None = None,
    ) -> None:
        self._model, self._inputs, self._structures, self._runtime = (
            model,
            example_inputs,
            structures,
            runtime,
        )
        device = next(model.parameters()).device
        self.table: Table = (
            like.table if like is not None and like.table.device == device else Table(runtime, device)
        )
        self.bend: float = like.bend if like is not None else 1.0
        self._uses = uses(model, example_inputs)
        self._seen: dict[tuple[int, tuple[float, ...]], float] = {}
        self._trials: dict[frozenset[tuple[Place, float]], float] = {}
        self._steps: dict[str, int] = {}
        self.now = agreed(lambda: runtime.whole(model, example_inputs))
        self._sum = self._total({})
        self.table.save()

    def after(self, kept: Mapping[Place, float]) -> float:
        """Seconds when places keep only a fraction of theirs."""
        if all(fraction == 1.0 for fraction in kept.values()):
            return self.now
        tried = self._trials.get(frozenset(kept.items()))
        if tried is not None:
            return tried
        return self.now * max(self._total(kept) / self._sum, 1e-9) ** self.bend if self._sum else self.now

    def step(self, name: str) -> int:
        """The step of a layer group's width below which narrower is not faster: that of the costliest work with it."""
        if name not in self._steps:
            places = {
                c.place for c in self._structures.groups[name].couplings if c.role is not Role.ATTRIBUTE
            }
            self._steps[name] = self._step(places)
            self.table.save()
        return self._steps[name]

    def try_out(self, removed: Picks, kept: Mapping[Place, float]) -> float | None:
        """Time the model as it would be without these, and learn from it; None where it cannot be cut for a trial."""
        seconds = agreed(lambda: self._cut_and_timed(removed))
        if seconds is None:
            return None
        plain = self._total(kept) / self._sum if self._sum else 1.0
        if 0 < plain < 1 - _TELLING and 0 < seconds < self.now:
            self.bend = min(max(math.log(seconds / self.now) / math.log(plain), _BENDS[0]), _BENDS[1])
        self._trials[frozenset(kept.items())] = seconds
        self.table.save()
        return seconds

    # -- inside ----------------------------------------------------------------------------------------------

    def _total(self, kept: Mapping[Place, float]) -> float:
        return sum(use.times * self._seconds(number, use, kept) for number, use in enumerate(self._uses))

    def _seconds(self, number: int, use: Use, kept: Mapping[Place, float]) -> float:
        key = number, use.sizes(kept)
        if key not in self._seen:
            self._seen[key] = self.table.seconds(use.work, key[1])
        return self._seen[key]

    def _step(self, places: set[Place]) -> int:
        """Of the costliest product along a size that these places make; 1 where no product is wide along it."""
        found: list[tuple[float, int, int]] = []
        for number, use in enumerate(self._uses):
            if use.work.kind in ("convolution", "matmul"):
                cost = use.times * self._seconds(number, use, {})
                found += [(cost, number, i) for i, m in enumerate(use.makers) if places & m.keys()]
        if not found:
            return 1
        dearest = max(cost for cost, _, _ in found)
        return max(self.table.step(self._uses[n].work, i) for cost, n, i in found if cost >= dearest / 2)

    def _cut_and_timed(self, removed: Picks) -> float | None:
        try:
            with torch.no_grad():
                put_back = surgery.shrink(self._model, self._structures.kept(removed))
                try:
                    return self._runtime.whole(self._model, self._inputs)
                finally:
                    put_back()
        except (DecayPruningError, RuntimeError, ValueError, IndexError) as error:
            logger.info("no trial of the pruned model's latency: %s", error)
            return None
