"""Exchange: is what decays worth more than what the host would take in its place?

A structure that is released stays, and others have to go instead: the next in the host's ranking. That pays where what
stays is worth more than what goes, at the same saving. Both are measured by gradients, on the same batches: the worth
of a structure with weights x is the mean of ⟨g, x⟩² over steps (a squared first-order estimate, as in Molchanov et al.,
CVPR 2019). What decays has lost a part of its norm; it is weighed at that of the pick. A live structure is weighed in a
network that still has most of what decays, and will have to carry more: hence a margin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decay_pruning import shards
from decay_pruning.errors import ConfigError
from decay_pruning.fading import Key, as_keys
from decay_pruning.slices import Gradients, SliceBatch
from decay_pruning.structures import Picks, Role, StructureSet


@dataclass(frozen=True)
class Replacements:
    """What a host would pick next, beside what fades.

    Attributes:
        parts: the first goes first; within one, there is no order.
        price: layer group → what one of its structures costs, in the unit of the target.
    """

    parts: Sequence[Picks]
    price: Mapping[str, float]


@dataclass(frozen=True)
class Exchange:
    """Live structures that would go in place of decaying ones, and their worth. Nothing here changes in place.

    Attributes:
        structures: what there was when the host was asked.
        offer: what it answered.
        batch: the slices of all replacements.
        worth: shape (slots,): mean so far.
        seen: observations in the mean.
        spent: price of what earlier verdicts have released.
    """

    structures: StructureSet
    offer: Replacements
    batch: SliceBatch | None
    worth: Tensor
    seen: int = 0
    spent: float = 0.0

    @classmethod
    def of(
        cls,
        structures: StructureSet,
        offer: Replacements,
        parameters: Mapping[str, Tensor],
        roles: frozenset[Role],
    ) -> Exchange:
        """With nothing seen yet."""
        picks: dict[str, list[int]] = {}
        for part in offer.parts:
            for name, ids in part.items():
                picks.setdefault(name, []).extend(ids)
        picks = {name: sorted(ids) for name, ids in picks.items() if ids}
        batch = shards.batch(structures, picks, parameters, roles) if picks else None
        worth = (
            torch.zeros(0)
            if batch is None
            else torch.zeros(batch.slots, dtype=batch.dtype, device=batch.device)
        )
        return cls(structures, offer, batch, worth)

    def read(self, parameters: Mapping[str, Tensor], gradients: Gradients, scale: Tensor | None) -> Exchange:
        """With the gradients of this step, which are `scale` times too large."""
        return self.later(parameters, gradients, scale)()

    def later(
        self, parameters: Mapping[str, Tensor], gradients: Gradients, scale: Tensor | None
    ) -> Callable[[], Exchange]:
        """`read` with the gradients as they are now, when it is asked for."""
        if self.batch is None:
            return lambda: self
        products = self.batch.moments_per_slot_later(parameters, gradients, only_product=True)

        def found() -> Exchange:
            product = products()[0] if scale is None else products()[0] / scale
            seen = self.seen + 1
            return replace(self, worth=torch.lerp(self.worth, product.square(), 1 / seen), seen=seen)

        return found

    def releases(
        self, keys: Sequence[Key], worth: Sequence[float], fading: Mapping[str, Tensor], margin: float = 1.0
    ) -> tuple[list[int], Exchange]:
        """Which of these decaying structures stay, as rows of `keys`; and the exchange without what goes for them.

        They are taken by worth per price, the largest first, as many as gain the most: Σ worth of what stays, less
        `margin` · Σ worth of what has to go until the same price is saved.

        Args:
            keys: the decaying structures that are judged.
            worth: of each.
            fading: layer group → bool, parallel to its ids: what is on its way out, and no replacement any more.
            margin: how many times as much as what goes in its place has to be worth what stays.
        """
        saved, paid = self._curve(fading)
        price = np.array([self.offer.price[name] for name, _ in keys])
        value = np.array(worth, dtype=np.float64)
        order = np.argsort(-value / price, kind="stable")
        reach = self.spent + price[order].cumsum()
        possible = int(np.searchsorted(reach, saved[-1], side="right"))
        lost = np.interp(reach, saved, paid) - np.interp(self.spent, saved, paid)
        gain = value[order].cumsum() - margin * lost
        if not possible or gain[:possible].max() <= 0:
            return [], self
        count = int(gain[:possible].argmax()) + 1
        return order[:count].tolist(), replace(self, spent=float(reach[count - 1]))

    def _curve(self, fading: Mapping[str, Tensor]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Price saved, and worth paid for it, after each part."""
        worth = {} if self.batch is None else dict(zip(self.batch.keys, self.worth.tolist(), strict=True))
        saved, paid = [0.0], [0.0]
        for part in self.offer.parts:
            there = [key for key in as_keys(part) if self._is_live(key, fading)]
            saved.append(saved[-1] + sum(self.offer.price[name] for name, _ in there))
            paid.append(paid[-1] + sum(worth[key] for key in there))
        return np.array(saved), np.array(paid)

    def _is_live(self, key: Key, fading: Mapping[str, Tensor]) -> bool:
        name, index = key
        return not bool(fading[name][self.structures.groups[name].rows([index])])

    # -- saving ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors on the CPU."""
        return {
            "parts": [{name: list(ids) for name, ids in part.items()} for part in self.offer.parts],
            "price": dict(self.offer.price),
            "worth": self.worth.detach().cpu().clone(),
            "seen": self.seen,
            "spent": self.spent,
        }

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        structures: StructureSet,
        parameters: Mapping[str, Tensor],
        roles: frozenset[Role],
    ) -> Exchange:
        """From `state_dict()`, with the structures of that moment.

        Raises:
            ConfigError: a part does not fit them.
        """
        fresh = cls.of(structures, Replacements(state["parts"], state["price"]), parameters, roles)
        worth = state["worth"]
        right = (
            isinstance(worth, Tensor) and worth.shape == fresh.worth.shape and bool(worth.isfinite().all())
        )
        if not right or state["price"].keys() != structures.groups.keys():
            raise ConfigError("its part 'exchange' does not fit the structures")
        worth = worth.to(fresh.worth.device, fresh.worth.dtype)
        return replace(fresh, worth=worth, seen=int(state["seen"]), spent=float(state["spent"]))
