"""Shapes: does a smaller model run at all? A twin of the model on the meta device tells, which costs no arithmetic."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from decay_pruning import outputs, proof, surgery
from decay_pruning.proof import Settings
from decay_pruning.structures import Picks, StructureSet

log = logging.getLogger(__name__)


class Shapes:
    """A twin of a model, without values.

    Attributes:
        usable: the twin runs as the model does; its values decide nothing, and it can be copied.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._setting = settings.settings[0]
        self.usable = False
        try:
            self._twin = _twin(model)
            self._before = self._shapes()
            self.usable = True
        except Exception as error:
            log.debug("no twin without values: %s", proof.first_line(error))

    def problem(self, structures: StructureSet, picks: Picks) -> str | None:
        """Why the model does not run without these structures, or None where nothing speaks against it."""
        if not self.usable:
            return None
        undo = surgery.shrink(self._twin, structures.kept(picks))
        try:
            after = self._shapes()
        except Exception as error:
            return f"the smaller model does not run ({proof.first_line(error)})"
        finally:
            undo()
        kept = structures.outputs.kept(structures.gone(picks))
        before = [
            (name, tuple(kept[name, d].numel() if (name, d) in kept else n for d, n in enumerate(shape)))
            for name, shape in self._before
        ]
        if after == before:
            return None
        had, has = ([shape for _, shape in each] for each in (before, after))
        return f"the output had shapes {had} and has {has}"

    @torch.no_grad()
    def _shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        for module in self._twin.modules():
            module.training = self._setting.training
        with proof.seeded(self._twin):
            output = proof.call(self._twin, proof.mapped(self._setting.inputs, lambda t: t.to("meta")))
        found = list(outputs.named(output)) or [("", leaf) for leaf in proof.leaves(output)]
        return [(name, tuple(leaf.shape)) for name, leaf in found]


def _twin(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _empty(tensor)
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin


def _empty(tensor: Tensor) -> Tensor:
    new = torch.empty_like(tensor, device="meta")
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
