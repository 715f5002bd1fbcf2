"""The graph: layers that share a width → structures, and scores for them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from decay_pruning.checks import shown
from decay_pruning.errors import ConfigError, GraphError
from decay_pruning.graph import _reasons, choices, layers
from decay_pruning.graph.channels import Channels
from decay_pruning.graph.proposals import Proposals
from decay_pruning.graph.trace import Trace, trace
from decay_pruning.graph.verification import demote, verified
from decay_pruning.structures import LayerGroup, StructureSet

log = logging.getLogger(__name__)

#: One of torch-pruning's importances, or any callable on groups as that has them.
Importance = Callable[[Any], Tensor | None]


class Graph:
    """The structures of a model, traced once and tried out.

    Attributes:
        structures: layer groups as traced and verified, in the order of the model, and what is unprunable.
        verified: how they were verified, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        ignored: Sequence[str | nn.Module | type] = (),
        heads: Mapping[str, int] = {},
        allow_inexact: bool = False,
        verify: bool = True,
        more_inputs: Sequence[Any] = (),
        outputs: Sequence[str | int] = (),
    ) -> None:
        """Trace the model.

        The model is left as it was: training flags, buffers, gradients, `requires_grad`, random number generators.

        Args:
            model: any module that runs on the example inputs; on any device.
            example_inputs: a tensor (`model(x)`), a tuple or list (`model(*x)`) or a mapping (`model(**x)`).
            ignored: layers whose width stays: module names, modules (each with all inside), or types.
            heads: name of a layer whose outputs are attention heads → number of heads; the same offset in every
                head is then one structure.
            allow_inexact: offer layer groups whose removal changes the function by its nature (LayerNorm over a
                residual width, attention scores scaled by the head width).
            verify: try every layer group on the model before it is offered.
            more_inputs: further examples, where the inputs decide which layers run.
            outputs: names of the outputs that keep their shape ("logits"), or their numbers in a tuple; the others may
                become narrower. None named: all keep it.

        Raises:
            GraphError: the model cannot be traced, or nothing in it can be pruned (with all reasons).
            ConfigError: an unknown name in `ignored`, `heads` or `outputs`.
        """
        self._model = model
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if is_lazy(tensor):
                raise GraphError(
                    f"{name!r} is not initialised yet; run the model once before building the pruner"
                )
        skip = _resolve_ignored(model, ignored)
        found = trace(model, [example_inputs, *more_inputs], outputs)
        layers.describe(found)
        choices.ignore(found, skip)
        choices.name_heads(found, heads, lambda name: _no_heads(found, name))
        proposals = Proposals(found, allow_inexact)
        structures = proposals.first() if verify else proposals.assembly.structures
        self.verified = "not verified, as asked"
        if verify:
            structures, self.verified = verified(
                model, structures, example_inputs, allow_inexact, proposals.second
            )
            structures = proposals.located(structures)
        if not allow_inexact:
            structures = demote(structures)
        shared = proposals.assembly.shared
        structures = replace(structures, unprunable=_reasons.named(found, structures, shared))
        if not structures.groups:
            reasons = "\n".join(
                f"  {name or type(model).__name__}: {why}" for name, why in structures.unprunable.items()
            )
            raise GraphError(
                f"nothing in this model can be pruned:\n{reasons or '  it has no prunable layer'}"
            )
        touched = {c.place for group in structures.groups.values() for c in group.couplings}
        self.structures = replace(
            structures, sizes={p: n for p, n in structures.sizes.items() if p in touched}
        )

    def scores(self, importance: Any, structures: StructureSet) -> dict[str, Tensor]:
        """Let an importance score all structures.

        Args:
            importance: one of torch-pruning's, or any callable on a group as that has them → 1-d tensor with one
                value per channel of the group's root, or None.
            structures: the structures that are there now (after any removals by `surgery`).

        Returns:
            layer group → shape (S,), float32, CPU, in the order of `ids`: where a structure has several channels,
            their mean. NaN, which a normaliser makes of a layer group without any importance, reads as 0. Layer
            groups that the importance has nothing to say about are left out, with a warning in the log.

        Raises:
            GraphError: the importance fails.
            ConfigError: it returns something else than one number per channel.
        """
        kind = type(importance).__name__
        found = {}
        for name, group in structures.groups.items():
            value, owner = self._score(importance, group)
            if value is None:
                log.warning("%s gives no score to layer group %r: it is never picked", kind, name)
                continue
            if not isinstance(value, Tensor) or value.shape != owner.shape or value.is_complex():
                what = f"{tuple(value.shape)} values" if isinstance(value, Tensor) else shown(value)
                raise ConfigError(
                    f"{kind} returned {what} for layer group {name!r}, which has "
                    f"{owner.numel()} channels: one real number for each is needed, in a tensor"
                )
            total = torch.zeros(len(group))
            total.index_add_(0, owner, value.detach().to("cpu", total.dtype).nan_to_num(nan=0.0))
            found[name] = total / torch.bincount(owner, minlength=len(group))
        return found

    def _score(self, importance: Any, group: LayerGroup) -> tuple[Tensor | None, Tensor]:
        """The values of an importance, and the structure (row) that each is about."""
        try:
            channels = Channels(self._model, group)
            return importance(channels), channels.owner
        except Exception as error:
            raise GraphError(
                f"{type(importance).__name__} cannot score layer group {group.name!r}: "
                f"{type(error).__name__}: {error}"
            ) from error


def _no_heads(found: Trace, name: str) -> str:
    """Why there are no heads at this layer, in words."""
    if name not in found.modules.values():
        return f"heads: no prunable layer {name!r}{_nearest(name, found.modules.values())}"
    kind = type(found.model.get_submodule(name)).__name__
    return f"heads: {name!r} ({kind}) is no layer whose outputs can be told apart by heads"


def _resolve_ignored(model: nn.Module, ignored: Sequence[str | nn.Module | type]) -> set[int]:
    """Identities of all modules and bare parameters that are ignored.

    Raises:
        ConfigError: a name or module that the model does not have.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    found: set[int] = set()
    roots: list[nn.Module]
    for each in ignored:
        if isinstance(each, str) and each in parameters:
            found.add(id(parameters[each]))
            continue
        if isinstance(each, str) and each not in modules:
            raise ConfigError(f"ignored: the model has no layer {each!r}{_nearest(each, modules)}")
        if isinstance(each, str):
            roots = [modules[each]]
        elif isinstance(each, nn.Module):
            if not any(each is module for module in modules.values()):
                raise ConfigError(f"ignored: this {type(each).__name__} is no part of the model")
            roots = [each]
        else:
            kind: Any = each
            roots = [module for module in modules.values() if isinstance(module, kind)]
        for root in roots:
            found.update(id(module) for module in root.modules())
            found.update(id(parameter) for parameter in root.parameters())
    return found


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [n for n in names if n], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
