"""Shapes: does a smaller model run at all? A twin of the model on the meta device tells, which costs no arithmetic."""

from __future__ import annotations

import logging

import torch
from torch import nn

from decay_pruning import outputs, proof, surgery
from decay_pruning.graph.verification._shrunken import copied, without_value
from decay_pruning.keeping import eager
from decay_pruning.proof import Settings
from decay_pruning.structures import Picks, StructureSet

log = logging.getLogger(__name__)


class Shapes:
    """A twin of a model, without values.

    Attributes:
        usable: the twin runs as the model does; its values decide nothing, and it can be copied.
        failed_in: name of the innermost module in which the last problem showed, or None.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._setting = settings.settings[0]
        self.usable = False
        self.failed_in: str | None = None
        try:
            self._twin = copied(model, without_value)
            self._before = self._shapes()
            self.usable = True
        except Exception as error:
            log.debug("no twin without values: %s", proof.first_line(error))

    def problem(self, structures: StructureSet, picks: Picks) -> str | None:
        """Why the model does not run without these structures, or None where nothing speaks against it."""
        if not self.usable:
            return None
        self.failed_in = None
        undo = surgery.shrink(self._twin, structures.kept(picks))
        try:
            after = self._shapes()
        except Exception as error:
            self.failed_in = self._innermost(error)
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
        with proof.seeded(self._twin), eager():
            output = proof.call(self._twin, self._setting.inputs)
        found = list(outputs.named(output)) or [("", leaf) for leaf in proof.leaves(output)]
        return [(name, tuple(leaf.shape)) for name, leaf in found]

    def _innermost(self, error: BaseException) -> str | None:
        """The module that ran when an error came up."""
        names = {id(module): name for name, module in self._twin.named_modules()}
        found, trace = None, error.__traceback__
        while trace is not None:
            found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
            trace = trace.tb_next
        return found
