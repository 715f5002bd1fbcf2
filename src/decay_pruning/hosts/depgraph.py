"""DepGraph (Fang et al., CVPR 2023): rank structures of the dependency graph by group importance, prune the lowest.

Importance functions are in `importance`. Sparse learning, its optional preparation, adds a group regulariser to the
gradients before the first pick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from decay_pruning.checks import Count, NotNegative, OneOf, Whole, at_least, check
from decay_pruning.errors import ConfigError
from decay_pruning.graph import Graph
from decay_pruning.hosts import importance as importances
from decay_pruning.hosts import uniform
from decay_pruning.hosts.activations import Activations
from decay_pruning.hosts.base import Goal, Ignored, Picker, Scene
from decay_pruning.hosts.importance import NORMALIZERS, Normalizer, Reduction
from decay_pruning.hosts.ranking import MinKept, Per, Scope, choose
from decay_pruning.structures import Picks, Role, StructureSet

#: Name → a new importance.
IMPORTANCES: Mapping[str, Callable[[Reduction], importances.Importance]] = {
    **importances.IMPORTANCES,
    "activation": lambda _: Activations(),
}
#: One of `hosts.importance`, or a function of a torch-pruning group that returns one score per channel.
Importance = importances.Importance | Callable[[Any], Tensor | None]


@dataclass(frozen=True)
class SparseLearning:
    """The group regulariser of DepGraph's sparse learning (its section 3.3; HOSTS: strength 5e-4).

    For each layer group, with I the norm of a structure over rows, columns and batch-norm γ, the gradient gets
    strength · γ · w with γ = 2^(alpha · (I_max − I)/(I_max − I_min)): 16 times the pull on the weakest at alpha = 4.

    Attributes:
        strength: factor of the regulariser.
        alpha: exponent of the ratio between the weakest and the strongest structure.
        every: steps between two updates of γ.

    Raises:
        ConfigError: a value is out of range.
    """

    strength: NotNegative = 5e-4
    alpha: Annotated[float, at_least(0, most=64)] = 4.0
    every: Whole = 100

    def __post_init__(self) -> None:
        check(self, "sparse")


@dataclass(frozen=True)
class DepGraph:
    """DepGraph as a host.

    Attributes:
        importance: a name, one of `hosts.importance`, or any function of a torch-pruning group that returns one score
            per channel. torch-pruning's default is "magnitude". "activation" is a running mean over training batches.
        normalizer: what the scores of a layer group are divided by, so that those of different layer groups can be
            compared; "none" compares them as they are. None for "none" with "magnitude-l1", and "mean", torch-pruning's
            default, with others. Not used with a function of yours.
        reduction: how the values of the layers of a layer group are put together; None for "sum" with "magnitude-l1",
            and "mean", torch-pruning's default, with others.
        per: rank by score, or by score per MAC or parameter that a structure costs.
        scope: "global" ranks over all layer groups, "local" takes the same share of each.
        ignored: modules that keep their width: dotted names.
        heads: layers whose outputs are attention heads → number of heads; a structure is then the same offset in
            every head.
        allow_inexact: also prune where removal changes the function by its nature (a width under LayerNorm).
        min_kept: structures (int) or share (float) of a layer group that always stays.
        round_to: what stays of each layer group is a multiple of this, rounded up.
        rounds: in how many equal parts of the way the target is approached.
        interval: optimizer steps of plain training between two rounds.
        uniform: layer groups of the same kind in all layers (FFN, heads, KV groups) lose the same number, so that one
            config describes the result; what no config can name keeps its width. Kinds are what the numbers of the
            model's config name (Transformers); elsewhere, layers whose names differ by their number alone.
        sparse: group regulariser on all structures until the first pick (give the pruner a `start`).

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    importance: Annotated[str, OneOf(IMPORTANCES)] | Importance = "magnitude-l1"
    normalizer: Normalizer | None = None
    reduction: Reduction | None = None
    per: Per = "structure"
    scope: Scope = "global"
    ignored: Ignored = ()
    heads: Mapping[str, Whole] = field(default_factory=dict)
    allow_inexact: bool = False
    min_kept: MinKept = 1
    round_to: Whole = 1
    rounds: Whole = 1
    interval: Count = 0
    uniform: bool = False
    sparse: SparseLearning | None = None

    def __post_init__(self) -> None:
        check(self, "host")

    def graph(self, model: nn.Module, example_inputs: object) -> Graph:
        """Find the structures of a model."""
        return Graph(
            model, example_inputs, ignored=self.ignored, heads=self.heads, allow_inexact=self.allow_inexact
        )

    def begin(self) -> Picker:
        """Set to work on a network."""
        return _Ranking(self)

    @property
    def chosen_normalizer(self) -> Normalizer:
        """The normalizer, or the one that goes with the importance."""
        return self.normalizer or ("none" if self.importance == "magnitude-l1" else "mean")

    @property
    def chosen_reduction(self) -> Reduction:
        """The reduction, or the one that goes with the importance."""
        return self.reduction or ("sum" if self.importance == "magnitude-l1" else "mean")

    def scores(self, model: nn.Module, graph: Graph, structures: StructureSet) -> dict[str, Tensor]:
        """Layer group → one score per structure, in the order of `ids`; the lowest go first."""
        importance = self.importance
        if isinstance(importance, str):
            importance = IMPORTANCES[importance](self.chosen_reduction)
        if not isinstance(importance, importances.Importance):
            return graph.scores(importance, structures)
        return self.normalised(importances.scores(importance, model, structures))

    def normalised(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same, made comparable between layer groups."""
        divisor = NORMALIZERS[self.chosen_normalizer]
        return {name: (score / divisor(score)).nan_to_num(nan=0.0) for name, score in scores.items()}


class _Ranking(Picker):
    """Picks by rank; adds the group regulariser until the first pick."""

    def __init__(self, host: DepGraph) -> None:
        self._host = host
        self._regulariser = GroupRegulariser(host.sparse) if host.sparse is not None else None
        self._activations = Activations() if host.importance == "activation" else None
        self._kinds: uniform.Kinds | None = None

    def attach(self, scene: Scene) -> None:
        if self._activations is not None:
            self._activations.attach(scene.model, scene.structures)

    def detach(self, scene: Scene) -> None:
        if self._activations is not None:
            self._activations.detach()

    def after_step(self, scene: Scene) -> None:
        if self._activations is not None:
            self._activations.active = scene.step < scene.start or scene.wanting()

    def settled(self, scene: Scene) -> bool:
        return self._kinds is None or self._kinds.even(scene.structures, scene.fading())

    def check(self, scene: Scene, goal: Goal) -> None:
        host = self._host
        if host.uniform:
            self._kinds = uniform.kinds(scene.model, scene.structures, host.round_to or 1)
        self._choose(
            scene, {name: torch.zeros(len(group)) for name, group in scene.structures.groups.items()}, goal
        )

    def pick(self, scene: Scene, goal: Goal) -> Picks:
        host = self._host
        if host.importance == "taylor" and all(p.grad is None for p in scene.parameters.values()):
            raise ConfigError(
                "importance 'taylor' needs gradients: pick inside optimizer.step(), after loss.backward()"
            )
        if self._activations is not None:
            if not self._activations.ready:
                raise ConfigError(
                    "importance 'activation' needs batches: train for a step before you ask for a plan"
                )
            seen = importances.scores(self._activations, scene.model, scene.structures)
            return self._choose(scene, host.normalised(seen), goal)
        return self._choose(scene, host.scores(scene.model, scene.graph, scene.structures), goal)

    def _choose(self, scene: Scene, scores: Mapping[str, Tensor], goal: Goal) -> Picks:
        host = self._host
        return choose(
            scene,
            scores,
            goal,
            scope=host.scope,
            per=host.per,
            min_kept=host.min_kept,
            round_to=host.round_to,
            kinds=self._kinds,
        )

    def add_gradients(self, scene: Scene, scale: Tensor | None) -> None:
        if self._regulariser is None or scene.step >= scene.start:
            return
        if scene.step % self._regulariser.settings.every == 0 or not self._regulariser.ready:
            self._regulariser.update(scene.structures, scene.parameters)
        self._regulariser.add(scene.parameters, scale)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"pulls": self._regulariser.factors} if self._regulariser else {}
        return state if self._activations is None else state | self._activations.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._regulariser is not None:
            self._regulariser.factors = list(state["pulls"])
        if self._activations is not None:
            self._activations.load_state_dict(state)


class GroupRegulariser:
    """Adds strength · γ · w to the gradients of all structures, with a few kernels per tensor."""

    _ROLES = frozenset({Role.ROW, Role.COLUMN, Role.SCALE})

    def __init__(self, settings: SparseLearning) -> None:
        self.settings = settings
        #: (parameter, what its values are multiplied with before they are added to the gradient)
        self.factors: list[tuple[str, Tensor]] = []

    @property
    def ready(self) -> bool:
        """Whether γ has been worked out."""
        return bool(self.factors)

    @torch.no_grad()
    def update(self, structures: StructureSet, parameters: Mapping[str, Tensor]) -> None:
        """Work out γ of every structure from its norm now."""
        pulls: dict[tuple[str, int], Tensor] = {}
        for group in structures.groups.values():
            couplings = [c for c in group.couplings if c.role in self._ROLES and c.tensor in parameters]
            if not couplings or not len(group):
                continue
            device = parameters[couplings[0].tensor].device
            square = torch.zeros(len(group), device=device)
            for c in couplings:
                tensor = parameters[c.tensor].detach()
                rest = [d for d in range(tensor.ndim) if d != c.dim]
                along = tensor.float().square().sum(rest) if rest else tensor.float().square()
                square.index_add_(0, c.owner.to(device), along[c.position.to(device)].to(device))
            size = square.sqrt()
            spread = (size.max() - size.min()).clamp_min(1e-12)
            pull = self.settings.strength * 2 ** (self.settings.alpha * (size.max() - size) / spread)
            for c in couplings:
                tensor = parameters[c.tensor]
                factor = pulls.setdefault(c.place, torch.zeros(tensor.shape[c.dim], device=device))
                factor.index_add_(0, c.position.to(device), pull[c.owner.to(device)])
        self.factors = []
        for (name, dim), factor in pulls.items():
            tensor = parameters[name]
            shape = [1] * tensor.ndim
            shape[dim] = -1
            self.factors.append((name, factor.to(tensor.device, tensor.dtype).view(shape)))

    @torch.no_grad()
    def add(self, parameters: Mapping[str, Tensor], scale: Tensor | None) -> None:
        """grad += γ·w, times `scale` where gradients are scaled."""
        for name, factor in self.factors:
            tensor = parameters[name]
            if tensor.grad is not None:
                tensor.grad.addcmul_(tensor, factor if scale is None else factor * scale.to(factor.dtype))
