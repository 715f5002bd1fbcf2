"""Any pruning method as a host: a function that returns structures to prune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from decay_pruning.checks import Count, Whole, check
from decay_pruning.graph import Graph
from decay_pruning.hosts.base import Goal, Ignored, Picker, Scene
from decay_pruning.structures import Picks


@dataclass(frozen=True)
class Custom:
    """A user's own function as a host, with the same decay, rectifying, surgery and target.

    Attributes:
        function: (scene, goal) → layer group → original indices, from the eligible structures. `choose(scene,
            scores, goal)` makes picks from scores. Structures are removed as returned; if the goal is not met by
            them, the function is asked again.
        ignored, heads, allow_inexact, rounds, interval: see `DepGraph`.

    Raises:
        ConfigError: a value is out of range, or `function` is none.
    """

    function: Callable[[Scene, Goal], Picks]
    ignored: Ignored = ()
    heads: Mapping[str, Whole] = field(default_factory=dict)
    allow_inexact: bool = False
    rounds: Whole = 1
    interval: Count = 0

    def __post_init__(self) -> None:
        check(self, "host")

    def graph(self, model: nn.Module, example_inputs: object) -> Graph:
        """Find the structures of a model."""
        return Graph(
            model, example_inputs, ignored=self.ignored, heads=self.heads, allow_inexact=self.allow_inexact
        )

    def begin(self) -> Picker:
        """Set to work on a network."""
        return _Function(self.function)


class _Function(Picker):
    def __init__(self, function: Callable[[Scene, Goal], Picks]) -> None:
        self._function = function

    def pick(self, scene: Scene, goal: Goal) -> Picks:
        return self._function(scene, goal)
