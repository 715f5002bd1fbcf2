"""The memory that a forward pass takes at its peak: weights, buffers, inputs and what is alive of the activations.

It is counted from the sizes of the tensors, so it is the same at every run and on every device. What a kernel takes
for itself while it runs (workspaces) is not in it. Tensors grow with the widths that made them (see `counting`), so the
peak is known for other widths, too, wherever it then is.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from decay_pruning.counting import Ledger, Makers, count, joined
from decay_pruning.structures import Place


class MemoryModel:
    """Peak bytes of a forward pass without gradients, now and after a removal."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        seen = _Storages()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            seen.enter(tensor, {(name, d): 1.0 for d in range(tensor.ndim)})
        for tensor in tree_leaves(example_inputs):  # a copy of them comes by
            if isinstance(tensor, Tensor):
                seen.leave_out(tensor)
        count(model, example_inputs, seen.see)
        self._makers = list(seen.kinds)
        self._kind = np.array([kind for kind, _ in seen.events])
        self._bytes = np.array([size for _, size in seen.events], dtype=np.float64)
        self.now = self.after({})

    def after(self, kept: Mapping[Place, float]) -> int:
        """Peak bytes when places keep only a fraction of theirs."""
        share = [
            math.prod(kept[place] ** power for place, power in makers if place in kept)
            for makers in self._makers
        ]
        return round(float((self._bytes * np.array(share)[self._kind]).cumsum().max()))


class _Storages:
    """Memory that comes and goes, in order: (which makers, bytes); what goes is negative."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[tuple[Place, float], ...], int] = {}
        self.events: list[tuple[int, int]] = []
        self._alive: dict[int, weakref.ref[Any]] = {}

    def enter(self, tensor: Tensor, makers: Makers) -> None:
        """Note the memory of a tensor, once for all that share it."""
        try:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
        except (RuntimeError, NotImplementedError):  # it has none of its own: sparse
            return
        if key in self._alive or not size:
            return
        event = self.kinds.setdefault(tuple(sorted(makers.items())), len(self.kinds)), size

        def leave(_: Any) -> None:
            self._alive.pop(key, None)
            self.events.append((event[0], -size))

        self._alive[key] = weakref.ref(storage, leave)
        self.events.append(event)

    def leave_out(self, tensor: Tensor) -> None:
        """What the model never sees."""
        self._alive[tensor.untyped_storage()._cdata] = weakref.ref(tensor.untyped_storage())

    def see(self, ledger: Ledger, name: str, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        """The results of an operator."""
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self.enter(each, joined(ledger.axes(each)))
