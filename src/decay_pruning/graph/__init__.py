"""Graph: a model and example inputs → its `StructureSet`, by a tracer of our own.

The model runs once under a dispatch mode (`trace`). Every dimension of every parameter starts as an axis of its own
(`axes`), each operation says which axes must stay equal (`rules`), and torch's layers add what operations do not show
(`layers`). Axes that nothing fixes are the layer groups (`families`).

Nothing is believed: every layer group is tried on the model itself, with random values in its weights, before it
is offered. What fails is listed as unprunable with the reason.
"""

from decay_pruning.graph._graph import Graph, Importance

__all__ = ["Graph", "Importance"]
