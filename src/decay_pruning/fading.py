"""The structures that decay at one time, as flat arrays, and how these are carried over when the membership changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decay_pruning.errors import ConfigError
from decay_pruning.slices import SliceBatch
from decay_pruning.structures import Picks, Place, StructureSet

#: Layer group, original index.
Key = tuple[str, int]


@dataclass(frozen=True)
class Fading:
    """All decaying structures: arrays parallel to the slots or slices of `batch`. Nothing here changes in place.

    Attributes:
        batch: their slices.
        begun: shape (slots,), int64, CPU: engine step before the first step of the decay.
        steps: shape (slots,), int64, CPU: N.
        start: shape (slices,): norm at the pick.
        mean: shape (figures, slots): running averages, in the order of `SelfRectifying.figures`.
        seen: shape (slots,), int64, CPU: observations in the averages.
        rectified: shape (slots,), bool, CPU: whether the structure can be released.
    """

    batch: SliceBatch
    begun: Tensor
    steps: Tensor
    start: Tensor
    mean: Tensor
    seen: Tensor
    rectified: Tensor

    @classmethod
    def of_pick(
        cls, batch: SliceBatch, norms: Tensor, step: int, steps: int, figures: int, rectified: bool
    ) -> Fading:
        """What is picked before `step`, to fade over `steps` steps; `norms` of its slices."""
        return cls(
            batch=batch,
            begun=torch.full((batch.slots,), step),
            steps=torch.full((batch.slots,), steps),
            start=norms,
            mean=torch.zeros(figures, batch.slots, device=batch.device, dtype=batch.dtype),
            seen=torch.zeros(batch.slots, dtype=torch.int64),
            rectified=torch.full((batch.slots,), rectified),
        )

    @cached_property
    def cohorts(self) -> tuple[list[tuple[int, int]], Tensor]:
        """Distinct (begun, N), and each slot's number among them."""
        pairs, number = torch.unique(torch.stack([self.begun, self.steps]), dim=1, return_inverse=True)
        return [(int(b), int(n)) for b, n in pairs.T.tolist()], number

    @cached_property
    def first_of_cohorts(self) -> Any:
        """The first slot of each cohort."""
        return np.unique(self.cohorts[1].numpy(), return_index=True)[1]

    @cached_property
    def joint_start(self) -> Tensor:
        """Norm of each structure at the pick, over all of its slices, shape (slots,)."""
        return self.batch.per_slot(self.start.square()).sqrt()

    @cached_property
    def steps_there(self) -> Tensor:
        """N of each, where the batch is."""
        return self.steps.to(self.batch.device)

    def of_cohorts(self, values: Sequence[float]) -> float | Tensor:
        """One value per cohort → one per slot; a plain number where all have the same."""
        if len(set(values)) == 1:
            return values[0]
        return torch.tensor(values, dtype=self.batch.dtype)[self.cohorts[1]].to(self.batch.device)

    def with_averages(self, mean: Tensor, seen: Tensor) -> Fading:
        """The same structures with newer averages."""
        newer = replace(self, mean=mean, seen=seen)
        kept = ("cohorts", "first_of_cohorts", "joint_start", "steps_there")  # what averages have no part in
        newer.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__})
        return newer

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors on the CPU."""
        names = ("begun", "steps", "start", "mean", "seen", "rectified")
        saved: dict[str, Any] = {name: getattr(self, name).detach().cpu().clone() for name in names}
        saved["picks"] = as_picks(self.batch.keys)
        return saved

    @classmethod
    def from_state(cls, batch: SliceBatch, state: Mapping[str, Any], figures: int) -> Fading:
        """From `state_dict()`, with a batch of its picks.

        Raises:
            ConfigError: a part has another shape or kind, or values that no decay has.
        """
        saved = {name: value for name, value in state.items() if name != "picks"}
        kinds = {"begun": torch.int64, "steps": torch.int64, "seen": torch.int64, "rectified": torch.bool}
        shapes = {"start": (batch.slices,), "mean": (figures, batch.slots)}
        for name, value in saved.items():
            right = isinstance(value, Tensor) and value.shape == shapes.get(name, (batch.slots,))
            if not right or value.dtype != kinds.get(name, value.dtype) or not bool(value.isfinite().all()):
                raise ConfigError(f"its part {name!r} does not fit what decays")
        if bool((saved["steps"] < 1).any()) or any(
            bool((saved[n] < 0).any()) for n in ("begun", "seen", "start")
        ):
            raise ConfigError("it has decays of no length, or from before the beginning")
        for name in ("start", "mean"):
            saved[name] = saved[name].to(batch.device, batch.dtype)
        return cls(batch=batch, **saved)


class Numbers:
    """One running number per structure and per place of the original model, to find them again in another batch."""

    def __init__(self, structures: StructureSet) -> None:
        sizes = [int(group.ids.max()) + 1 if len(group) else 0 for group in structures.groups.values()]
        offsets = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._offset = dict(zip(structures.groups, offsets, strict=False))
        self._place: dict[Place, int] = {place: i for i, place in enumerate(structures.sizes)}

    def carry(self, parts: list[Fading], batch: SliceBatch) -> Fading:
        """The figures of `parts` for the structures of `batch`, which are all among them."""
        keys = [key for part in parts for key in part.batch.keys]
        slot = _match(self._slots(keys), self._slots(batch.keys))
        at_slice = _match(torch.cat([self._slices(part.batch) for part in parts]), self._slices(batch))
        there = slot.to(batch.device)
        return Fading(
            batch=batch,
            begun=torch.cat([p.begun for p in parts])[slot],
            steps=torch.cat([p.steps for p in parts])[slot],
            start=torch.cat([p.start.to(batch.device) for p in parts])[at_slice.to(batch.device)],
            mean=torch.cat([p.mean.to(batch.device) for p in parts], dim=1)[:, there],
            seen=torch.cat([p.seen for p in parts])[slot],
            rectified=torch.cat([p.rectified for p in parts])[slot],
        )

    def _slots(self, keys: Iterable[Key]) -> Tensor:
        return torch.tensor([self._offset[name] + index for name, index in keys])

    def _slices(self, batch: SliceBatch) -> Tensor:
        place = torch.tensor([self._place[p] for p in batch.places])
        structure = self._slots(batch.keys)[batch.slice_slot.cpu()]
        return structure * len(self._place) + place[batch.slice_place.cpu()]


def _match(have: Tensor, want: Tensor) -> Tensor:
    """For each number wanted, its position in `have` (every one is there)."""
    sorted_have, order = have.sort()
    return order[torch.searchsorted(sorted_have, want)]


def as_keys(picks: Picks) -> list[Key]:
    """Layer group → indices, as (layer group, index)."""
    return [(name, index) for name, ids in picks.items() for index in ids]


def as_picks(keys: Iterable[Key]) -> dict[str, list[int]]:
    """The other way round, in ascending order."""
    picks: dict[str, list[int]] = {}
    for name, index in sorted(keys):
        picks.setdefault(name, []).append(index)
    return picks
