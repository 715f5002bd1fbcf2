"""Reasons: every layer that is not prunable is named, and what is said of it is true."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from decay_pruning.graph.axes import leaves, reason
from decay_pruning.graph.names import owner_of
from decay_pruning.graph.trace import Trace
from decay_pruning.structures import Role, StructureSet

OUTPUT = "feeds the model's output"
UNREACHED = "is not reached from the example inputs"
DEAD = "does not lead to the model's output"
HEADS = "; its heads stay, since torch's attention is as wide inside as outside"
LAST = "has a single structure, and a layer never loses its last one"


def named(trace: Trace, structures: StructureSet, shared: Mapping[str, str]) -> dict[str, str]:
    """`unprunable` with every layer in it whose weight of two or more dimensions no layer group covers.

    Args:
        shared: name of a layer → the first layer (prunable or not) that its width is known by.
    """
    said = dict(structures.unprunable)
    covered = {
        c.tensor for group in structures.groups.values() for c in group.couplings if c.role is not Role.COLUMN
    }
    names = {id(p): name for name, p in trace.model.named_parameters()}
    attentions = {n for m, n in trace.modules.items() if isinstance(m, nn.MultiheadAttention)}
    for module, name in trace.modules.items():
        weights = [names[id(p)] for p in module.parameters(recurse=False) if p.ndim > 1]
        key = name or (weights[0] if weights else "")
        whole = _attention_above(attentions, name)
        key = owner_of(f"{key}.original") if weights and ".parametrizations." in f".{key}." else key
        if (
            not weights
            or covered & set(weights)
            or whole in structures.groups
            or said.keys() & {key, *weights}
        ):
            continue
        head = shared.get(key, key)
        if whole in said:
            said[key] = f"is part of attention {whole!r}, which is not prunable"
        elif head != key and head in said:
            same = said[head] == OUTPUT
            said[key] = OUTPUT if same else f"shares its width with {head!r}: {said[head]}"
        else:
            said[key] = _of_weights(trace, weights)
        if isinstance(module, nn.MultiheadAttention) and said.get(key, OUTPUT) != OUTPUT:
            said[key] += HEADS
    return said


def _attention_above(attentions: set[str], name: str) -> str | None:
    parts = name.split(".")
    whole = (".".join(parts[:k]) for k in range(len(parts) - 1, -1, -1))
    return next((each for each in whole if each in attentions), None) if name else None


def _of_weights(trace: Trace, weights: list[str]) -> str:
    """What the trace says of a layer with these weights."""
    if not trace.used.intersection(weights):
        return UNREACHED
    if not trace.live.intersection(weights):
        return DEAD
    axes = [trace.dims[name, 0].axis for name in weights]
    why = max((found for axis in axes if (found := reason(axis))), default=None)
    if why is not None:
        return why.text
    if all(axis.size == 1 for axis in axes):
        return LAST
    where = next((atom.site for axis in axes for atom in leaves(axis) if atom.site), None)
    return f"is taken apart, one structure at a time, by {where}" if where else "has no width of its own"
