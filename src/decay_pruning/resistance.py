"""What is measured of a decaying structure while it fades: how much training resists the decay.

Of a structure with weights x (all its slices), loss gradient g and learning rate η, picked at norm m₀, in a step of N:

    c_rate       the actual escape rate, from x̃, what the optimizer's own step makes of x (momentum, moments and weight
                 decay included): (‖x̃‖ − ‖x‖) / ‖x̃ − x‖, the share of the step that goes outward, or
                 (‖x̃‖ − ‖x‖) / (m₀/N), the share of the decay's own length that the step wins back (1: the decay stands
                 still)
    c_len        ‖g‖ over its mean among the structures of the same layer group that do not decay (1: as large as
                 theirs)
    growth       ρ = −⟨g, x⟩ / ‖x‖, how fast plain descent would lengthen the structure
    outward      ρ / ‖g‖, the share of the descent direction that points outward, a cosine in [−1, 1]
    regrowth     η·ρ / (m₀/N), the length that plain descent would win back, over the length that the decay takes
    first_order  |⟨g, x⟩|, the first-order estimate of what removal changes in the loss
    worth        ⟨g, x⟩² · (m₀/‖x‖)², the square of it at the norm of the pick (see `exchange`)

The first two are the paper's (arXiv 2406.03879) as far as it is known; their normalisers and the rest are ours
(docs/method.md). A quotient of which the divisor is zero is zero: no resistance is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from decay_pruning import shards
from decay_pruning.slices import SliceBatch, Sums
from decay_pruning.structures import Role, StructureSet


class Resistance(NamedTuple):
    """Running averages of each decaying structure, each of shape (slots,); NaN where a figure was not asked for."""

    c_rate: Tensor
    c_len: Tensor
    growth: Tensor
    outward: Tensor
    regrowth: Tensor
    first_order: Tensor
    worth: Tensor


#: Where each figure comes from: the optimizer's step, the gradients of whole layer groups, or those of the structures.
Source = Literal["step", "group", "gradient"]
SOURCES: Mapping[str, Source] = {
    "c_rate": "step",
    "c_len": "group",
    "growth": "gradient",
    "outward": "gradient",
    "regrowth": "gradient",
    "first_order": "gradient",
    "worth": "gradient",
}


def of_gradient(
    ww: Tensor, wg: Tensor, gg: Tensor, lr_wg: Tensor, start: Tensor, steps: Tensor
) -> dict[str, Tensor]:
    """The figures of source "gradient", from inner products per structure, each of shape (slots,).

    Args:
        ww, wg, gg: ⟨x, x⟩, ⟨x, g⟩ and ⟨g, g⟩ before the optimizer step.
        lr_wg: Σ η⟨x, g⟩ over slices, each with the learning rate of its parameter.
        start: m₀, the joint norm at the pick.
        steps: N.
    """
    length = ww.sqrt()
    growth = -_ratio(wg, length)
    return {
        "growth": growth,
        "outward": _ratio(growth, gg.sqrt()),
        "regrowth": -_ratio(_ratio(lr_wg, length), start / steps),
        "first_order": wg.abs(),
        "worth": (growth * start).square(),
    }


def worth(ww: Tensor, wg: Tensor, start: Tensor) -> Tensor:
    """That figure alone, which is all that the default criterion needs."""
    return (wg * start).square_().div_(ww.clamp_min(torch.finfo(ww.dtype).tiny))


def c_rate(
    length: Tensor, grown: Tensor, moved: Tensor, start: Tensor, steps: Tensor, per: Literal["step", "decay"]
) -> Tensor:
    """The actual escape rate of each structure, shape (slots,).

    Args:
        length: ‖x̃‖, the norm after the optimizer's step.
        grown: ‖x̃‖² − ‖x‖², summed without cancellation.
        moved: ‖x̃ − x‖².
        start: m₀, the joint norm at the pick.
        steps: N.
        per: what it is a share of: the step, or the decay's length m₀/N.
    """
    before = (length.square() - grown).clamp_min(0).sqrt()
    gain = _ratio(grown, length + before)
    return _ratio(gain, moved.sqrt() if per == "step" else start / steps)


class Parallel:
    """C_len: gradients of decaying structures beside those of the structures of their layer groups that do not.

    Args:
        structures: the current structures.
        batch: the decaying ones.
        fading: layer group → bool, parallel to its ids: what decays or is held.
        tensors: parameters by name.
        roles: the roles that take part.
    """

    def __init__(
        self,
        structures: StructureSet,
        batch: SliceBatch,
        fading: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        roles: frozenset[Role],
    ) -> None:
        names = list(dict.fromkeys(name for name, _ in batch.keys))
        self._lengths = shards.lengths(structures, names, tensors, roles)
        live = [torch.where(fading[name], -1, number) for number, name in enumerate(names)]
        segment = torch.cat(live)
        self._sums = Sums(segment, len(names), self._lengths.device)
        self._counts = torch.bincount(segment[segment >= 0], minlength=len(names)).to(self._lengths.device)
        self._rows = self._rows_of(structures, batch.keys).to(self._lengths.device)
        number = {name: i for i, name in enumerate(names)}
        self._group = torch.tensor([number[name] for name, _ in batch.keys]).to(self._lengths.device)

    def _rows_of(self, structures: StructureSet, keys: Sequence[tuple[str, int]]) -> Tensor:
        by_group: dict[str, list[int]] = {}
        for name, index in keys:  # slots are in the order of layer groups, and ascend within each
            by_group.setdefault(name, []).append(index)
        rows = [structures.groups[n].rows(ids) + self._lengths.first[n] for n, ids in by_group.items()]
        return torch.cat(rows)

    def c_len(self, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """Shape (slots,). The gradients' common scale does not matter."""
        return self.later(gradients)()

    def later(self, gradients: Mapping[str, Tensor | None]) -> Callable[[], Tensor]:
        """C_len of the gradients as they are now, when it is asked for."""
        measured = self._lengths.later(gradients)

        def found() -> Tensor:
            lengths = measured()
            mean = _ratio(self._sums(lengths), self._counts)
            return _ratio(lengths[self._rows], mean[self._group])

        return found


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)
