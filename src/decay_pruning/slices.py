"""The only tensor arithmetic over structures: norms, inner products and scaling of slices, as few batched kernels.

A `SliceBatch` works on chosen structures through index maps that are made once. `Lengths` measures all structures of
whole layer groups, through whole tensors and without an index per element.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decay_pruning.structures import (
    NOT_PARAMETERS,
    Coupling,
    LayerGroup,
    Picks,
    Place,
    Role,
    StructureSet,
)


class Gradients(dict[str, "Tensor | None"]):
    """The gradients of a step by name of the parameter, and what several batches have read of them and of the weights.

    Attributes:
        joined: names of small tensors, dtype → the weights and their gradients, each joined to one vector.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__({name: p.grad for name, p in parameters.items()})
        self.joined: dict[tuple[tuple[str, ...], torch.dtype], tuple[Tensor, Tensor]] = {}


class Values(NamedTuple):
    """The elements of all slices of a batch as they once were: of the small tensors together, of each large one."""

    flat: Tensor | None
    blocks: list[Tensor]


class Reading(NamedTuple):
    """What a batch has read, valid until it reads again.

    The last two are there where it was asked what has changed since earlier values a: now it is b.
    """

    norms: Tensor  #: ‖b‖ of every slice, shape (slices,)
    flat: _Joined | None
    grown: Tensor | None = None  #: ‖b‖² − ‖a‖² of every slice, shape (slices,)
    moved: Tensor | None = None  #: ‖b − a‖² of every slice, shape (slices,)


#: Tensors up to this many elements are handled all together, element by element; larger ones one by one, whole slices
#: at a time. The first saves kernel launches, which is what counts on a GPU; the second index maps and memory traffic.
_SMALL = {"cpu": 2**16, "gpu": 2**24}


class Sums:
    """Sums of values that share a segment, one after the other: deterministic on every device, unlike scattering.

    Args:
        segment: shape (n,), int64: the segment of each value, or -1 for none.
        count: how many segments there are.
        device: where the values are.
    """

    def __init__(self, segment: Tensor, count: int, device: torch.device) -> None:
        ends = torch.bincount(segment + 1, minlength=count + 1).cumsum(0)  # the first ones belong to none
        self._order = torch.argsort(segment, stable=True)[ends[0] :].to(device)
        self._offsets = (ends - ends[0]).to(device)

    def __call__(self, values: Tensor) -> Tensor:
        """(n, …) → (count, …)."""
        ordered = values.index_select(0, self._order)
        return torch.segment_reduce(ordered, "sum", offsets=self._offsets, axis=0, unsafe=True)


@dataclass(frozen=True)
class _Chosen:
    """The chosen positions of one place while a batch is made: parallel tensors of shape (P,), and where a lower
    dimension of the same tensor holds chosen structures, too: (dimension, slot of each position there or -1)."""

    tensor: str
    dim: int
    position: Tensor
    slot: Tensor
    lower: tuple[tuple[int, Tensor], ...]


class _Joined(NamedTuple):
    """Small tensors as they were read: each as a vector, all joined, and the elements of the slices."""

    aliases: list[Tensor]
    joined: Tensor
    values: Tensor


class _Flat:
    """All slices in small tensors, as element indices into their concatenation.

    Slices are numbered in the order of `chosen`. Those of one pass (the n-th dimension of each tensor) share nothing.
    """

    def __init__(
        self, chosen: Sequence[_Chosen], tensors: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self.names = sorted({c.tensor for c in chosen})
        ends = torch.tensor([tensors[name].numel() for name in self.names]).cumsum(0).tolist()
        self._numels = [tensors[name].numel() for name in self.names]
        self._total = ends[-1]
        self._views: list[Tensor] = []
        self._strided: list[int] = []  # of `names`: not contiguous, so that their views are copies
        self._pointers: list[int] = []
        offset = dict(zip(self.names, [0, *ends], strict=False))
        elements, lengths, passes = [], [], [0, 0]
        for c in chosen:
            shape = tensors[c.tensor].shape
            every = torch.arange(shape.numel()).view(shape)
            mine = every.index_select(c.dim, c.position).movedim(c.dim, 0).reshape(c.position.numel(), -1)
            slot = c.slot[:, None].expand_as(mine)
            keep = torch.ones_like(mine, dtype=torch.bool)
            for (
                dim,
                slot_there,
            ) in c.lower:  # a crossing of a structure with itself belongs to the lower dimension
                stride = shape[dim + 1 :].numel()
                keep &= slot_there[mine // stride % shape[dim]] != slot
            members, number = torch.unique(c.slot, return_inverse=True)
            number = number[:, None].expand_as(mine)[keep]
            elements.append(mine[keep][torch.argsort(number, stable=True)] + offset[c.tensor])
            lengths.append(torch.bincount(number, minlength=members.numel()))
            rank = len(c.lower)
            passes += [0] * (rank + 2 - len(passes))
            passes[rank + 1] += elements[-1].numel()
        self._elements = torch.cat(elements).to(device)
        length = torch.cat(lengths)
        self._offsets = torch.cat([length.new_zeros(1), length.cumsum(0)]).to(device)
        self._slice = torch.repeat_interleave(torch.arange(length.numel(), dtype=torch.int32), length).to(
            device
        )
        self._passes = torch.tensor(passes).cumsum(0).tolist()
        self.slices = length.numel()
        self.size = self._elements.numel()
        # On a CPU fresh memory costs more than the arithmetic (page faults), so results go to memory that is kept.
        # A GPU's allocator keeps its memory by itself.
        self._kept: dict[str, Tensor] | None = {} if device.type == "cpu" else None
        self._alike: tuple[torch.dtype, torch.device] | None = None  # of all views
        self._key = tuple(self.names)
        self._by_slot: tuple[Tensor, Tensor] | None = None
        self._parts: tuple[Tensor, list[Tensor]] | None = None  # of the joined memory, tensor by tensor

    def read(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> _Joined:
        """The elements of all slices; valid until the next call."""
        aliases = self._aliases(tensors)
        joined = self._join(aliases, dtype, self._alike)
        return _Joined(aliases, joined, self._pick(joined, "a"))

    def read_others(
        self, others: Mapping[str, Tensor | None], tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The same elements of other tensors (gradients), zero where one is absent; valid until the next call."""
        return self._pick(self._join_others(others, tensors, dtype), "b")

    def moments_per_slot(
        self,
        others: Mapping[str, Tensor | None],
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        of_slice: Tensor,
        slots: int,
        only_product: bool,
    ) -> Tensor:
        """⟨a, b⟩ of each structure, or ⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩: (1 or 3, slots), in a few kernels."""
        order, offsets = self._slot_order(of_slice, slots)
        whole = others.joined.get((self._key, dtype)) if isinstance(others, Gradients) else None
        if whole is None:
            weights = self._join(self._aliases(tensors), dtype, self._alike)
            whole = weights, self._join_others(others, tensors, dtype, into="joined others")
            if isinstance(others, Gradients):
                others.joined[self._key, dtype] = whole
        a, b = (each.index_select(0, order) for each in whole)
        if only_product:
            return torch.segment_reduce(a.mul_(b), "sum", offsets=offsets[: slots + 1], unsafe=True)[None]
        products = torch.empty(3, a.numel(), dtype=dtype, device=a.device)
        for pair, out in zip(((a, a), (a, b), (b, b)), products, strict=True):
            torch.mul(*pair, out=out)
        return torch.segment_reduce(products.view(-1), "sum", offsets=offsets, unsafe=True).view(3, slots)

    def _slot_order(self, of_slice: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """The elements, slot by slot, and where each slot begins: three times over, one after the other."""
        if self._by_slot is None:
            slot = of_slice[: self.slices].cpu()[self._slice.cpu().long()]
            ends = torch.bincount(slot, minlength=slots).cumsum(0)
            ends = torch.cat([ends + i * self.size for i in range(3)])
            device = self._elements.device
            order = self._elements[torch.argsort(slot, stable=True).to(device)]
            self._by_slot = order, torch.cat([ends.new_zeros(1), ends]).to(device)
        return self._by_slot

    def _join_others(
        self,
        others: Mapping[str, Tensor | None],
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        into: str = "joined",
    ) -> Tensor:
        """Other tensors (gradients) as vectors, joined; zero where one is absent."""
        flat: list[Any] = [others.get(name) for name in self.names]
        if self._total <= _SMALL["cpu"] or self._kept is None:
            try:  # all there and dense: one call; a copy of this size is cheaper than looking at each
                return self._to(torch._C._nn.flatten_dense_tensors(flat), dtype)
            except (TypeError, RuntimeError):
                pass
        for i, name in enumerate(self.names):
            other = dense(flat[i])
            flat[i] = (torch.zeros_like(tensors[name]) if other is None else other).reshape(-1)
        return self._join(flat, dtype, into=into)

    def _to(self, joined: Tensor, dtype: torch.dtype) -> Tensor:
        device = self._elements.device
        return joined if joined.dtype == dtype and joined.device == device else joined.to(device, dtype)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """⟨a, b⟩ of each slice."""
        product = torch.mul(a, b, out=self._memory("product", a.numel(), a.dtype))
        return torch.segment_reduce(product, "sum", offsets=self._offsets, unsafe=True)

    def keep(self, now: _Joined) -> Tensor | None:
        """The elements as `scale_` left them in the tensors; None where a tensor holds them in another precision."""
        same = all(alias.dtype == now.joined.dtype for alias in now.aliases)
        return self._pick(now.joined, "before") if same else None

    def since(self, now: _Joined, before: Tensor) -> tuple[Tensor, Tensor]:
        """‖b‖² − ‖a‖² and ‖b − a‖² of each slice, from a, its elements `before`, to b, as it is now."""
        move = torch.sub(now.values, before, out=self._memory("b", before.numel(), before.dtype))
        both = torch.add(now.values, before, out=self._memory("both", before.numel(), before.dtype))
        return self.dot(move, both), self.dot(move, move)

    def scale_(self, tensors: Mapping[str, Tensor], now: _Joined, factors: Tensor) -> None:
        """Multiply each slice of what has just been read by its factor, and write it back."""
        each = torch.index_select(
            factors, 0, self._slice, out=self._memory("b", self._slice.numel(), factors.dtype)
        )
        for number, (begin, end) in enumerate(itertools.pairwise(self._passes)):
            index, values = self._elements[begin:end], now.values[begin:end]
            if number:  # an earlier pass may have multiplied a crossing
                values = now.joined.index_select(0, index)
            now.joined.index_copy_(0, index, values.mul_(each[begin:end]))
        self._write(tensors, now)

    def zero_(self, tensors: Mapping[str, Tensor]) -> None:
        """Set all elements to zero."""
        aliases = self._aliases(tensors)
        dtype = torch.float64 if any(a.dtype == torch.float64 for a in aliases) else torch.float32
        joined = self._join(aliases, dtype).index_fill_(0, self._elements, 0.0)
        self._write(tensors, _Joined(aliases, joined, joined))

    def _aliases(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors as vectors: views, kept while the memory is the same, or copies of what is not contiguous."""
        whole = [tensors[name] for name in self.names]
        pointers = [t.data_ptr() for t in whole]
        if pointers != self._pointers:
            self._views = [t.detach().reshape(-1) for t in whole]
            self._strided = [i for i, t in enumerate(whole) if not t.is_contiguous()]
            kinds = {(t.dtype, t.device) for t in whole}
            self._alike = kinds.pop() if len(kinds) == 1 else None
            self._pointers = [] if self._strided else pointers
        return self._views

    def _join(
        self,
        flat: list[Tensor],
        dtype: torch.dtype,
        alike: tuple[torch.dtype, torch.device] | None = None,
        into: str = "joined",
    ) -> Tensor:
        """One vector of all; `alike` is what they all are, if that is known."""
        device = self._elements.device
        if alike != (dtype, device) and any(t.dtype != dtype or t.device != device for t in flat):
            flat = [t.to(device, dtype) for t in flat]
        return torch.cat(flat, out=self._memory(into, self._total, dtype))

    def _pick(self, joined: Tensor, into: str) -> Tensor:
        memory = self._memory(into, self._elements.numel(), joined.dtype)
        return torch.index_select(joined, 0, self._elements, out=memory)

    def _write(self, tensors: Mapping[str, Tensor], now: _Joined) -> None:
        if self._kept is None:
            parts = list(now.joined.split(self._numels))
        else:  # it is the same memory every time
            if self._parts is None or self._parts[0] is not self._kept.get("joined"):
                self._parts = self._kept["joined"], list(now.joined.split(self._numels))
            parts = self._parts[1]
        torch._foreach_copy_(now.aliases, parts)
        for i in self._strided:
            tensor = tensors[self.names[i]]
            tensor.copy_(parts[i].view(tensor.shape))

    def _memory(self, name: str, count: int, dtype: torch.dtype) -> Tensor | None:
        if self._kept is None:
            return None
        memory = self._kept.get(name)
        if memory is None or memory.numel() < count or memory.dtype != dtype:
            memory = self._kept[name] = torch.empty(count, dtype=dtype)
        return memory[:count]


class _Block:
    """Chosen slices along one dimension of one large tensor."""

    def __init__(self, chosen: _Chosen, device: torch.device) -> None:
        self.tensor, self.dim, self.device = chosen.tensor, chosen.dim, device
        self._index = chosen.position.to(device)
        # crossings of a structure with itself: (lower dimension, positions there, indices into `_index`)
        self._holes = []
        for dim, slot_there in chosen.lower:
            at, here = slot_there[:, None].eq(chosen.slot[None, :]).nonzero(as_tuple=True)
            if at.numel():
                self._holes.append((dim, at.to(device), here.to(device)))

    def gather(self, tensor: Tensor) -> Tensor:
        """The chosen slices, crossings left out (zero), at least single precision."""
        chosen = tensor.index_select(self.dim, self._index)
        if chosen.dtype in (torch.float16, torch.bfloat16):
            chosen = chosen.float()
        for dim, at, here in self._holes:
            chosen.movedim((dim, self.dim), (0, 1))[at, here] = 0
        return chosen

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """⟨a, b⟩ of every position, shape (P,)."""
        rest = [d for d in range(a.ndim) if d != self.dim]
        if a is b and rest:
            squares: Tensor = torch.linalg.vector_norm(a, dim=rest).square_()
            return squares
        return (a * b).sum(rest) if rest else a * b

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        chosen = tensor.index_select(self.dim, self._index)
        shape = [1] * tensor.ndim
        shape[self.dim] = -1
        scaled = chosen * factor.view(shape).to(chosen.dtype)
        for dim, at, here in self._holes:
            axes = ((dim, self.dim), (0, 1))
            scaled.movedim(*axes)[at, here] = chosen.movedim(*axes)[at, here]
        tensor.index_copy_(self.dim, self._index, scaled)

    def zero_(self, tensor: Tensor) -> None:
        tensor.index_fill_(self.dim, self._index, 0.0)


@dataclass(frozen=True)
class Layout:
    """The slices of chosen structures, and the order in which they are numbered.

    Attributes:
        keys: (layer group, original index) of each slot.
        small, large: what is chosen at each place, of small tensors and of large ones.
        places: all of these places, in that order.
        members: at each place, the slots that have a slice there.
        slice_slot: shape (slices,), on the CPU: the slot of each slice.
        slice_place: shape (slices,), on the CPU: the place of each slice, as an index into `places`.
    """

    keys: list[tuple[str, int]]
    small: list[_Chosen]
    large: list[_Chosen]
    places: list[Place]
    members: list[Tensor]
    slice_slot: Tensor
    slice_place: Tensor

    @classmethod
    def of(
        cls, structures: StructureSet, picks: Picks, tensors: Mapping[str, Tensor], roles: Iterable[Role]
    ) -> Layout:
        """Of tensors only their shapes, dtypes and devices are looked at."""
        wanted = frozenset(roles)
        keys: list[tuple[str, int]] = []
        found: dict[Place, list[tuple[Tensor, Tensor]]] = {}
        for name, ids in picks.items():
            group = structures.groups[name]
            rows = group.rows(ids)
            slot = torch.full((len(group),), -1, dtype=torch.int64)
            slot[rows] = torch.arange(rows.numel()) + len(keys)
            keys += [(name, int(i)) for i in group.ids[rows]]
            for c in taking_part(group, tensors, wanted):
                mine = slot[c.owner]
                chosen = mine >= 0
                if bool(chosen.any()):
                    found.setdefault(c.place, []).append((c.position[chosen], mine[chosen]))
        of_tensor: dict[str, dict[int, list[tuple[Tensor, Tensor]]]] = {}
        for (name, dim), parts in found.items():
            of_tensor.setdefault(name, {})[dim] = parts
        every = [_merge(place, of_tensor[place[0]], tensors) for place in found]
        small = [each for each in every if _is_small(tensors[each.tensor])]
        small.sort(key=lambda each: (len(each.lower), each.tensor, each.dim))
        large = [each for each in every if not _is_small(tensors[each.tensor])]
        large.sort(key=lambda each: (each.tensor, each.dim))
        ordered = [*small, *large]
        members = [torch.unique(each.slot) for each in ordered]
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            keys=keys,
            small=small,
            large=large,
            places=[(each.tensor, each.dim) for each in ordered],
            members=members,
            slice_slot=torch.cat([none, *members]),
            slice_place=torch.cat([none, *(torch.full_like(m, i) for i, m in enumerate(members))]),
        )


class SliceBatch:
    """Chosen structures as index maps, worked out once, and batched arithmetic over their slices.

    A *slot* is one chosen structure; a *slice* is one structure in one tensor along one dimension. Where a tensor
    holds a structure both along a lower and a higher dimension (x + f(x)), their crossing counts for the lower
    one only, so nothing is measured or scaled twice for one structure. Where rows of one structure cross columns
    of another, the crossing belongs to both.

    No method loops over structures. Small tensors (biases, norms, narrow layers) are handled all together with a dozen
    kernels; each larger one with a few kernels of its own.

    Args:
        structures: the current structures.
        picks: which of them.
        tensors: parameters by name. Couplings to anything else are left out.
        roles: the roles that take part. A layer group that has none of them takes part with all its parameters.
    """

    #: Whether its values are those of the whole tensors, and so the same in every process.
    whole = True

    def __init__(
        self, structures: StructureSet, picks: Picks, tensors: Mapping[str, Tensor], roles: Iterable[Role]
    ) -> None:
        layout = Layout.of(structures, picks, tensors, roles)
        self._follow(layout, tensors)
        small, large, members = layout.small, layout.large, layout.members
        none = torch.zeros(0, dtype=torch.int64)
        self._flat = _Flat(small, tensors, self.device) if small else None
        self._blocks = [_Block(each, tensors[each.tensor].device) for each in large]
        # positions of the blocks → slices, numbered after those of the flat part
        of_position, count = [none], 0
        for each, m in zip(large, members[len(small) :], strict=True):
            of_position.append(torch.searchsorted(m, each.slot) + count)
            count += m.numel()
        position_slice = torch.cat(of_position)
        self._position_slice = (position_slice + self.slices - count).to(self.device)
        self._position_counts = [each.position.numel() for each in large]
        self._block_sums = Sums(position_slice, count, self.device)

    def _follow(self, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        """Number slots and slices as the layout has them."""
        self.keys, self.places = layout.keys, layout.places
        self.slots, self.slices = len(layout.keys), layout.slice_slot.numel()
        self.device = tensors[self.places[0][0]].device if self.places else torch.device("cpu")
        double = any(tensors[name].dtype == torch.float64 for name, _ in self.places)
        self.dtype = torch.float64 if double else torch.float32
        self.slice_slot = layout.slice_slot.to(self.device)  #: (slices,)
        self.slice_place = layout.slice_place.to(self.device)  #: (slices,), index into `places`
        self._slot_sums = Sums(layout.slice_slot, self.slots, self.device)

    # -- measuring -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def norms(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """L2 norm of every slice, shape (slices,)."""
        return self.read(tensors).norms

    @torch.no_grad()
    def values(self, tensors: Mapping[str, Tensor]) -> Values:
        """The elements of every slice as they are now."""
        flat = None if self._flat is None else self._flat.read(tensors, self.dtype).values.clone()
        return Values(flat, [block.gather(tensors[block.tensor]) for block in self._blocks])

    def as_values(self, flat: Tensor | None, blocks: Sequence[Tensor]) -> Values | None:
        """Values of a batch of the same structures, saved; None where the layout differs (another kind of device)."""
        size = None if self._flat is None else self._flat.size
        if (None if flat is None else flat.numel()) != size or len(blocks) != len(self._blocks):
            return None
        home = None if flat is None else flat.to(self.device, self.dtype)
        return Values(
            home, [value.to(block.device) for block, value in zip(self._blocks, blocks, strict=True)]
        )

    @torch.no_grad()
    def read(self, tensors: Mapping[str, Tensor], since: Values | None = None) -> Reading:
        """Norms of every slice, and what has changed `since` earlier values of this batch."""
        (squares, *rest), flat = self._squares(tensors, since)
        return Reading(squares.sqrt_(), flat, *(rest if since is not None else ()))

    def _squares(
        self, tensors: Mapping[str, Tensor], since: Values | None
    ) -> tuple[list[Tensor], _Joined | None]:
        """What `read` finds, the norms squared."""
        parts, flat = [], None
        if self._flat is not None:
            flat = self._flat.read(tensors, self.dtype)
            found = [self._flat.dot(flat.values, flat.values)]
            if since is not None and since.flat is not None:
                found += self._flat.since(flat, since.flat)
            parts.append(found)
        if self._blocks:
            of_block = []
            for i, block in enumerate(self._blocks):
                now = block.gather(tensors[block.tensor])
                found = [self._home(block.dot(now, now))]
                if since is not None:
                    move = now - since.blocks[i]
                    both = since.blocks[i] + now
                    found += [self._home(block.dot(move, both)), self._home(block.dot(move, move))]
                of_block.append(found)
            parts.append([self._block_sums(torch.cat(each)) for each in zip(*of_block, strict=True)])
        if not parts:
            nothing = torch.zeros(0, dtype=self.dtype, device=self.device)
            parts = [[nothing, nothing, nothing]]
        return list(_joined(parts)), flat

    @torch.no_grad()
    def moments(
        self, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩ of every slice, each of shape (slices,); an absent b counts as zero."""
        parts = []
        if self._flat is not None:
            a = self._flat.read(tensors, self.dtype).values
            b = self._flat.read_others(others, tensors, self.dtype)
            parts.append([self._flat.dot(*pair) for pair in ((a, a), (a, b), (b, b))])
        if self._blocks:
            values = []
            for block in self._blocks:
                a = block.gather(tensors[block.tensor])
                other = dense(others.get(block.tensor))
                aa = self._home(block.dot(a, a))
                if other is None:
                    values.append((aa, torch.zeros_like(aa), torch.zeros_like(aa)))
                    continue
                b = block.gather(other)
                values.append((aa, self._home(block.dot(a, b)), self._home(block.dot(b, b))))
            parts.append([self._block_sums(torch.cat(v)) for v in zip(*values, strict=True)])
        if not parts:
            nothing = torch.zeros(0, dtype=self.dtype)
            return nothing, nothing, nothing
        aa, ab, bb = _joined(parts)
        return aa, ab, bb

    def moments_later(
        self, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor | None]
    ) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """`moments` as the tensors are now, when they are asked for: what is sharded is added up then."""
        found = self.moments(tensors, others)
        return lambda: found

    @torch.no_grad()
    def moments_per_slot(
        self,
        tensors: Mapping[str, Tensor],
        others: Mapping[str, Tensor | None],
        *,
        only_product: bool = False,
    ) -> Tensor:
        """⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩ of every structure, shape (3, slots), or ⟨a, b⟩ alone, (1, slots)."""
        if self.whole and self._flat is not None and not self._blocks:
            return self._flat.moments_per_slot(
                others, tensors, self.dtype, self.slice_slot, self.slots, only_product
            )
        return self._of_slots(self.moments(tensors, others), only_product)

    def moments_per_slot_later(
        self,
        tensors: Mapping[str, Tensor],
        others: Mapping[str, Tensor | None],
        *,
        only_product: bool = False,
    ) -> Callable[[], Tensor]:
        """`moments_per_slot` as the tensors are now, when it is asked for."""
        if self.whole:
            found = self.moments_per_slot(tensors, others, only_product=only_product)
            return lambda: found
        moments = self.moments_later(tensors, others)
        return lambda: self._of_slots(moments(), only_product)

    def _of_slots(self, moments: Sequence[Tensor], only_product: bool) -> Tensor:
        return torch.stack([self.per_slot(each) for each in (moments[1:2] if only_product else moments)])

    def per_slot(self, values: Tensor) -> Tensor:
        """Sum over the slices of each structure: (slices,) → (slots,)."""
        return self._slot_sums(values)

    def moved(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the tensors have gone to another device, so that the index maps must be made anew."""
        return bool(self.places) and tensors[self.places[0][0]].device != self.device

    # -- changing --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rescale_(self, tensors: Mapping[str, Tensor], rule: Callable[[Tensor], Tensor]) -> None:
        """Multiply every slice by a factor that depends on all norms, in place.

        Args:
            tensors: parameters by name.
            rule: norms of the slices, taken before anything changes → their factors; both of shape (slices,).
        """
        now = self.read(tensors)
        self.scale_(tensors, now, rule(now.norms))

    @torch.no_grad()
    def scale_(
        self, tensors: Mapping[str, Tensor], now: Reading, factors: Tensor, *, keep: bool = False
    ) -> Values | None:
        """Multiply every slice by its factor, in place.

        Args:
            tensors: parameters by name.
            now: what has just been read of them.
            factors: shape (slices,).
            keep: return the elements as they are afterwards. Small tensors are not read again for it.
        """
        if self._flat is not None and now.flat is not None:
            self._flat.scale_(tensors, now.flat, factors[: self._flat.slices])
        each = factors[self._position_slice].split(self._position_counts) if self._blocks else ()
        for block, factor in zip(self._blocks, each, strict=True):
            tensor = tensors[block.tensor]
            block.scale_(tensor, factor.to(tensor.device))
        if not keep:
            return None
        flat = None
        if self._flat is not None and now.flat is not None:
            flat = self._flat.keep(now.flat)
            if flat is None:
                return self.values(tensors)
        return Values(flat, [block.gather(tensors[block.tensor]) for block in self._blocks])

    @torch.no_grad()
    def zero_(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every slice to zero, in place (whatever it holds, infinities included)."""
        if self._flat is not None:
            self._flat.zero_(tensors)
        for block in self._blocks:
            block.zero_(tensors[block.tensor])

    def _home(self, values: Tensor) -> Tensor:
        same = values.dtype == self.dtype and values.device == self.device
        return values if same else values.to(self.device, self.dtype)


def _joined(parts: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """What was found in small tensors and in large ones, side by side."""
    return parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]


def taking_part(group: LayerGroup, tensors: Mapping[str, Tensor], roles: frozenset[Role]) -> list[Coupling]:
    """The couplings of a layer group to parameters in these roles; all to parameters where it has none of them."""
    usable = [c for c in group.couplings if c.role not in NOT_PARAMETERS and c.tensor in tensors]
    return [c for c in usable if c.role in roles] or usable


def dense(tensor: Tensor | None) -> Tensor | None:
    """A gradient as a plain tensor: those of `nn.Embedding(sparse=True)` are sparse."""
    return tensor if tensor is None or tensor.layout == torch.strided else tensor.to_dense()


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= _SMALL["cpu" if tensor.device.type == "cpu" else "gpu"]


def _merge(
    place: Place, found: Mapping[int, list[tuple[Tensor, Tensor]]], tensors: Mapping[str, Tensor]
) -> _Chosen:
    """All that is chosen at one place, by ascending position; `found` is what is chosen in its tensor, by dimension."""
    name, dim = place
    position = torch.cat([p for p, _ in found[dim]])
    slot = torch.cat([s for _, s in found[dim]])
    order = torch.argsort(position)
    lower = []
    for there in sorted(d for d in found if d < dim):
        slots = torch.full((tensors[name].shape[there],), -1, dtype=torch.int64)
        for p, s in found[there]:
            slots[p] = s
        lower.append((there, slots))
    return _Chosen(name, dim, position[order], slot[order], tuple(lower))
