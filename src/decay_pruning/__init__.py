"""Structured pruning without the accuracy cliff: the Decay Pruning Method (Yang et al., arXiv 2406.03879).

pruner = Pruner(model, example_inputs, optimizer, Target(macs=0.5), total_steps=len(loader) * epochs)
...  # your training loop, unchanged
report = pruner.finish()
"""

from decay_pruning import schedules
from decay_pruning.budget import Cost, Target, latency, measure, memory
from decay_pruning.copies import prune_like
from decay_pruning.decay import SmoothPruning
from decay_pruning.engine import Event
from decay_pruning.errors import (
    BudgetError,
    ConfigError,
    DataError,
    DecayPruningError,
    ExportError,
    GraphError,
    ManifestError,
    SurgeryError,
    WriteError,
)
from decay_pruning.exporting import Exported, export
from decay_pruning.hosts import (
    Custom,
    DepGraph,
    GateDecorator,
    Goal,
    Host,
    OTOv2,
    Phase,
    Picker,
    Scene,
    SparseLearning,
    choose,
)
from decay_pruning.manifest import load, save
from decay_pruning.plan import Plan, inspect
from decay_pruning.progress import Progress, PruningReport
from decay_pruning.pruner import Pruner
from decay_pruning.rectify import SelfRectifying
from decay_pruning.stateful import Stateful
from decay_pruning.structures import Coupling, LayerGroup, Picks, Role, StructureSet

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "ConfigError",
    "Cost",
    "Coupling",
    "Custom",
    "DataError",
    "DecayPruningError",
    "DepGraph",
    "Event",
    "ExportError",
    "Exported",
    "GateDecorator",
    "Goal",
    "GraphError",
    "Host",
    "LayerGroup",
    "ManifestError",
    "OTOv2",
    "Phase",
    "Picker",
    "Picks",
    "Plan",
    "Progress",
    "Pruner",
    "PruningReport",
    "Role",
    "Scene",
    "SelfRectifying",
    "SmoothPruning",
    "SparseLearning",
    "Stateful",
    "StructureSet",
    "SurgeryError",
    "Target",
    "WriteError",
    "choose",
    "export",
    "inspect",
    "latency",
    "load",
    "measure",
    "memory",
    "prune_like",
    "save",
    "schedules",
]
