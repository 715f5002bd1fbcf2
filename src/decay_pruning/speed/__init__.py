"""How long a forward pass takes, now and at other widths, on the machine and in the runtime that the user has.

Every product of a forward pass is looked up in a table of times by width; the table is measured where it has gaps,
and kept on disk. Whatever it cannot know (overheads, fusion, caches) comes from measuring the whole model: as it is,
and cut as it would be.
"""

from decay_pruning.speed._latency import LatencyModel
from decay_pruning.speed._runtime import Eager, Runtime, as_runtime, passes
from decay_pruning.speed._table import Table
from decay_pruning.speed._works import Use, Work, uses

__all__ = ["Eager", "LatencyModel", "Runtime", "Table", "Use", "Work", "as_runtime", "passes", "uses"]
