"""Hosts: the pruning methods that pick. One file each."""

from decay_pruning.hosts.base import Goal, Host, Phase, Picker, Scene
from decay_pruning.hosts.custom import Custom, as_host
from decay_pruning.hosts.depgraph import DepGraph, SparseLearning
from decay_pruning.hosts.gate_decorator import GateDecorator
from decay_pruning.hosts.otov2 import OTOv2
from decay_pruning.hosts.ranking import choose

#: Hosts by name, for recipes.
HOSTS: dict[str, type] = {"depgraph": DepGraph, "otov2": OTOv2, "gate-decorator": GateDecorator}

__all__ = [
    "HOSTS",
    "Custom",
    "DepGraph",
    "GateDecorator",
    "Goal",
    "Host",
    "OTOv2",
    "Phase",
    "Picker",
    "Scene",
    "SparseLearning",
    "as_host",
    "choose",
]
