"""Norms of all structures of whole layer groups at once, through whole tensors: no index per element."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decay_pruning.slices import Sums, dense, taking_part
from decay_pruning.structures import Role, StructureSet


@dataclass(frozen=True)
class _Crossing:
    """Where one structure lies along several dimensions, so that these elements are not counted once for each.

    Attributes:
        dims: those dimensions, ascending.
        index: which of the stacked tensors, and the position along each of these dimensions; parallel tensors.
    """

    dims: tuple[int, ...]
    index: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Stack:
    """Tensors of one shape, measured together.

    Attributes:
        names: of the tensors.
        dims: dimensions along which structures lie, ascending.
        crossings: by their last dimension, ascending.
        values: how many `squares` returns.
    """

    names: tuple[str, ...]
    dims: tuple[int, ...]
    crossings: tuple[_Crossing, ...]
    values: int

    def squares(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Squared norm of every position along each dimension, each followed by what its crossings take back."""
        whole = torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]
        if whole.dtype in (torch.float16, torch.bfloat16):
            whole = whole.float()
        inner = _norm(whole, [d for d in range(1, whole.ndim) if d - 1 not in self.dims])
        axis = {dim: i + 1 for i, dim in enumerate(self.dims)}
        found = []
        for dim in self.dims:
            found.append(_norm(inner, [axis[d] for d in self.dims if d != dim]).square().flatten())
            for crossing in [c for c in self.crossings if c.dims[-1] == dim]:
                there = _norm(inner, [axis[d] for d in self.dims if d not in crossing.dims])
                found.append((-1) ** (len(crossing.dims) - 1) * there[crossing.index].square())
        return found


class Lengths:
    """L2 norms of every structure of some layer groups, of their parameters or of anything in the same shapes.

    An element that belongs to one structure along two dimensions counts once, as in `SliceBatch`.

    Args:
        structures: the current structures.
        groups: names of the layer groups.
        tensors: parameters by name. Couplings to anything else are left out.
        roles: the roles that take part. A layer group that has none of them takes part with all its parameters.
    """

    def __init__(
        self,
        structures: StructureSet,
        groups: Iterable[str],
        tensors: Mapping[str, Tensor],
        roles: Iterable[Role],
    ) -> None:
        wanted = frozenset(roles)
        self.groups = list(groups)
        sizes = [len(structures.groups[name]) for name in self.groups]
        starts = [0, *itertools.accumulate(sizes)]
        self.first = dict(zip(self.groups, starts, strict=False))  #: layer group → its first row
        self.rows = starts[-1]
        owners: dict[str, dict[int, Tensor]] = {}  # tensor → dimension → row of each position, or -1
        for name in self.groups:
            for c in taking_part(structures.groups[name], tensors, wanted):
                size = tensors[c.tensor].shape[c.dim]
                row = owners.setdefault(c.tensor, {}).setdefault(c.dim, torch.full((size,), -1))
                row[c.position] = c.owner + self.first[name]
        found = [tensors[name] for name in owners]
        self.device = found[0].device if found else torch.device("cpu")
        double = any(t.dtype == torch.float64 for t in found)
        self.dtype = torch.float64 if double else torch.float32
        alike: dict[tuple[object, ...], list[str]] = {}
        for name, at in owners.items():
            t = tensors[name]
            alike.setdefault((t.shape, t.dtype, t.device, tuple(sorted(at))), []).append(name)
        self._stacks: list[_Stack] = []
        segments = [torch.zeros(0, dtype=torch.int64)]
        for names in alike.values():
            dims, crossings, before = tuple(sorted(owners[names[0]])), [], len(segments)
            for dim in dims:
                segments += [owners[name][dim] for name in names]
                for lower in _subsets([d for d in dims if d < dim]):
                    met = [_meeting([owners[name][d] for d in (*lower, dim)]) for name in names]
                    if not any(rows.numel() for rows, _ in met):
                        continue
                    segments += [rows for rows, _ in met]
                    number = [torch.full_like(rows, i) for i, (rows, _) in enumerate(met)]
                    index = torch.cat([torch.cat(number)[None], torch.cat([at for _, at in met], dim=1)])
                    crossings.append(_Crossing((*lower, dim), tuple(index.to(self.device))))
            values = sum(each.numel() for each in segments[before:])
            self._stacks.append(_Stack(tuple(names), dims, tuple(crossings), values))
        self._sums = Sums(torch.cat(segments), self.rows, self.device)

    @torch.no_grad()
    def __call__(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """L2 norm of every structure, shape (rows,): layer group by layer group. An absent tensor counts as zero."""
        return self._squares(tensors).clamp_min_(0).sqrt_()

    def later(self, tensors: Mapping[str, Tensor | None]) -> Callable[[], Tensor]:
        """The norms as the tensors are now, when they are asked for: what is sharded is added up then."""
        found = self(tensors)
        return lambda: found

    def _squares(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        parts: list[Tensor] = []
        for stack in self._stacks:
            given = [dense(tensors.get(name)) for name in stack.names]
            some = next((t for t in given if t is not None), None)
            if some is None:
                parts.append(torch.zeros(stack.values, dtype=self.dtype, device=self.device))
                continue
            found = stack.squares([torch.zeros_like(some) if t is None else t for t in given])
            parts += [each.to(self.device, self.dtype) for each in found]
        if not parts:
            return torch.zeros(self.rows, dtype=self.dtype, device=self.device)
        return self._sums(torch.cat(parts))


def _norm(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """L2 norm over these dimensions; over none of them the tensor itself."""
    return torch.linalg.vector_norm(tensor, dim=tuple(dims)) if dims else tensor


def _subsets(dims: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All but the empty one."""
    for count in range(1, len(dims) + 1):
        yield from itertools.combinations(dims, count)


def _meeting(owners: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Where all of these give the same row: the rows, shape (M,), and the position in each of them, shape (n, M)."""
    rows = owners[0]
    at = rows.ge(0).nonzero().T
    rows = rows[at[0]]
    for owner in owners[1:]:
        left, right = rows[:, None].eq(owner[None, :]).nonzero(as_tuple=True)
        rows, at = rows[left], torch.cat([at[:, left], right[None]])
    return rows, at
