"""Graph: a model and example inputs → its `StructureSet`. The only room that imports torch-pruning's graph.

torch-pruning traces which layers share a width. From its graph we derive what it has no API for: which positions
of which tensor belong to which structure. One rule decides what a structure is: *channels that share a position
of any tensor or attribute must go together*. A flattened channel, a residual stream, a fused qkv, the equal parts
of a grouped convolution and the channels of one GroupNorm group are all cases of it.

Nothing is believed: every layer group is tried on the model itself, with random values in its weights, before it
is offered. What fails is listed as unprunable with the reason.
"""

from decay_pruning.graph._graph import Graph, Importance

__all__ = ["Graph", "Importance"]
