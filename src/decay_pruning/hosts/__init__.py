"""Hosts: the pruning methods that pick. One file each."""

from decay_pruning.hosts.base import Goal, Host, Picker, Scene
from decay_pruning.hosts.custom import Custom
from decay_pruning.hosts.depgraph import DepGraph, SparseLearning
from decay_pruning.hosts.otov2 import OTOv2
from decay_pruning.hosts.ranking import choose

#: Hosts by name, for recipes.
HOSTS: dict[str, type] = {"depgraph": DepGraph, "otov2": OTOv2}

__all__ = [
    "HOSTS",
    "Custom",
    "DepGraph",
    "Goal",
    "Host",
    "OTOv2",
    "Picker",
    "Scene",
    "SparseLearning",
    "choose",
]
