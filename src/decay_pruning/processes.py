"""Processes that train one model together (DDP, FSDP2, gradients averaged by hand) decide alike or give up together.

What is decided comes from the first of them: a host can draw lots, or look at its own part of the data. What decisions
rest on (norms, resistance) is compared: where it differs, the model has fallen apart, and all of them say so.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from decay_pruning.checks import shown
from decay_pruning.errors import ConfigError
from decay_pruning.state import unwrapped
from decay_pruning.structures import StructureSet

_Any = TypeVar("_Any")
#: Relative difference above which figures are not those of one model.
_TOLERANCE = 1e-4


class Ranks:
    """The processes that train one model.

    Args:
        groups: process groups along the axes of their grid; none where a process trains alone.
        device: where messages have to be.
    """

    def __init__(self, groups: Sequence[Any] = (), device: str = "cpu") -> None:
        self._groups = [group for group in groups if dist.get_world_size(group) > 1]
        self._device = torch.device(device)

    @classmethod
    def of(cls, model: nn.Module, group: Any = None) -> Ranks:
        """Those that train this model, given as it is or in its wrapper."""
        ready = dist.is_available() and dist.is_initialized()
        if group is not None and not (ready and isinstance(group, dist.ProcessGroup)):
            raise ConfigError(
                "group must be a torch process group that this process is in, or None for all processes, got "
                f"{shown(group)}"
            )
        if not ready:
            return cls()
        if group is None:
            group = getattr(model, "process_group", None) or dist.group.WORLD
        gpu = "nccl" in dist.get_backend(group)
        return cls([group], "cuda" if gpu else "cpu")

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return bool(self._groups)

    def first(self, value: _Any) -> _Any:
        """The value that the first process has, in all."""
        for group in self._groups:
            box = [value]
            dist.broadcast_object_list(
                box, src=dist.get_global_rank(group, 0), group=group, device=self._device
            )
            value = box[0]
        return value

    def every(self, value: _Any) -> list[_Any]:
        """The values of all processes, in all."""
        values = [value]
        for group in self._groups:
            found: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(found, values, group=group)
            values = [each for some in found for each in some]
        return values

    def alike(self, figures: Tensor) -> Tensor:
        """The first process's figures of what is the same in all.

        Raises:
            ConfigError: it is not the same; raised in all processes.
        """
        if not self._groups or not figures.numel():
            return figures
        mine = figures.detach().to(self._device, torch.float64)
        off = mine.new_zeros(1)
        for group in self._groups:
            rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group) + 1)][1:]
            dist.all_gather(rows, mine, group=group)
            off = torch.maximum(off, torch.stack([_distance(row, rows[0]) for row in rows]).max())
            mine = rows[0]
            dist.all_reduce(off, op=dist.ReduceOp.MAX, group=group)
        if float(off) > _TOLERANCE:
            raise ConfigError(
                "the processes hold different weights or gradients, so that they would prune different networks: wrap "
                "the model in DistributedDataParallel, or average its gradients over all processes before "
                "optimizer.step(). Where each trains a model of its own, build the pruner with "
                "group=dist.new_subgroups(1)[0]"
            )
        return mine.to(figures.device, figures.dtype)

    def check(self, structures: StructureSet, *beside: object) -> None:
        """All have found the same structures, and ask for the same.

        Raises:
            ConfigError: they have not; raised in all processes.
        """
        if not self._groups:
            return
        seen = hashlib.sha256(repr(beside).encode())
        for name, group in structures.groups.items():
            seen.update(repr((name, group.ids.tolist())).encode())
            for c in group.couplings:
                seen.update(repr((c.place, c.owner.tolist(), c.position.tolist())).encode())
        if len(set(self.every(seen.hexdigest()))) > 1:
            raise ConfigError(
                "the processes have different models, example inputs or settings: build the pruner in all of them from "
                "the same. Where each trains a model of its own, build it with group=dist.new_subgroups(1)[0]"
            )


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Largest relative difference; what is no number equals itself."""
    a, b = (t.nan_to_num(nan=-1.0, posinf=1e30, neginf=-1e30) for t in (a, b))
    return ((a - b).abs() / torch.maximum(a.abs(), b.abs()).clamp_min(1e-30)).max()


def outdate(model: nn.Module) -> None:
    """Wrappers that were made around a model before it was cut do not average its gradients any more: say so."""

    def stale(*_: Any) -> None:
        raise ConfigError(
            "structures were removed since this DistributedDataParallel was made, and it does not average the "
            "gradients of what is left: make a new one of the same model, or build the pruner with "
            "removal='at finish', where nothing is cut before finish()"
        )

    for each in [o for o in gc.get_objects() if type(o) is DistributedDataParallel]:
        if any(unwrapped(module) is model for module in each.module.modules()):
            each.register_forward_pre_hook(stale)
