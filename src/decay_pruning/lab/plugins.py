"""Hosts and arms of your own in a recipe, named as "module:function"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from decay_pruning.budget import Target
from decay_pruning.checks import check
from decay_pruning.engine import Event
from decay_pruning.graph import Graph
from decay_pruning.hosts import Host, Picker, as_host
from decay_pruning.lab import own
from decay_pruning.lab.trainer import PrunerLike


@dataclass(frozen=True)
class OwnHost:
    """A host of your own.

    Attributes:
        name: "module:function" for a function that returns a host, or a function (scene, goal) → picks, which is one.
        options: what the function takes.
        beside: a folder that the module is looked for in first; of a recipe file, its own.

    Raises:
        ConfigError: no such function, or it returns no host.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: str | None = None

    def __post_init__(self) -> None:
        check(self, "host")
        _ = self.made

    @cached_property
    def made(self) -> Host:
        """What the function returns."""
        make = own.find(self.name, "host", self.beside)
        return as_host(own.call(make, f"host {self.name!r}", {}, self.options))

    def __reduce__(self) -> tuple[Any, ...]:  # to another process goes the name, not what was made of it
        return OwnHost, (self.name, self.options, self.beside)

    @property
    def rounds(self) -> int:
        """In how many picks the target is reached."""
        return self.made.rounds

    @property
    def interval(self) -> int:
        """Steps from the end of one decay to the next pick."""
        return self.made.interval

    def graph(self, model: nn.Module, example_inputs: object) -> Graph:
        """Find the structures of a model."""
        return self.made.graph(model, example_inputs)

    def begin(self) -> Picker:
        """Set to work on a network."""
        return self.made.begin()


@dataclass(frozen=True)
class OwnArm:
    """An arm of your own: another way to prune, from the same dense start, with the same data, steps and rates.

    Attributes:
        name: "module:function". It gets what it has parameters for: `model`, `example_inputs`, `optimizer`, `target`,
            `host`, `smooth`, `rectify`, `total_steps`, `start`, `on_event` (see `Pruner`). It returns what the trainer
            asks: a `Pruner`, or whatever else has its `done`, `progress()`, `norms()`, `phase()` and `finish()`.
        options: what else it takes.
        beside: a folder that the module is looked for in first; of a recipe file, its own.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: str | None = None

    def __post_init__(self) -> None:
        check(self)
        _ = self._function

    @property
    def _function(self) -> Callable[..., Any]:
        return own.find(self.name, "arm", self.beside)

    def attach(
        self,
        model: nn.Module,
        example: Tensor,
        optimizer: Optimizer,
        target: Target,
        on_event: Callable[[Event], None],
        **shared: Any,
    ) -> PrunerLike:
        """Its pruner, on the optimizer."""
        offered = {
            "model": model,
            "example_inputs": example,
            "optimizer": optimizer,
            "target": target,
            "on_event": on_event,
            **shared,
        }
        pruner: PrunerLike = own.call(self._function, f"arm {self.name!r}", offered, self.options)
        return pruner
