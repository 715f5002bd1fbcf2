"""Structures, their slices, and the only tensor arithmetic over them.

A *structure* is the smallest thing that can be removed: one channel, filter, neuron or head with every
parameter slice coupled to it. All structures that share a width form a *layer group*. A layer group lists,
for each tensor that it touches, which positions belong to which structure (a `Coupling`).

Everything is keyed by name and by the index in the original model; tensors are looked up when needed, because
they change under surgery, `.to()` and loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor

#: What is picked, released or removed: layer group name → original indices.
Picks = Mapping[str, Sequence[int]]
#: A tensor (or module attribute) and one of its dimensions.
Place = tuple[str, int]


class Role(StrEnum):
    """What a slice does for its structure."""

    ROW = "row"  #: weights that produce the structure: a filter, a neuron's row, an embedding column
    BIAS = "bias"  #: bias of the producer
    SCALE = "scale"  #: γ of a normalisation layer
    SHIFT = "shift"  #: β of a normalisation layer
    COLUMN = "column"  #: weights that consume the structure
    OTHER = "other"  #: a parameter that is cut with the structure and carries none of its strength (PReLU slope)
    BUFFER = "buffer"  #: running statistics
    ATTRIBUTE = "attribute"  #: an integer or a tuple on a module ("conv1.out_channels"), set to what is kept


#: Roles that are no parameters, so nothing decays in them.
NOT_PARAMETERS = frozenset({Role.BUFFER, Role.ATTRIBUTE})


@dataclass(frozen=True)
class Coupling:
    """The slices of one layer group in one tensor along one dimension.

    Attributes:
        tensor: name of the parameter or buffer, or the dotted path of a module attribute (`Role.ATTRIBUTE`).
            A tied parameter has one name: the first in `model.named_parameters()`.
        dim: dimension of the tensor (for a tuple attribute: index into the tuple; for an integer: 0).
        role: what these slices do.
        owner: shape (P,), int64: the row of the structure within its layer group (0 … S-1).
        position: shape (P,), int64: current positions along `dim`, parallel to `owner`. A structure can own
            several positions (after flatten), and several structures must not own the same one.
    """

    tensor: str
    dim: int
    role: Role
    owner: Tensor
    position: Tensor

    @property
    def place(self) -> Place:
        return self.tensor, self.dim


@dataclass(frozen=True)
class LayerGroup:
    """All structures that share a width.

    Attributes:
        name: the module (or bare parameter) that produces the width.
        ids: shape (S,), int64: the original index of each structure that is still there, ascending.
        couplings: every tensor, buffer and attribute that is cut with them.
        inexact: why removal changes the function by its nature (declared), or None where it is exact.
    """

    name: str
    ids: Tensor
    couplings: tuple[Coupling, ...]
    inexact: str | None = None

    def __len__(self) -> int:
        return int(self.ids.numel())

    def rows(self, ids: Iterable[int]) -> Tensor:
        """Rows (0 … S-1) of the structures with these original indices, in ascending order.

        Raises:
            KeyError: an index is not (or no longer) in this layer group.
        """
        wanted = torch.as_tensor(sorted(set(ids)), dtype=torch.int64)
        row = torch.searchsorted(self.ids, wanted)
        missing = row.eq(len(self)) | self.ids[row.clamp(max=len(self) - 1)].ne(wanted)
        if bool(missing.any()):
            raise KeyError(f"layer group {self.name!r} has no structure {wanted[missing].tolist()}")
        return row


@dataclass(frozen=True)
class StructureSet:
    """All structures of a model.

    Attributes:
        groups: layer groups by name, in the order of the model.
        unprunable: what cannot be pruned → the reason, in words for the user.
        sizes: current size of every place that a coupling touches.
    """

    groups: Mapping[str, LayerGroup]
    sizes: Mapping[Place, int]
    unprunable: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups.values())

    def kept(self, removed: Picks) -> dict[Place, Tensor]:
        """Current positions that stay at every place from which `removed` takes something.

        Returns:
            place → ascending int64 positions; places that lose nothing are absent.
        """
        drop: dict[Place, Tensor] = {}
        for name, ids in removed.items():
            group = self.groups[name]
            gone = torch.zeros(len(group), dtype=torch.bool)
            gone[group.rows(ids)] = True
            for c in group.couplings:
                mask = drop.setdefault(c.place, torch.zeros(self.sizes[c.place], dtype=torch.bool))
                mask[c.position[gone[c.owner]]] = True
        return {place: (~mask).nonzero().flatten() for place, mask in drop.items() if bool(mask.any())}

    def without(self, removed: Picks) -> StructureSet:
        """The structures that remain after surgery has removed `removed`, with positions renumbered."""
        kept = self.kept(removed)
        moved = {}
        for place, keep in kept.items():
            new = torch.full((self.sizes[place],), -1, dtype=torch.int64)
            new[keep] = torch.arange(keep.numel())
            moved[place] = new
        groups = {}
        for name, group in self.groups.items():
            stays = torch.ones(len(group), dtype=torch.bool)
            stays[group.rows(removed.get(name, ()))] = False
            row = stays.cumsum(0) - 1
            couplings = []
            for c in group.couplings:
                mine = stays[c.owner]
                position = c.position[mine]
                if c.place in moved:
                    position = moved[c.place][position]
                couplings.append(replace(c, owner=row[c.owner[mine]], position=position))
            groups[name] = replace(group, ids=group.ids[stays], couplings=tuple(couplings))
        sizes = {place: kept[place].numel() if place in kept else size for place, size in self.sizes.items()}
        return replace(self, groups=groups, sizes=sizes)


class _Sums:
    """Sums of values that share a segment, by padded gather: deterministic on every device, unlike scattering."""

    def __init__(self, segment: Tensor, count: int, device: torch.device) -> None:
        order = torch.argsort(segment, stable=True)
        sizes = torch.bincount(segment, minlength=count)
        width = int(sizes.max()) if count else 0
        first = sizes.cumsum(0) - sizes
        column = torch.arange(segment.numel()) - first[segment[order]]
        index = torch.full((count, width), segment.numel(), dtype=torch.int64)
        index[segment[order], column] = order
        self._index = index.to(device)

    def __call__(self, values: Tensor) -> Tensor:
        padded = torch.cat([values, values.new_zeros(1)])
        return padded[self._index].sum(1)


@dataclass(frozen=True)
class _Block:
    """Chosen positions along one dimension of one tensor with two or more dimensions."""

    tensor: str
    dim: int
    index: Tensor  # (P,) on the tensor's device
    #: crossings that belong to the same structure through a lower dimension:
    #: (that dimension, positions there, indices into `index`)
    holes: tuple[tuple[int, Tensor, Tensor], ...]

    def gather(self, tensor: Tensor) -> Tensor:
        """The chosen slices, crossings left out (zero), at least single precision."""
        chosen = tensor.index_select(self.dim, self.index)
        if chosen.dtype in (torch.float16, torch.bfloat16):
            chosen = chosen.float()
        for dim, at, here in self.holes:
            chosen.movedim((dim, self.dim), (0, 1))[at, here] = 0
        return chosen

    def others(self, ndim: int) -> list[int]:
        return [d for d in range(ndim) if d != self.dim]

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        chosen = tensor.index_select(self.dim, self.index)
        shape = [1] * tensor.ndim
        shape[self.dim] = -1
        scaled = chosen * factor.view(shape).to(chosen.dtype)
        for dim, at, here in self.holes:
            axes = ((dim, self.dim), (0, 1))
            scaled.movedim(*axes)[at, here] = chosen.movedim(*axes)[at, here]
        tensor.index_copy_(self.dim, self.index, scaled)


class SliceBatch:
    """Chosen structures as index maps, worked out once, and batched arithmetic over their slices.

    A *slot* is one chosen structure; a *slice* is one structure in one tensor along one dimension. Where a tensor
    holds a structure both along a lower and a higher dimension (x + f(x)), their crossing counts for the lower
    one only, so nothing is measured or scaled twice for one structure. Where rows of one structure cross columns
    of another, the crossing belongs to both.

    No method loops over structures; the work is a few kernels per tensor, and one-dimensional tensors (biases,
    norms) are handled all together.

    Args:
        structures: the current structures.
        picks: which of them.
        tensors: parameters by name. Couplings to anything else are left out.
        roles: the roles that take part. A layer group that has none of them takes part with all its parameters.
    """

    def __init__(
        self, structures: StructureSet, picks: Picks, tensors: Mapping[str, Tensor], roles: Iterable[Role]
    ) -> None:
        wanted = frozenset(roles)
        self.keys: list[tuple[str, int]] = []  #: (layer group, original index) of each slot
        found: dict[Place, list[tuple[Tensor, Tensor]]] = {}
        for name, ids in picks.items():
            group = structures.groups[name]
            rows = group.rows(ids)
            slot = torch.full((len(group),), -1, dtype=torch.int64)
            slot[rows] = torch.arange(rows.numel()) + len(self.keys)
            self.keys += [(name, int(i)) for i in group.ids[rows]]
            usable = [c for c in group.couplings if c.role not in NOT_PARAMETERS and c.tensor in tensors]
            for c in [c for c in usable if c.role in wanted] or usable:
                mine = slot[c.owner]
                chosen = mine >= 0
                if bool(chosen.any()):
                    found.setdefault(c.place, []).append((c.position[chosen], mine[chosen]))
        self.places = sorted(found, key=lambda place: (tensors[place[0]].ndim > 1, place))
        self.slots = len(self.keys)

        device = tensors[self.places[0][0]].device if self.places else torch.device("cpu")
        self.device = device
        self.dtype = torch.float32
        slice_slot, slice_place, of_position, sizes = [], [], [], []
        vectors: list[tuple[str, Tensor]] = []
        blocks: list[_Block] = []
        slots_at: dict[Place, tuple[Tensor, Tensor]] = {}
        count = 0
        for number, place in enumerate(self.places):
            name, dim = place
            position = torch.cat([p for p, _ in found[place]])
            slot = torch.cat([s for _, s in found[place]])
            order = torch.argsort(position)
            position, slot = position[order], slot[order]
            tensor = tensors[name]
            if tensor.dtype == torch.float64:
                self.dtype = torch.float64
            members, inverse = torch.unique(slot, return_inverse=True)
            slice_slot.append(members)
            slice_place.append(torch.full_like(members, number))
            of_position.append(inverse + count)
            count += members.numel()
            sizes.append(position.numel())
            if tensor.ndim == 1:
                vectors.append((name, position))
                continue
            holes = []
            for (other, lower), (at, theirs) in slots_at.items():
                if other == name:
                    row, here = theirs[:, None].eq(slot[None, :]).nonzero(as_tuple=True)
                    if row.numel():
                        holes.append((lower, at[row].to(tensor.device), here.to(tensor.device)))
            slots_at[place] = position, slot
            blocks.append(_Block(name, dim, position.to(tensor.device), tuple(holes)))
        self.slice_slot = torch.cat(slice_slot).to(device) if slice_slot else torch.zeros(0, dtype=torch.int64)
        self.slice_place = torch.cat(slice_place).to(device) if slice_place else torch.zeros(0, dtype=torch.int64)
        self.slices = count
        self._blocks = blocks
        self._vectors = [name for name, _ in vectors]
        offset = 0
        flat = []
        for name, position in vectors:
            flat.append(position + offset)
            offset += tensors[name].numel()
        self._flat = torch.cat(flat).to(device) if flat else torch.zeros(0, dtype=torch.int64, device=device)
        position_slice = torch.cat(of_position) if of_position else torch.zeros(0, dtype=torch.int64)
        self._position_slice = position_slice.to(device)
        self._sizes = [self._flat.numel(), *sizes[len(vectors) :]]
        self._slice_sums = _Sums(position_slice, count, device)
        self._slot_sums = _Sums(self.slice_slot.cpu(), self.slots, device)

    # -- measuring -------------------------------------------------------------------------------------------

    def norms(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """L2 norm of every slice, shape (slices,)."""
        parts = [self._vector_values(tensors).square()]
        for block in self._blocks:
            chosen = block.gather(tensors[block.tensor].detach())
            norm = torch.linalg.vector_norm(chosen, dim=block.others(chosen.ndim))
            parts.append(self._home(norm).square())
        return self._slice_sums(torch.cat(parts)).sqrt()

    def moments(
        self, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩ of every slice, each of shape (slices,); an absent b counts as zero."""
        a1 = self._vector_values(tensors)
        b1 = self._vector_values({n: self._or_zero(others.get(n), tensors[n]) for n in self._vectors})
        parts = [(a1 * a1, a1 * b1, b1 * b1)]
        for block in self._blocks:
            a = block.gather(tensors[block.tensor].detach())
            other = others.get(block.tensor)
            rest = block.others(a.ndim)
            aa = self._home(torch.linalg.vector_norm(a, dim=rest)).square()
            if other is None:
                parts.append((aa, torch.zeros_like(aa), torch.zeros_like(aa)))
                continue
            b = block.gather(other.detach())
            bb = self._home(torch.linalg.vector_norm(b, dim=rest)).square()
            parts.append((aa, self._home((a * b).sum(rest)), bb))
        aa, ab, bb = (self._slice_sums(torch.cat(part)) for part in zip(*parts, strict=True))
        return aa, ab, bb

    def per_slot(self, values: Tensor) -> Tensor:
        """Sum over the slices of each structure: (slices,) → (slots,)."""
        return self._slot_sums(values)

    def moved(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the tensors have gone to another device, so that the index maps must be made anew."""
        return bool(self.places) and tensors[self.places[0][0]].device != self.device

    # -- changing --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scale_(self, tensors: Mapping[str, Tensor], factors: Tensor) -> None:
        """Multiply every slice by its factor, shape (slices,), in place."""
        vector, *rest = factors[self._position_slice].split(self._sizes)
        if self._vectors:
            whole = [tensors[name] for name in self._vectors]
            joined = torch.cat([t.detach().to(self.device, self.dtype) for t in whole])
            joined[self._flat] *= vector
            torch._foreach_copy_(whole, list(joined.split([t.numel() for t in whole])))
        for block, factor in zip(self._blocks, rest, strict=True):
            tensor = tensors[block.tensor]
            block.scale_(tensor, factor.to(tensor.device))

    @torch.no_grad()
    def zero_(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every slice to zero, in place (whatever it holds, infinities included)."""
        if self._vectors:
            whole = [tensors[name] for name in self._vectors]
            joined = torch.cat([t.detach().to(self.device, self.dtype) for t in whole])
            joined.index_fill_(0, self._flat, 0.0)
            torch._foreach_copy_(whole, list(joined.split([t.numel() for t in whole])))
        for block in self._blocks:
            tensors[block.tensor].index_fill_(block.dim, block.index, 0.0)

    # -- helpers ---------------------------------------------------------------------------------------------

    def _home(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)

    def _vector_values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if not self._vectors:
            return torch.zeros(0, device=self.device, dtype=self.dtype)
        return torch.cat([self._home(tensors[name].detach()) for name in self._vectors])[self._flat]

    @staticmethod
    def _or_zero(value: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if value is None else value
