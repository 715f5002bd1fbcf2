"""Structures: what can be removed, and where it stands. The arithmetic over their slices is in `slices`.

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
    OTHER = (
        "other"  #: a parameter that is cut with the structure and carries none of its strength (PReLU slope)
    )
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
        """The tensor and the dimension."""
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
        standardised: modules whose own weight is normalised over what goes in (weight standardisation).
    """

    groups: Mapping[str, LayerGroup]
    sizes: Mapping[Place, int]
    unprunable: Mapping[str, str] = field(default_factory=dict)
    standardised: frozenset[str] = frozenset()

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
