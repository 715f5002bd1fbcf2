"""Verification: every layer group is tried on the model before it is offered.

First whether the smaller model runs at all, on a twin without values (`_shapes`); then layer groups are cut out of the
model itself, alone and together, and put back (`_trials`); `_verify` draws the conclusions.
"""

from decay_pruning.graph.verification._trials import kind_of
from decay_pruning.graph.verification._verify import Second, demote, verified

__all__ = ["Second", "demote", "kind_of", "verified"]
