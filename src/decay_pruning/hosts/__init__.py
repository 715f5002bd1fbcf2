"""Hosts: the pruning methods that pick. One file each."""

from decay_pruning.hosts.base import Goal, Host, Picker, Scene
from decay_pruning.hosts.custom import Custom
from decay_pruning.hosts.depgraph import DepGraph, SparseLearning
from decay_pruning.hosts.ranking import choose

#: Hosts by name, for recipes.
HOSTS: dict[str, type] = {"depgraph": DepGraph}

__all__ = ["HOSTS", "Custom", "DepGraph", "Goal", "Host", "Picker", "Scene", "SparseLearning", "choose"]
