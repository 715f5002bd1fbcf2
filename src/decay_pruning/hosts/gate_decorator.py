"""Gate Decorator (You et al., NeurIPS 2019): a gate φ on every channel (see `gates`), and those whose loss is least go.

Training alternates:

    Tock   everything trains, with λ Σ|φ| in the loss; the learning rate rises to the middle and falls again
    Tick   convolutions rest; every batch adds |φ · ∂L/∂φ| to the scores; at the end the lowest share is picked

One Tock first, another one after every `ticks` Ticks, until the target is met; then plain fine-tuning. Gates that
batch-norms share through additions are one structure of the dependency graph: their scores are added up.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from decay_pruning.checks import Count, NotNegative, Share, Whole, check
from decay_pruning.errors import BudgetError, ConfigError
from decay_pruning.graph import Graph
from decay_pruning.hosts.base import Goal, Ignored, OutputNames, Phase, Picker, Scene
from decay_pruning.hosts.gates import Gates, as_gated, fold, gate, with_role
from decay_pruning.hosts.ranking import choose, weighed
from decay_pruning.structures import Picks, Role, StructureSet

logger = logging.getLogger("decay_pruning")

DecayIn = Literal["tick", "own"]


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
        ignored, heads, allow_inexact, outputs: see `DepGraph`.

    Raises:
        ConfigError: a value is out of range.
    """

    tick: Whole = 391
    tock: Count = 3910
    ticks: Whole = 10
    share: Share = 0.005
    min_kept: Share = 0.1
    strength: NotNegative = 1e-3
    lr_min: NotNegative = 1e-3
    lr_max: NotNegative = 1e-2
    eta: NotNegative = 0.0
    decay_in: DecayIn = "tick"
    ignored: Ignored = ()
    heads: Mapping[str, Whole] = field(default_factory=dict)
    allow_inexact: bool = False
    outputs: OutputNames = ()

    def __post_init__(self) -> None:
        check(self, "host")
        if self.lr_min > self.lr_max:
            raise ConfigError(
                f"host.lr_min must lie between 0 and host.lr_max = {self.lr_max}, not {self.lr_min}"
            )

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
            model,
            example_inputs,
            ignored=self.ignored,
            heads=self.heads,
            allow_inexact=self.allow_inexact,
            outputs=self.outputs,
        )

    def begin(self) -> Picker:
        """Set to work on a network."""
        return _TickTock(self)

    def triangle(self, n: int, steps: int) -> float:
        """Learning rate of step n (from 0) of a Tock or a fine-tuning: lr_min → lr_max → lr_min."""
        return self.lr_min + (self.lr_max - self.lr_min) * (1 - abs(2 * n / steps - 1))


# -------------------------------------------------------------------------------------------- Tick and Tock


class _TickTock(Picker):
    """Tock, Tick, Tick, …, Tock, Tick, …, until the target is met; then fine-tuning."""

    def __init__(self, host: GateDecorator) -> None:
        self._host = host
        self._phase = "tock" if host.tock else "tick"
        self._begun = 0  # step at which the phase begins or began
        self._ticks = 0  # Ticks that are over
        self._picked_at = -1
        #: Σ |φ·∂L/∂φ| over this Tick (or the last one), one per structure of the original model
        self._scores: Tensor | None = None
        self._gated: list[str] = []
        self._model: nn.Module | None = None
        # worked out anew whenever structures or gates change
        self._structures: StructureSet | None = None
        self._widths: dict[str, int] = {}  # of the original model
        self._gates: Gates
        self._convolutions: list[nn.Parameter] = []
        self._norms: list[Tensor] = []  # φ, or γ where there are no gates
        self._virtual: list[Tensor] = []  # weights behind virtual gates

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
        self._structures = None
        _forget(scene.model, self._gated, scene.optimizer)
        self._begun = scene.start

    def detach(self, scene: Scene) -> None:
        _forget(scene.model, fold(scene.model), scene.optimizer)
        self._gated = []
        self._structures = None

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
            self._scores = None
        logger.info("step %d: %s", scene.step, phase)

    # -- each step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_gradients(self, scene: Scene, scale: Tensor | None) -> None:
        if scene.step < self._begun:
            return
        if self._phase == "tick":
            self._scores = self._scored(scene)
            for p in self._convolutions:
                p.grad = None  # every optimizer leaves such a parameter alone
        elif self._phase == "tock" and self._host.strength:
            self._sparsify(scene, scale)

    def _sparsify(self, scene: Scene, scale: Tensor | None) -> None:
        """Add the gradients of λ Σ|φ|.

        A virtual gate is 1, and goes into its weights after every step: what λ takes from it makes them smaller by as
        large a share, as weight decay would.
        """
        self._refresh(scene)
        norms, virtual = ([p for p in each if p.grad is not None] for each in (self._norms, self._virtual))
        if not norms and not virtual:
            return
        pulls = [*(torch._foreach_sign(norms) if norms else ()), *virtual]
        gradients = [p.grad for p in (*norms, *virtual) if p.grad is not None]
        if scale is None:
            torch._foreach_add_(gradients, pulls, alpha=self._host.strength)
        else:
            torch._foreach_add_(gradients, torch._foreach_mul(pulls, scale * self._host.strength))

    def moved(self, scene: Scene, goal: Goal) -> Picks:
        if self._phase != "tick" or scene.step + 1 - self._begun < self._host.tick or _busy(scene):
            return {}
        assert self._scores is not None
        scores = self._priced(scene, self._by_group(self._scores))
        picks = self._lowest(scene, scores, goal, share=self._host.share)
        self._picked_at = scene.step
        return picks

    def pick(self, scene: Scene, goal: Goal) -> Picks:
        """For the whole goal at once: by the scores so far, or by Σ w² before there are any."""
        self._refresh(scene)
        scores = self._scores
        if scores is None:
            scores = self._gates.sums(scene.parameters, scene.parameters)
        return self._lowest(scene, self._priced(scene, self._by_group(scores)), goal, share=None)

    # -- ranking -----------------------------------------------------------------------------------------

    def _refresh(self, scene: Scene) -> None:
        """Keep up with surgery, with gates that come and go, and with a model that moves to another device."""
        parameters = scene.parameters
        if self._structures is scene.structures and not self._gates.moved(parameters):
            return
        self._structures = scene.structures
        self._widths = {name: len(group) for name, group in scene.graph.structures.groups.items()}
        self._gates = Gates(scene.structures, self._widths, self._gated, parameters)
        norms = [(name, m) for name, m in scene.model.named_modules() if isinstance(m, _BatchNorm)]
        self._norms = [m.weight for _, m in norms if m.weight is not None]
        inside = {f"{name}.{own}" for name, _ in norms for own in ("weight", "bias")}
        self._virtual = [parameters[name] for name in self._gates.names if name not in inside]
        convolutions = [m for m in scene.model.modules() if isinstance(m, _ConvNd)]
        self._convolutions = [p for m in convolutions for p in m.parameters(recurse=False)]

    def _scored(self, scene: Scene) -> Tensor:
        """The scores with |φ·∂L/∂φ| of this batch added."""
        self._refresh(scene)
        gradients = {name: scene.parameters[name].grad for name in self._gates.names}
        scores = self._gates.sums(scene.parameters, gradients)
        scale = getattr(scene.optimizer, "grad_scale", None)
        if scale is not None:
            scores = scores / scale
        return scores if self._scores is None else scores + self._scores.to(scores.device)

    def _by_group(self, scores: Tensor) -> dict[str, Tensor]:
        """Layer group → one score per structure of the original model."""
        parts = scores.cpu().split(list(self._widths.values()))
        return dict(zip(self._widths, parts, strict=True))

    def _priced(self, scene: Scene, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores of the structures that are there: layer group → one per id, less η times what they cost."""
        found = {
            name: scores[name][group.ids]
            for name, group in scene.structures.groups.items()
            if name in self._gates.joined
        }
        if self._host.eta:
            areas = {
                name: [scene.costs.uses(c.tensor) for c in with_role(group, Role.ROW)]
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
        self._refresh(scene)
        scores = weighed(scene, scores, goal)
        gates = self._gates.joined
        ranked: list[tuple[float, str, int]] = []
        live = 0
        for name, group in scene.structures.groups.items():
            if name not in gates:
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
            scene = replace(scene, find_eligible=lambda: allowed)
            goal = replace(goal, weighs=False)
            return choose(scene, scores, goal, round_to=1, strict=share is None)
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
            "scores": None if self._scores is None else self._by_group(self._scores),
            "gated": list(self._gated),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on; the values of the gates come with the state of the model."""
        assert self._model is not None, "attach comes first"
        fold(self._model)
        self._gated = list(state["gated"])
        as_gated(self._model, self._gated)
        self._phase, self._begun = state["phase"], state["begun"]
        self._ticks, self._picked_at = state["ticks"], state["picked_at"]
        scores = state["scores"]
        self._scores = None if scores is None else torch.cat([scores[name] for name in self._widths])
        self._structures = None


def _busy(scene: Scene) -> bool:
    return bool(scene.decaying or scene.held)


def _forget(model: nn.Module, names: list[str], optimizer: Optimizer) -> None:
    """Drop what the optimizer remembers of batch-norms whose parameters mean something else from now on."""
    for name in names:
        for p in model.get_submodule(name).parameters(recurse=False):
            optimizer.state.pop(p, None)
