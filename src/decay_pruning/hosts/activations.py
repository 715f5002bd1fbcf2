"""Activations: how strongly a structure speaks to the layers that read it, in the batches that it is trained on.

The mean of |x| over batch and places, as Minitron (Muralidharan et al., NeurIPS 2024) and, with weights, Wanda (Sun et
al., ICLR 2024) use it: read at the inputs of all layers that a layer group feeds, so behind norms and nonlinearities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from decay_pruning import surgery
from decay_pruning.hosts.importance import Importance
from decay_pruning.structures import LayerGroup, Role, StructureSet

#: Weight of the batches before in the running mean.
_KEPT = 0.9


class Activations(Importance):
    """Mean |input| of the readers of each layer group: a running mean over training batches.

    Evaluation, and what runs without gradients, is not counted.
    """

    def __init__(self) -> None:
        self.active = True
        self.means: dict[str, Tensor] = {}  #: module → shape (input features,), on the CPU
        self._handles: list[Any] = []

    @property
    def ready(self) -> bool:
        """Whether a batch has been seen."""
        return bool(self.means)

    def attach(self, model: nn.Module, structures: StructureSet) -> None:
        """Listen to every layer that reads a prunable width."""
        for path in dict.fromkeys(
            path for group in structures.groups.values() for path in _readers(model, group)
        ):
            module = model.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(self._hook(path)))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def score(self, model: nn.Module, group: LayerGroup) -> Tensor | None:
        """Shape (S,): the mean over all readers."""
        values = []
        for path, (position, owner) in _readers(model, group).items():
            seen = self.means.get(path)
            if seen is None or int(position.max()) >= seen.numel():
                continue  # not run yet, or cut since
            total = torch.zeros(len(group)).index_add_(0, owner, seen[position])
            values.append(total / torch.bincount(owner, minlength=len(group)).clamp_min(1))
        return torch.stack(values).mean(0) if values else None

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not (self.active and module.training and torch.is_grad_enabled() and args):
                return
            x = args[0]
            if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
                return
            channels = (
                1 if isinstance(module, _ConvNd) and x.ndim > len(module.kernel_size) + 1 else x.ndim - 1
            )
            if isinstance(module, _ConvNd) and x.ndim == len(module.kernel_size) + 1:
                channels = 0  # without a batch
            rest = [d for d in range(x.ndim) if d != channels]
            now = x.detach().float().abs().mean(rest) if rest else x.detach().float().abs()
            before = self.means.get(path)
            same = before is not None and before.shape == now.shape
            self.means[path] = _KEPT * before + (1 - _KEPT) * now.cpu() if same else now.cpu()  # type: ignore[operator]

        return note

    def state_dict(self) -> dict[str, Any]:
        """What has been seen."""
        return {"activations": {path: mean.clone() for path, mean in self.means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.means = dict(state["activations"])


def _readers(model: nn.Module, group: LayerGroup) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → input features that belong to the layer group, and the structure (row) of each."""
    found = {}
    for c in group.couplings:
        if c.role is not Role.COLUMN:
            continue
        module, _ = surgery.parent(model, c.tensor)
        if getattr(module, "groups", 1) == 1:
            found[c.tensor.rpartition(".")[0]] = c.position, c.owner
    return found
