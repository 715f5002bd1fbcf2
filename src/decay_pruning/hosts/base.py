"""What a host is: the pruning method that picks.

A host never fades and never removes anything. It is asked for picks when it is time, may add something to the gradients
of every step, and sees the network through a `Scene`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any, Protocol

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from decay_pruning.budget import Cost, CostModel, Quantity
from decay_pruning.checks import Count, NotNegative, Share, check, did_you_mean, shown
from decay_pruning.errors import ConfigError
from decay_pruning.graph import Graph
from decay_pruning.structures import Picks, StructureSet

#: Modules that keep their width: dotted names, modules themselves, or types of modules.
Ignored = Annotated[tuple[str | nn.Module | type[nn.Module], ...], "a list of names of modules"]


#: Outputs that keep their shape.
OutputNames = Annotated[tuple[str | int, ...], "a list of names of outputs, or of their numbers"]


@dataclass(frozen=True)
class Goal:
    """What a pick has to reach.

    Attributes:
        of: "macs", "params", "structures", "latency" or "memory".
        at_most: how much of it may be left, in absolute figures (seconds, bytes).
        weighs: whether scores are weighed by what a structure costs of it, see `Target.per_cost`.
        within: how far a measured latency may lie above it.
        try_out: whether a pick is put on the clock before it is taken, where latency is the goal.
    """

    of: Quantity
    at_most: NotNegative
    weighs: bool = False
    within: Share = 0.0
    try_out: bool = False

    def __post_init__(self) -> None:
        check(self, "goal")

    def met(self, cost: Cost) -> bool:
        """Whether a model of this cost is small enough."""
        within = self.within if cost.measured else 0.0
        return float(getattr(cost, self.of)) <= self.at_most * (1 + within)


@dataclass(frozen=True)
class Phase:
    """What a host wants the training to do now; the trainer of the lab follows it, and so can any loop.

    Attributes:
        name: "tick", "tock", …, in the words of the host.
        step: optimizer steps of this phase that are done.
        lr: learning rate of the next step, or None where the host leaves it to the loop.
    """

    name: str
    step: Count
    lr: NotNegative | None = None

    def __post_init__(self) -> None:
        check(self, "phase")


@dataclass
class Scene:
    """The network as a host sees it.

    Attributes:
        model: the user's model, unwrapped.
        optimizer: the optimizer that trains it.
        graph: scores structures with an importance.
        structures: what is there now, in current positions.
        parameters: by name.
        costs: predicts what is left after a removal.
        step: optimizer steps done since the pruner was attached.
        start: step at which the first structures are picked.
        total: optimizer steps of the whole training, where the user has told.
        goal: what is to be left in the end.
        decaying: how many structures decay.
        held: how many are held at zero until they are removed.
        one_step: picks are zeroed in the step in which they are made (N = 1): the host's own pruning.
    """

    model: nn.Module
    optimizer: Optimizer
    graph: Graph
    structures: StructureSet
    parameters: Mapping[str, Tensor]
    costs: CostModel
    step: int
    start: int
    total: int | None
    goal: Goal
    decaying: int
    held: int
    find_eligible: Callable[[], Mapping[str, Tensor]]
    find_fading: Callable[[], Mapping[str, Tensor]]
    find_wanting: Callable[[], bool]
    one_step: bool = False

    def eligible(self) -> Mapping[str, Tensor]:
        """Which structures can be picked now: layer group → bool, parallel to its `ids`.

        What decays, is held, or cools down after a release is not.
        """
        return self.find_eligible()

    def fading(self) -> Mapping[str, Tensor]:
        """What is on its way out, decaying or held: layer group → bool, parallel to its `ids`.

        The same object is returned until something is picked, released or removed.
        """
        return self.find_fading()

    def wanting(self) -> bool:
        """Whether more has to be picked: training has come to `start`, and what is fading does not meet the goal."""
        return self.find_wanting()


class Picker:
    """A host at work on one network: it picks, and may take part in training. Subclasses keep their state here.

    Each training step is `add_gradients`, the optimizer's own move, `moved`, `may_remove`, `after_step`. Most hosts are
    asked for a `pick` before a step when it is time, and again when that has been removed. Those that time
    themselves (`Host.rounds` is 0) say in `moved` what starts to fade, also while earlier picks still do.
    """

    @property
    def rests(self) -> bool:
        """Whether it only picks, and wants nothing of steps in which nothing fades and nothing is picked."""
        takes_part = ("add_gradients", "moved", "after_step", "may_remove")
        return all(getattr(type(self), name) is getattr(Picker, name) for name in takes_part)

    def attach(self, scene: Scene) -> None:
        """Before any training: the time to change how the model computes, but not what."""

    def detach(self, scene: Scene) -> None:
        """After the last removal: the time to undo what `attach` did. Can be called more than once."""

    def phase(self, scene: Scene) -> Phase | None:
        """What the next step belongs to; None for a host without phases."""
        return None

    def add_gradients(self, scene: Scene, scale: Tensor | None) -> None:
        """Add to `.grad` before each step (sparse learning). Gradients are `scale` times too large under a scaler."""

    def moved(self, scene: Scene, goal: Goal) -> Picks:
        """What a host that times itself wants to fade from this step on; empty where it is not time.

        Asked right after the optimizer's move, and only while the scene is `wanting`. It may change weights.

        Raises:
            BudgetError: it is time, and nothing can be picked; nothing was changed. Where structures cool down, they
                become eligible and the host is asked once more.
        """
        return {}

    def may_remove(self, scene: Scene) -> bool:
        """Whether what is held at zero leaves now; asked in each step in which something is held."""
        return not scene.decaying

    def settled(self, scene: Scene) -> bool:
        """Whether the widths are as they should be once all that fades is gone; if not, there is another pick."""
        return True

    def check(self, scene: Scene, goal: Goal) -> None:
        """Raise `BudgetError` where the goal is out of reach, before any training."""

    def pick(self, scene: Scene, goal: Goal) -> Picks:
        """Structures to prune so that the goal is met, all of them eligible."""
        raise NotImplementedError

    def after_step(self, scene: Scene) -> None:
        """After each step: everything has moved and decayed, and what has come to its end is removed."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved to go on bit for bit."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""


def as_picks(picks: object, structures: StructureSet) -> dict[str, list[int]]:
    """Picks as a user's host returns them, in plain lists, ascending and without repetition.

    Indices can come in any iterable of whole numbers: a list, a set, a generator, an array, a tensor.

    Raises:
        ConfigError: they are something else, or of a layer group or structure that does not exist.
    """
    if not isinstance(picks, Mapping):
        raise ConfigError(
            f"a host returns a mapping, layer group -> indices of structures; got {shown(picks)}"
        )
    found = {}
    for name, ids in picks.items():
        if name not in structures.groups:
            hint = did_you_mean(name, structures.groups)
            raise ConfigError(f"a host picked from {shown(name)}, which is no layer group{hint}")
        if indices := _indices(name, ids, set(structures.groups[name].ids.tolist())):
            found[name] = indices
    return found


def _indices(name: str, ids: object, known: set[int]) -> list[int]:
    wanted = f"picks of layer group {name!r} must be whole numbers, the indices of structures"
    if isinstance(ids, Tensor | np.ndarray) and "bool" in str(ids.dtype):
        raise ConfigError(f"{wanted}; got a mask: pass structures.groups[{name!r}].ids[mask]")
    if (
        isinstance(ids, str | bytes | Mapping)
        or not isinstance(ids, Iterable)
        or getattr(ids, "ndim", 1) != 1
    ):
        raise ConfigError(f"{wanted}; got {shown(ids)}")
    values: Iterable[Any] = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids
    found = set()
    for value in values:
        if isinstance(value, Tensor) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ConfigError(f"{wanted}; got {shown(value)} among them")
        if int(value) not in known:
            raise ConfigError(f"layer group {name!r} has no structure {shown(int(value))} (any more)")
        found.add(int(value))
    return sorted(found)


class Host(Protocol):
    """The settings of a pruning method, and how it is set to work."""

    @property
    def rounds(self) -> int:
        """In how many rounds the target is approached; 0 where the host times its picks by itself (`Picker.moved`)."""

    @property
    def interval(self) -> int:
        """Optimizer steps between the end of one round's decay and the next pick.

        If `rounds` is 0, the steps from one pick to the next on average, of which a fractional N is then a share;
        0 where there is no such thing, and N is a share of the training.
        """

    def graph(self, model: nn.Module, example_inputs: object) -> Graph:
        """Find the structures of a model."""

    def begin(self) -> Picker:
        """Set to work on a network."""
