"""Gate Decorator (You et al., NeurIPS 2019): a gate on every batch-norm channel, ranked by what its loss would change.

A gated batch-norm computes (x̂ + β')·φ in place of x̂·γ + β, with φ = γ and β' = β/γ: the same function, but now one
number per channel turns the whole channel off. Training alternates:

    Tock   everything trains, with λ Σ|φ| in the loss; the learning rate rises to the middle and falls again
    Tick   convolutions rest; every batch adds |φ · ∂L/∂φ| to the scores; at the end the lowest share is picked

One Tock first, another one after every `ticks` Ticks, until the target is met; then plain fine-tuning. Gates that
batch-norms share through additions are one structure of the dependency graph: their scores are added up.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from decay_pruning.errors import BudgetError, ConfigError
from decay_pruning.graph import Graph
from decay_pruning.hosts.base import Goal, Phase, Picker, Scene
from decay_pruning.hosts.ranking import choose
from decay_pruning.structures import Coupling, LayerGroup, Picks, Place, Role, StructureSet

logger = logging.getLogger("decay_pruning")

DecayIn = Literal["tick", "own"]

#: A batch-norm with |β| > 10 |γ| in a channel keeps its plain form: β/γ would be too large to be trained.
_LARGEST_SHIFT = 10.0


@dataclass(frozen=True)
class GateDecorator:
    """Gate Decorator as a host. The defaults are those of VGG16 on CIFAR-10, with batches of 128.

    Attributes:
        tick: optimizer steps of a Tick (the paper's are one epoch).
        tock: optimizer steps of a Tock; 0 for none.
        ticks: Ticks from one Tock to the next (the paper's T).
        share: of the live gates, how many are picked at the end of a Tick (the paper's p); at least one.
        min_kept: share of the gates that every layer group keeps, of its original width.
        strength: λ, the factor of Σ|φ| in a Tock.
        lr_min, lr_max: learning rate of Ticks, and the highest one of Tocks and of the fine-tuning (see `Phase`).
        eta: how much the score is lowered where a channel costs more: by η · area · live channels, over the smallest
            area, for each layer that produces the channel.
        decay_in: "tick": what was picked decays while the next phase goes on; "own": it decays in a phase of its own,
            in which everything trains at `lr_min`.
        ignored, heads, allow_inexact: see `DepGraph`.

    Raises:
        ConfigError: a value is out of range.
    """

    tick: int = 391
    tock: int = 3910
    ticks: int = 10
    share: float = 0.005
    min_kept: float = 0.1
    strength: float = 1e-3
    lr_min: float = 1e-3
    lr_max: float = 1e-2
    eta: float = 0.0
    decay_in: DecayIn = "tick"
    ignored: tuple[str, ...] = ()
    heads: Mapping[str, int] = field(default_factory=dict)
    allow_inexact: bool = False

    def __post_init__(self) -> None:
        for name, least in (("tick", 1), ("tock", 0), ("ticks", 1), ("strength", 0), ("eta", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"host.{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("share", "min_kept"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"host.{name} is a share in [0, 1), not {getattr(self, name)}")
        if not 0 <= self.lr_min <= self.lr_max:
            raise ConfigError(
                f"host.lr_min must lie between 0 and host.lr_max = {self.lr_max}, not {self.lr_min}"
            )
        if self.decay_in not in get_args(DecayIn):
            raise ConfigError(f"host.decay_in must be 'tick' or 'own', not {self.decay_in!r}")

    @property
    def rounds(self) -> int:
        """0: as many as the target takes, timed by Ticks."""
        return 0

    @property
    def interval(self) -> int:
        """Optimizer steps from one pick to the next, on average."""
        return self.tick + round(self.tock / self.ticks)

    def graph(self, model: nn.Module, example_inputs: object) -> Graph:
        """Find the structures of a model."""
        return Graph(
            model, example_inputs, ignored=self.ignored, heads=self.heads, allow_inexact=self.allow_inexact
        )

    def begin(self) -> Picker:
        """Set to work on a network."""
        return _TickTock(self)

    def triangle(self, n: int, steps: int) -> float:
        """Learning rate of step n (from 0) of a Tock or a fine-tuning: lr_min → lr_max → lr_min."""
        return self.lr_min + (self.lr_max - self.lr_min) * (1 - abs(2 * n / steps - 1))


# ------------------------------------------------------------------------------------------- gated batch-norm


class _Gated(_BatchNorm):
    """Batch-norm whose `weight` is the gate φ and whose `bias` is β': (x̂ + β')·φ.

    The parameters are those of the plain batch-norm, with other values: optimizer, graph and surgery need not know.
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        tracks = self.training and self.track_running_stats
        momentum = self.momentum
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # a plain mean over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        remembers = tracks or not self.training
        return F.batch_norm(
            x,
            self.running_mean if remembers else None,
            self.running_var if remembers else None,
            self.weight,
            self.bias * self.weight,
            self.training or self.running_mean is None,
            momentum or 0.0,
            self.eps,
        )


class GatedBatchNorm1d(_Gated, nn.BatchNorm1d):
    """`nn.BatchNorm1d` in gated form."""


class GatedBatchNorm2d(_Gated, nn.BatchNorm2d):
    """`nn.BatchNorm2d` in gated form."""


class GatedBatchNorm3d(_Gated, nn.BatchNorm3d):
    """`nn.BatchNorm3d` in gated form."""


_GATED: dict[type, type] = {
    nn.BatchNorm1d: GatedBatchNorm1d,
    nn.BatchNorm2d: GatedBatchNorm2d,
    nn.BatchNorm3d: GatedBatchNorm3d,
}
_PLAIN = {gated: plain for plain, gated in _GATED.items()}


@torch.no_grad()
def gate(model: nn.Module) -> list[str]:
    """Bring every batch-norm of a model into gated form; what the model computes stays the same.

    A batch-norm stays as it is where it has no weights of its own (not affine, frozen, tied, half precision), is
    of another class (a synchronised or a user's own one), or has a channel with |β| > 10 |γ|.

    Returns:
        The names of the gated ones.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users[id(p)] = users.get(id(p), 0) + 1
    gated = []
    for name, module in model.named_modules():
        if type(module) not in _GATED or module.weight is None or module.bias is None:
            continue
        scale, shift = module.weight, module.bias
        own = all(p.requires_grad and users[id(p)] == 1 for p in (scale, shift))
        if not own or scale.dtype not in (torch.float32, torch.float64):
            continue
        large = int(shift.abs().gt(_LARGEST_SHIFT * scale.abs()).sum())
        if large:
            logger.info(
                "%s gets no gates: in %d channels its bias is over %g times its scale",
                name,
                large,
                _LARGEST_SHIFT,
            )
            continue
        shift.copy_(torch.where(scale == 0, 0.0, shift / scale))
        module.__class__ = _GATED[type(module)]
        gated.append(name)
    return gated


@torch.no_grad()
def fold(model: nn.Module) -> list[str]:
    """Bring every gated batch-norm back into its plain class; what the model computes stays the same.

    Returns:
        The names of those that were gated.
    """
    folded = []
    for name, module in model.named_modules():
        if isinstance(module, _Gated):
            module.bias.mul_(module.weight)
            module.__class__ = _PLAIN[type(module)]
            folded.append(name)
    return folded


# -------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class _Gate:
    """A vector of gates: one per channel of one layer.

    Multiplying a channel by φ = 1 behind a layer is multiplying its weights, so φ·∂L/∂φ = Σ w·∂L/∂w over them. Layers
    without batch-norm have such virtual gates; in a gated batch-norm the only weight is φ itself.

    Attributes:
        group: layer group.
        parts: the weights: (parameter, dimension) of each.
        coupling: which positions belong to which structure.
    """

    group: str
    parts: tuple[Place, ...]
    coupling: Coupling


def _gates(structures: StructureSet, gated: frozenset[str]) -> list[_Gate]:
    """All gates: of the norms of each layer group, or, where it has none, of the layers that produce it."""
    return [
        _Gate(name, _parts(group, coupling, gated), coupling)
        for name, group in structures.groups.items()
        for coupling in (_with_role(group, Role.SCALE) or _with_role(group, Role.ROW))
    ]


def _with_role(group: LayerGroup, role: Role) -> list[Coupling]:
    return [c for c in group.couplings if c.role is role]


def _parts(group: LayerGroup, coupling: Coupling, gated: frozenset[str]) -> tuple[Place, ...]:
    module = coupling.tensor.rpartition(".")[0]
    if module in gated:
        return (coupling.place,)
    partners = [
        c.place
        for c in _with_role(group, Role.SHIFT if coupling.role is Role.SCALE else Role.BIAS)
        if c.tensor.rpartition(".")[0] == module and torch.equal(c.position, coupling.position)
    ]
    return coupling.place, *partners


@torch.no_grad()
def _strength(gate: _Gate, parameters: Mapping[str, Tensor], *, of_gradient: bool) -> Tensor:
    """|φ·∂L/∂φ| of every channel, or Σ w² without gradients; parallel to the coupling's owners."""
    first, dim = gate.parts[0]
    wide = torch.promote_types(parameters[first].dtype, torch.float32)
    total = parameters[first].new_zeros(parameters[first].shape[dim], dtype=wide)
    for name, dim in gate.parts:
        weight = parameters[name]
        other = weight.grad if of_gradient else weight
        if other is not None:
            total += (weight.to(wide) * other).movedim(dim, 0).reshape(total.numel(), -1).sum(1)
    return total.abs()[gate.coupling.position.to(total.device)]


# -------------------------------------------------------------------------------------------- Tick and Tock


class _TickTock(Picker):
    """Tock, Tick, Tick, …, Tock, Tick, …, until the target is met; then fine-tuning."""

    def __init__(self, host: GateDecorator) -> None:
        self._host = host
        self._phase = "tock" if host.tock else "tick"
        self._begun = 0  # step at which the phase begins or began
        self._ticks = 0  # Ticks that are over
        self._picked_at = -1
        #: layer group → sum of |φ·∂L/∂φ| over this Tick (or the last one), by original index
        self._scores: dict[str, Tensor] = {}
        self._gated: list[str] = []
        self._model: nn.Module | None = None
        self._known: tuple[StructureSet, list[_Gate]] | None = None

    # -- gates in, gates out -----------------------------------------------------------------------------

    def check(self, scene: Scene, goal: Goal) -> None:
        nothing = {name: torch.zeros(len(group)) for name, group in scene.structures.groups.items()}
        try:
            self._lowest(scene, nothing, goal, share=None)
        except BudgetError as error:
            raise BudgetError(
                f"{error} (host.min_kept = {self._host.min_kept} of every layer stays.)"
            ) from None

    def attach(self, scene: Scene) -> None:
        self._model = scene.model
        self._gated = gate(scene.model)
        self._known = None
        _forget(scene.model, self._gated, scene.optimizer)
        self._begun = scene.start

    def detach(self, scene: Scene) -> None:
        _forget(scene.model, fold(scene.model), scene.optimizer)
        self._gated = []

    # -- phases ------------------------------------------------------------------------------------------

    def phase(self, scene: Scene) -> Phase | None:
        if scene.step < self._begun:
            return None
        host, n = self._host, scene.step - self._begun
        lr: float | None = host.lr_min
        if self._phase == "tock":
            lr = host.triangle(n, host.tock)
        elif self._phase == "fine-tune":
            lr = None if scene.total is None else host.triangle(n, max(1, scene.total - self._begun))
        return Phase(self._phase, n, lr)

    def after_step(self, scene: Scene) -> None:
        host, n = self._host, scene.step - self._begun
        if self._phase == "fine-tune" or n <= 0:
            return
        if scene.goal.met(scene.costs.now) and not _busy(scene):
            self.detach(scene)
            self._enter("fine-tune", scene)
        elif self._phase == "tock":
            if n >= host.tock:
                self._enter("tick", scene)
        elif self._phase == "decay":
            if not _busy(scene):
                self._enter(self._after_tick(), scene)
        elif self._picked_at == scene.step - 1:
            self._ticks += 1
            own = host.decay_in == "own" and _busy(scene)
            self._enter("decay" if own else self._after_tick(), scene)

    def _after_tick(self) -> str:
        return "tock" if self._host.tock and self._ticks % self._host.ticks == 0 else "tick"

    def _enter(self, phase: str, scene: Scene) -> None:
        self._phase, self._begun = phase, scene.step
        if phase == "tick":
            self._scores = {}
        logger.info("step %d: %s", scene.step, phase)

    # -- each step ---------------------------------------------------------------------------------------

    def add_gradients(self, scene: Scene, scale: Tensor | None) -> None:
        if scene.step < self._begun:
            return
        if self._phase == "tick":
            self._scores = self._scored(scene)
            for module in scene.model.modules():
                if isinstance(module, _ConvNd):
                    for p in module.parameters(recurse=False):
                        p.grad = None  # every optimizer leaves such a parameter alone
        elif self._phase == "tock" and self._host.strength:
            for module in scene.model.modules():
                if (
                    isinstance(module, _BatchNorm)
                    and module.weight is not None
                    and module.weight.grad is not None
                ):
                    pull = module.weight.detach().sign() * self._host.strength
                    module.weight.grad.add_(pull if scale is None else pull * scale.to(pull.dtype))

    def moved(self, scene: Scene, goal: Goal) -> Picks:
        if self._phase != "tick" or scene.step + 1 - self._begun < self._host.tick or _busy(scene):
            return {}
        picks = self._lowest(scene, self._priced(scene, self._scores), goal, share=self._host.share)
        self._picked_at = scene.step
        return picks

    def pick(self, scene: Scene, goal: Goal) -> Picks:
        """For the whole goal at once: by the scores so far, or by Σ w² before there are any."""
        scores = self._scores or self._scored(scene, of_gradient=False)
        return self._lowest(scene, self._priced(scene, scores), goal, share=None)

    # -- ranking -----------------------------------------------------------------------------------------

    def _all_gates(self, structures: StructureSet) -> list[_Gate]:
        if self._known is None or self._known[0] is not structures:
            self._known = structures, _gates(structures, frozenset(self._gated))
        return self._known[1]

    def _scored(self, scene: Scene, *, of_gradient: bool = True) -> dict[str, Tensor]:
        """The scores with what is there now added: |φ·∂L/∂φ| of this batch, or Σ w²."""
        scale = getattr(scene.optimizer, "grad_scale", None)
        scores = dict(self._scores)
        for gate in self._all_gates(scene.structures):
            strength = _strength(gate, scene.parameters, of_gradient=of_gradient)
            if of_gradient and scale is not None:
                strength = strength / scale
            width = len(scene.graph.structures.groups[gate.group])
            index = scene.structures.groups[gate.group].ids[gate.coupling.owner].to(strength.device)
            before = scores.get(gate.group, strength.new_zeros(width))
            scores[gate.group] = before.to(strength.device).index_add(0, index, strength)
        return scores

    def _priced(self, scene: Scene, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores of the structures that are there: layer group → one per id, less η times what they cost."""
        found = {
            name: scores[name].cpu()[group.ids]
            for name, group in scene.structures.groups.items()
            if name in scores
        }
        if self._host.eta:
            areas = {
                name: [scene.costs.uses(c.tensor) for c in _with_role(group, Role.ROW)]
                for name, group in scene.structures.groups.items()
            }
            smallest = min((a for each in areas.values() for a in each if a > 0), default=1.0)
            for name, score in found.items():
                found[name] = score - self._host.eta * sum(areas[name]) / smallest * score.numel()
        return found

    def _lowest(
        self, scene: Scene, scores: Mapping[str, Tensor], goal: Goal, *, share: float | None
    ) -> Picks:
        """The lowest scores: those that the goal takes, but no more than a share of the live gates.

        As in the original, gates are counted, not structures, and the fewest are picked that are more than the share.
        """
        eligible = scene.eligible()
        gates: dict[str, int] = {}
        for gate in self._all_gates(scene.structures):
            gates[gate.group] = gates.get(gate.group, 0) + 1
        ranked: list[tuple[float, str, int]] = []
        live = 0
        for name, group in scene.structures.groups.items():
            if name not in scores:
                continue
            live += len(group) * gates[name]
            floor = max(1, int(self._host.min_kept * len(scene.graph.structures.groups[name])))
            rows = eligible[name].nonzero().flatten()
            rows = rows[torch.argsort(scores[name][rows], stable=True)][: max(0, len(group) - floor)]
            ranked += [(float(scores[name][row]), name, row) for row in rows.tolist()]
        ranked.sort(key=lambda each: each[0])
        quota = live if share is None else int(share * live)
        allowed = {name: torch.zeros_like(mask) for name, mask in eligible.items()}
        for _, name, row in ranked:
            if quota < 0:
                break
            allowed[name][row] = True
            quota -= gates[name]
        if share is None or goal.met(scene.costs.after(allowed)):
            return choose(replace(scene, find_eligible=lambda: allowed), scores, goal)
        if not ranked:
            raise BudgetError(
                "no gate is left that may be picked: every layer has come down to host.min_kept"
            )
        return {
            name: scene.structures.groups[name].ids[mask].tolist()
            for name, mask in allowed.items()
            if bool(mask.any())
        }

    # -- saving ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "phase": self._phase,
            "begun": self._begun,
            "ticks": self._ticks,
            "picked_at": self._picked_at,
            "scores": {name: score.cpu() for name, score in self._scores.items()},
            "gated": list(self._gated),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on; the values of the gates come with the state of the model."""
        assert self._model is not None, "attach comes first"
        fold(self._model)
        self._gated = list(state["gated"])
        for name in self._gated:
            module = self._model.get_submodule(name)
            module.__class__ = _GATED[type(module)]
        self._phase, self._begun = state["phase"], state["begun"]
        self._ticks, self._picked_at = state["ticks"], state["picked_at"]
        self._scores = dict(state["scores"])
        self._known = None


def _busy(scene: Scene) -> bool:
    return bool(scene.decaying or scene.held)


def _forget(model: nn.Module, names: list[str], optimizer: Optimizer) -> None:
    """Drop what the optimizer remembers of batch-norms whose parameters mean something else from now on."""
    for name in names:
        for p in model.get_submodule(name).parameters(recurse=False):
            optimizer.state.pop(p, None)
