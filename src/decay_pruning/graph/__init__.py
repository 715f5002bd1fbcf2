"""Graph: a model and example inputs → its `StructureSet`, by a tracer of our own.

Where to look:

- `axes` (and `positions`): the algebra. Every dimension of every parameter starts as an axis of its own.
- `trace`, `run`, `op`: the model runs under a dispatch mode, and every operation is handed to its rule.
- `rules/`: which axes an operation ties, one entry for each kind of operator.
- `layers` and `attributes`: what operations do not show of torch's own layers, and of the numbers on a user's.
- `families`, `choices`, `proposals`: axes that nothing fixes are layer groups; which of those that cross are offered.
- `verification/`: nothing is believed. Every layer group is tried on the model itself, with random values in its
  weights, before it is offered; what fails is unprunable, and `_reasons` says why.
"""

from decay_pruning.graph._graph import Graph, Importance

__all__ = ["Graph", "Importance"]
