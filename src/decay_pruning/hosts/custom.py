"""Any pruning method as a host: a function that returns structures to prune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from decay_pruning.checks import Count, Whole, check, shown
from decay_pruning.errors import ConfigError
from decay_pruning.graph import Graph
from decay_pruning.hosts.base import Goal, Host, Ignored, OutputNames, Picker, Scene, as_picks
from decay_pruning.hosts.depgraph import DepGraph
from decay_pruning.structures import Picks


@dataclass(frozen=True)
class Custom:
    """A user's own function as a host, with the same decay, rectifying, surgery and target.

    Attributes:
        function: (scene, goal) → layer group → original indices, from the eligible structures. `choose(scene,
            scores, goal)` makes picks from scores. Structures are removed as returned; if the goal is not met by
            them, the function is asked again.
        ignored, heads, allow_inexact, rounds, interval, outputs: see `DepGraph`.

    Raises:
        ConfigError: a value is out of range, or `function` is none.
    """

    function: Callable[[Scene, Goal], Picks]
    ignored: Ignored = ()
    heads: Mapping[str, Whole] = field(default_factory=dict)
    allow_inexact: bool = False
    rounds: Whole = 1
    interval: Count = 0
    outputs: OutputNames = ()

    def __post_init__(self) -> None:
        check(self, "host")

    def graph(self, model: nn.Module, example_inputs: object) -> Graph:
        """Find the structures of a model."""
        return Graph(
            model,
            example_inputs,
            ignored=self.ignored,
            heads=self.heads,
            allow_inexact=self.allow_inexact,
            outputs=self.outputs,
        )

    def begin(self) -> Picker:
        """Set to work on a network."""
        return _Function(self.function)


def as_host(host: Host | Callable[[Scene, Goal], Picks] | None) -> Host:
    """A host as the user gives it: none is DepGraph, and a function that picks is one, too.

    Raises:
        ConfigError: it is something else.
    """
    if host is None:
        return DepGraph()
    if isinstance(host, type):
        raise ConfigError(f"host is the class {host.__name__}; make one: {host.__name__}()")
    if all(hasattr(host, name) for name in ("begin", "graph", "rounds", "interval")):
        return cast(Host, host)
    if callable(host):
        return Custom(host)
    raise ConfigError(
        f"host must be a host such as DepGraph(), or a function (scene, goal) -> picks, got {shown(host)}"
    )


class _Function(Picker):
    def __init__(self, function: Callable[[Scene, Goal], Picks]) -> None:
        self._function = function

    def pick(self, scene: Scene, goal: Goal) -> Picks:
        return as_picks(self._function(scene, goal), scene.structures)
