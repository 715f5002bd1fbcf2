"""How many multiply-accumulates a model does, product by product, and which widths each product grows with.

The model runs once under a mode that sees every product of every layer, however it is called, on any device. Attention
is counted as its two products whichever kernel computes them. A product's MACs are proportional to each of its axes, so
they are known for other widths, too: those of `x @ w.T` for both dimensions of w, those of q @ kᵀ for the rows of the
weight that made q. 1 MAC = 2 FLOPs.
"""

from decay_pruning.counting._count import See, count
from decay_pruning.counting._makers import VIEWS, Axis, Makers, joined
from decay_pruning.counting._products import EINSTEIN, RULES, Ledger, Product, spelled

__all__ = [
    "EINSTEIN",
    "RULES",
    "VIEWS",
    "Axis",
    "Ledger",
    "Makers",
    "Product",
    "See",
    "count",
    "joined",
    "spelled",
]
