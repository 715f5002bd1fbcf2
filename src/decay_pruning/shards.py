"""Shards: a model of which every process holds a part of each parameter (`fully_shard`, FSDP2).

Structures are found and scored on a plain copy of the model; what fades are the shards. A row of a structure lies in
one process, a column is spread over all. So each process sums over what it has, the sums are added up over all, and
everybody scales its own part by the same factors. Nothing that knows structures has to know this: a `batch` of
sharded parameters has the slices, and the numbers, that one of whole parameters would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decay_pruning.errors import ConfigError
from decay_pruning.lengths import Lengths
from decay_pruning.sharding import check_sharding, is_distributed, sharded_modules, whole
from decay_pruning.slices import Layout, Reading, SliceBatch, Values, dense
from decay_pruning.structures import Coupling, Picks, Role, StructureSet


class Shards(dict[str, Tensor]):
    """The parameters of a sharded model by name: distributed tensors, and what of each lies in this process.

    Attributes:
        model: the model that is sharded.
        mesh: the processes.
    """

    def __init__(self, model: nn.Module) -> None:
        for module in sharded_modules(model).values():
            module.reshard()  # a forward pass leaves the outermost parameters whole
        super().__init__(model.named_parameters())
        self.model = model
        check_sharding(model, self)
        self.mesh: Any = next(cast(Any, p).device_mesh for p in self.values() if is_distributed(p))
        #: Name → the dimension that is cut, the first position of the own part and its end.
        self._cut: dict[str, tuple[int, int, int]] = {}
        replicas = []
        for name, p in self.items():
            if is_distributed(p):
                kinds = cast(Any, p).placements
                replicas = [axis for axis, kind in enumerate(kinds) if kind.is_replicate()]
                for axis, kind in enumerate(kinds):
                    if kind.is_shard():
                        self._cut[name] = self._range(p, axis, kind.dim)
        #: In a grid of processes, of those that hold the same shards one speaks for all.
        self._speaks = all(self.mesh.get_local_rank(axis) == 0 for axis in replicas)
        self._waiting: list[list[Tensor]] = []  # what goes into the next message
        self._structures: tuple[StructureSet, StructureSet] | None = None

    def _range(self, p: Tensor, axis: int, dim: int) -> tuple[int, int, int]:
        each = -(-p.shape[dim] // self.mesh.size(axis))  # as `torch.chunk` does
        first = min(p.shape[dim], each * self.mesh.get_local_rank(axis))
        return dim, first, min(p.shape[dim], first + each)

    @property
    def groups(self) -> list[Any]:
        """The process groups along the axes of the mesh."""
        return [self.mesh.get_group(axis) for axis in range(self.mesh.ndim)]

    def local(self, tensors: Mapping[str, Tensor | None], names: Iterable[str]) -> dict[str, Tensor]:
        """What of these tensors (parameters, gradients) lies here; those that are absent are left out."""
        found = {}
        for name in names:
            if (tensor := tensors.get(name)) is not None:
                found[name] = cast(Any, tensor.detach()).to_local() if is_distributed(tensor) else tensor
        return found

    def structures(self, whole: StructureSet) -> StructureSet:
        """The structures with the positions that lie here, counted from the first of them."""
        if self._structures is None or self._structures[0] is not whole:
            groups = {
                name: replace(group, couplings=tuple(self._here(c) for c in group.couplings))
                for name, group in whole.groups.items()
            }
            self._structures = whole, replace(whole, groups=groups)
        return self._structures[1]

    def _here(self, coupling: Coupling) -> Coupling:
        dim, first, end = self._cut.get(coupling.tensor, (-1, 0, 0))
        if coupling.dim != dim:
            return coupling
        mine = coupling.position.ge(first) & coupling.position.lt(end)
        return replace(coupling, owner=coupling.owner[mine], position=coupling.position[mine] - first)

    def summed(self, values: Tensor) -> Tensor:
        """Added up over all processes, the same in each to the last bit."""
        return self.later(values)()

    def later(self, values: Tensor) -> Callable[[], Tensor]:
        """The same when it is asked for: all that waits until then goes into one message."""
        self._waiting.append(entry := [values])

        def found() -> Tensor:
            if any(entry is each for each in self._waiting):
                self._send()
            return entry[0]

        return found

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        values = [each[0] for each in waiting]
        here = torch.cat([v.flatten().to(self.mesh.device_type) for v in values])
        if not self._speaks:
            here = torch.zeros_like(here)
        for group in reversed(self.groups):
            dist.all_reduce(here, group=group)
        for each, own, total in zip(waiting, values, here.split([v.numel() for v in values]), strict=True):
            each[0] = total.view(own.shape).to(own.device, own.dtype)

    @torch.no_grad()
    def fill(self, plain: nn.Module) -> None:
        """Give a plain copy the values, gradients and buffers that the model has by now."""
        for name, mine in plain.named_parameters():
            p = self[name]
            mine.data.copy_(whole(p))
            mine.grad = None if p.grad is None else whole(p.grad).to(mine.device, copy=True)
        for name, value in self.model.named_buffers():
            path, _, leaf = name.rpartition(".")
            owner = plain.get_submodule(path)
            here = cast(Tensor, owner._buffers[leaf]).device
            owner._buffers[leaf] = self._of_first(whole(value)).to(here, copy=True)

    def _of_first(self, value: Tensor) -> Tensor:
        """The value that the first process has: running statistics differ."""
        here = value.detach().to(self.mesh.device_type, copy=True)
        for group in self.groups:
            dist.broadcast(here, src=dist.get_global_rank(group, 0), group=group)
        return here

    def check(self, structures: StructureSet) -> None:
        """All that a removal cuts is sharded.

        Raises:
            ConfigError: a parameter is kept whole in every process.
        """
        for group in structures.groups.values():
            for c in group.couplings:
                if c.tensor in self and not is_distributed(self[c.tensor]):
                    raise ConfigError(
                        f"{c.tensor!r} is left out of the sharding (ignored_params), and its layer is to be pruned: "
                        "shard it as well, or name the layer in the host's `ignored`"
                    )


def shards_of(model: nn.Module) -> Shards | None:
    """The shards of a model; None where its parameters are whole."""
    if sharded_modules(model) or any(is_distributed(p) for p in model.parameters()):
        return Shards(model)
    return None


# ------------------------------------------------------------------------------------------------ arithmetic


def batch(
    structures: StructureSet, picks: Picks, tensors: Mapping[str, Tensor], roles: Iterable[Role]
) -> SliceBatch:
    """Chosen structures of parameters, whole or sharded."""
    kind = ShardedBatch if isinstance(tensors, Shards) else SliceBatch
    return kind(structures, picks, tensors, roles)


def lengths(
    structures: StructureSet, groups: Iterable[str], tensors: Mapping[str, Tensor], roles: Iterable[Role]
) -> Lengths:
    """Lengths of whole layer groups of parameters, whole or sharded."""
    kind = ShardedLengths if isinstance(tensors, Shards) else Lengths
    return kind(structures, groups, tensors, roles)


def are_zero(gradients: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor]) -> bool:
    """Whether there are gradients, and all of them are zero, here and in all processes."""
    here = parameters.local(gradients, gradients) if isinstance(parameters, Shards) else gradients
    counts = [grad.count_nonzero() for g in here.values() if (grad := dense(g)) is not None]
    total = torch.stack([c.cpu() for c in counts]).sum() if counts else torch.ones((), dtype=torch.int64)
    return not bool(parameters.summed(total) if isinstance(parameters, Shards) else total)


class ShardedBatch(SliceBatch):
    """A batch over the shards of this process, with the slices that one over whole parameters has."""

    whole = False

    def __init__(
        self, structures: StructureSet, picks: Picks, tensors: Mapping[str, Tensor], roles: Iterable[Role]
    ) -> None:
        assert isinstance(tensors, Shards)
        roles = frozenset(roles)
        self._follow(Layout.of(structures, picks, tensors, roles), tensors)
        self._shards = tensors
        self._names = sorted({name for name, _ in self.places})
        mine = tensors.local(tensors, tensors)
        self._mine = SliceBatch(tensors.structures(structures), picks, mine, roles)
        number = {place: i for i, place in enumerate(self.places)}
        at = torch.tensor([number[place] for place in self._mine.places], dtype=torch.int64).to(self.device)
        place = at[self._mine.slice_place.to(self.device)]
        wanted, there = (p * self.slots + s for p, s in ((place, self._mine.slice_slot.to(self.device)),
                                                         (self.slice_place, self.slice_slot)))  # fmt: skip
        ascending, order = there.sort()
        self._number = order[torch.searchsorted(ascending, wanted)]  #: own slice → its number among all

    def _here(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        return self._shards.local(tensors, self._names)

    def _later(self, parts: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Sums of the own slices → sums of all, shape (parts, slices), when they are asked for."""
        every = torch.zeros(len(parts), self.slices, dtype=self.dtype, device=self.device)
        if self._number.numel():
            every[:, self._number] = torch.stack(list(parts)).to(self.device, self.dtype)
        return self._shards.later(every)

    def values(self, tensors: Mapping[str, Tensor]) -> Values:
        return self._mine.values(self._here(tensors))

    def as_values(self, flat: Tensor | None, blocks: Sequence[Tensor]) -> Values | None:
        return None  # what is saved is the same for all processes, and these are not

    @torch.no_grad()
    def read(self, tensors: Mapping[str, Tensor], since: Values | None = None) -> Reading:
        parts, flat = self._mine._squares(self._here(tensors), since)
        squares, *rest = self._later(parts if since is not None else parts[:1])()
        return Reading(squares.sqrt_(), flat, *rest)

    @torch.no_grad()
    def moments(
        self, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.moments_later(tensors, others)()

    @torch.no_grad()
    def moments_later(
        self, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor | None]
    ) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        sums = self._later(self._mine.moments(self._here(tensors), self._here(others)))

        def found() -> tuple[Tensor, Tensor, Tensor]:
            aa, ab, bb = sums()
            return aa, ab, bb

        return found

    @torch.no_grad()
    def scale_(
        self, tensors: Mapping[str, Tensor], now: Reading, factors: Tensor, *, keep: bool = False
    ) -> Values | None:
        own = factors[self._number].to(self._mine.device, self._mine.dtype)
        return self._mine.scale_(self._here(tensors), now, own, keep=keep)

    @torch.no_grad()
    def zero_(self, tensors: Mapping[str, Tensor]) -> None:
        self._mine.zero_(self._here(tensors))


class ShardedLengths(Lengths):
    """Lengths from the shards of this process and of all others."""

    def __init__(
        self,
        structures: StructureSet,
        groups: Iterable[str],
        tensors: Mapping[str, Tensor],
        roles: Iterable[Role],
    ) -> None:
        assert isinstance(tensors, Shards)
        self._shards = tensors
        mine = tensors.local(tensors, tensors)
        super().__init__(tensors.structures(structures), groups, mine, roles)

    def _squares(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        return self._shards.summed(super()._squares(self._shards.local(tensors, tensors)))

    @torch.no_grad()
    def later(self, tensors: Mapping[str, Tensor | None]) -> Callable[[], Tensor]:
        squares = self._shards.later(super()._squares(self._shards.local(tensors, tensors)))
        return lambda: squares().clamp_min(0).sqrt()
