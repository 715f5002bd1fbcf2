"""Peers: torch-pruning's own pruning, as its users run it, as further arms of a comparison.

| arm | what it does from the dense start on |
|---|---|
| tp-one-shot | prunes once, at the start |
| tp-iterative | prunes in five rounds over the first 40 % of the steps |
| tp-growing-reg | trains half of the steps under growing regularisation (Wang et al., ICLR 2021), then prunes once |

Each removal is one step of torch-pruning's own pruner, with the least ratio that meets the target, tried out on copies.
What follows it is what its users do, too: a fresh optimizer. Dense start, data, steps, learning rates, importance and
ranking are those of the other arms.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from decay_pruning.budget import Cost, Target, measure
from decay_pruning.checks import NotNegative, Share, Whole, check
from decay_pruning.engine import Event
from decay_pruning.errors import BudgetError, ConfigError
from decay_pruning.hosts import DepGraph, Goal, Host
from decay_pruning.progress import Progress, PruningReport
from decay_pruning.surgery import untouched

try:
    import torch_pruning as tp
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "arms of torch-pruning need it: pip install 'decay-pruning[lab]'", name=error.name
    ) from error

logger = logging.getLogger(__name__)

#: torch-pruning's own importance for each name that DepGraph has.
_IMPORTANCES: dict[str, Callable[..., Any]] = {
    "magnitude": partial(tp.importance.GroupMagnitudeImportance, p=2),
    "magnitude-l1": partial(tp.importance.GroupMagnitudeImportance, p=1),
    "taylor": tp.importance.GroupTaylorImportance,
    "fpgm": tp.importance.FPGMImportance,
    "lamp": tp.importance.LAMPImportance,
    "random": tp.importance.RandomImportance,
    "bn-scale": tp.importance.BNScaleImportance,
}
#: How exactly torch-pruning's ratio is searched: a share of all channels.
_PRECISION = 5e-4


@dataclass(frozen=True)
class GrowingReg:
    """How regularisation grows; the defaults are those of torch-pruning's `reproduce/main.py`.

    Attributes:
        base: strength for all channels from the start.
        growth: by how much it has grown in the end for the least important channel of a layer group; for the most
            important one it does not grow.
        updates: in how many equal parts it grows.
    """

    base: NotNegative = 5e-4
    growth: NotNegative = 1e-2
    updates: Whole = 100

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Peer:
    """How a peer spends its steps.

    Attributes:
        removals: when it prunes, each time an equal part of the way to the target: shares of the steps.
        growing: regularisation until the first removal.
    """

    removals: tuple[Share, ...]
    growing: GrowingReg | None = None

    def __post_init__(self) -> None:
        check(self)


PEERS: dict[str, Peer] = {
    "tp-one-shot": Peer(removals=(0.0,)),
    "tp-iterative": Peer(removals=(0.0, 0.1, 0.2, 0.3, 0.4)),
    "tp-growing-reg": Peer(removals=(0.5,), growing=GrowingReg()),
}


def checked(host: Host) -> DepGraph:
    """The host, if torch-pruning can prune by the same settings.

    Raises:
        ConfigError: another host than DepGraph, or settings of it that torch-pruning does not have.
    """
    if not isinstance(host, DepGraph):
        raise ConfigError(
            "arms of torch-pruning rank as DepGraph does: they need prune.host.kind = 'depgraph'"
        )
    if host.heads or host.min_kept != 1 or host.round_to != 1 or host.per != "structure":
        raise ConfigError("arms of torch-pruning do not take the host's heads, min_kept, round_to and per")
    return host


class TorchPruning:
    """A peer riding on the optimizer: what the trainer asks of a pruner.

    Structures are counted as torch-pruning does, in channels of the first layer of each layer group.

    Args:
        peer: one of `PEERS`.
        start: optimizer steps before it begins.
        Others as `decay_pruning.Pruner` has them.

    Raises:
        ConfigError: see `checked`.
        GraphError: nothing in the model can be pruned.
    """

    def __init__(
        self,
        peer: Peer,
        model: nn.Module,
        example: Tensor,
        optimizer: Optimizer,
        target: Target,
        *,
        host: Host,
        total_steps: int,
        start: int,
        on_event: Callable[[Event], None],
    ) -> None:
        if target.of in ("latency", "memory"):
            raise ConfigError(
                f"torch-pruning's arms know no target of {target.of}: macs, params or structures"
            )
        self._model, self._example, self._optimizer, self._target = model, example, optimizer, target
        self._host, self._on_event = checked(host), on_event
        structures = self._host.graph(model, example).structures
        self._unprunable = structures.unprunable
        self._removals = [start + max(1, round(share * (total_steps - start))) for share in peer.removals]
        self._growing = None
        if peer.growing is not None:
            make = partial(self._pruner, tp.pruner.GrowingRegPruner, model)
            self._growing = _Growing(peer.growing, optimizer, self._removals[0] - start, make)
        self._names = tuple(structures.groups)
        self._widths = self._channels(model, self._pruner(tp.pruner.BasePruner, model).DG)
        self._alive = {name: list(range(width)) for name, width in self._widths.items()}
        self._before = self._cost = self._measure(model, self._widths)
        self._ratio = 0.0  # of the channels, that are gone
        self._scopes: dict[str, int] = {}  # what torch-pruning ranks together → its original channels
        self._start, self._step, self._round, self._finished_at = start, 0, 0, 0
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    @property
    def done(self) -> bool:
        """All removals are done."""
        return self._round == len(self._removals)

    def progress(self) -> Progress:
        """Where it is; cheap."""
        return Progress(
            step=self._step,
            round=self._round,
            macs=self._cost.macs,
            params=self._cost.params,
            macs_start=self._before.macs,
            params_start=self._before.params,
            decaying=0,
            held=0,
            released=0,
            removed=self._before.structures - self._cost.structures,
        )

    def norms(self) -> Mapping[str, float]:
        """Nothing decays."""
        return {}

    def phase(self) -> None:
        """The learning rate is the trainer's."""

    def finish(self) -> PruningReport:
        """Take the hooks off the optimizer, and report.

        Raises:
            BudgetError: training ended before the last removal.
        """
        if not self.done:
            raise BudgetError(f"training ended after {self._round} of {len(self._removals)} removals")
        for hook in self._hooks:
            hook.remove()
        removed = self.progress().removed
        return PruningReport(
            macs=(self._before.macs, self._cost.macs),
            params=(self._before.params, self._cost.params),
            structures=(self._before.structures, self._cost.structures),
            picked=removed,
            decayed=0,
            released=0,
            picked_again=0,
            removed=removed,
            rounds=self._round,
            steps=self._finished_at,
            widths={name: (width, len(self._alive[name])) for name, width in self._widths.items()},
            unprunable=dict(self._unprunable),
        )

    # -- inside ----------------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        if self._growing is not None and self._step >= self._start:
            self._growing.before_step(self._model)

    def _after_step(self) -> None:
        self._step += 1
        rounds = sum(step <= self._step for step in self._removals)
        if rounds > self._round:
            self._round = rounds
            if self._growing is not None:
                self._growing.end()
                self._growing = None
            self._remove(rounds / len(self._removals))

    def _remove(self, way: float) -> None:
        """Prune this part (0 … 1) of the way to the target, and start the optimizer anew."""
        before, keep = getattr(self._before, self._target.of), self._target.keep
        goal = Goal(self._target.of, before * (keep * way + (1 - way)))
        alive = dict(self._alive)
        names = {id(p): name for name, p in self._model.named_parameters()}
        frozen = [name for name, p in self._model.named_parameters() if not p.requires_grad]
        trained = [[names[id(p)] for p in group["params"]] for group in self._optimizer.param_groups]
        if not goal.met(self._cost):  # an earlier round can have gone further than it had to
            self._ratio = self._least(goal)
            self._cost = self._prune(self._model, self._ratio)
        parameters = dict(self._model.named_parameters())
        for name in frozen:
            parameters[name].requires_grad_(False)  # torch-pruning's new parameters all train
        for group, members in zip(self._optimizer.param_groups, trained, strict=True):
            group["params"] = [parameters[name] for name in members]
        self._optimizer.state.clear()
        self._finished_at = self._step
        for name, ids in alive.items():
            if gone := tuple(sorted(set(ids) - set(self._alive[name]))):
                self._on_event(Event("picked", self._step - 1, name, gone))
                self._on_event(Event("removed", self._step, name, gone))
        share = 100 * getattr(self._cost, goal.of) / before
        logger.info("step %d: torch-pruning left %.2f %% of %s", self._step, share, goal.of)

    def _least(self, goal: Goal) -> float:
        """The least ratio that meets the goal, as far as trials on copies tell.

        Not simply by bisection from 0 to 1: torch-pruning leaves a layer whole that a high ratio would take away.
        """

        def meets(ratio: float) -> bool:
            trial = copy.deepcopy(self._model)
            for mine, theirs in zip(trial.parameters(), self._model.parameters(), strict=True):
                mine.grad = theirs.grad  # for importances that look at gradients
            return goal.met(self._prune(trial, ratio))

        low = self._ratio
        high = next((ratio for i in range(1, 21) if (ratio := low + i / 20) < 1 and meets(ratio)), None)
        if high is None:
            now = getattr(self._cost, goal.of)
            raise BudgetError(
                f"torch-pruning has no ratio that leaves {goal.at_most:,.0f} of now {now:,} {goal.of}"
            )
        low = high - 1 / 20
        while high - low > _PRECISION:
            middle = (low + high) / 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high

    def _prune(self, model: nn.Module, ratio: float) -> Cost:
        """One step of torch-pruning's pruner, to this ratio of the original channels; what is left."""
        pruner = self._pruner(tp.pruner.BasePruner, model, pruning_ratio=ratio)
        pruner._scope_initial_channels = scopes = dict(self._scopes)  # as if it had made the earlier rounds
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())  # random scores are those of the trials
            for group in pruner.step(interactive=True):
                if model is self._model:
                    self._note(group, pruner.DG)
                group.prune()
        if model is self._model:
            self._scopes = scopes
        return self._measure(model, self._channels(model, pruner.DG))

    def _importance(self) -> Any:
        host = self._host
        if not isinstance(host.importance, str):
            return host.importance
        if host.importance not in _IMPORTANCES:
            raise ConfigError(f"torch-pruning has no importance {host.importance!r}: leave out the arms tp-…")
        if host.importance in ("lamp", "random"):
            return _IMPORTANCES[host.importance]()
        normalizer = None if host.chosen_normalizer == "none" else host.chosen_normalizer
        return _IMPORTANCES[host.importance](group_reduction=host.chosen_reduction, normalizer=normalizer)

    def _pruner(self, kind: Callable[..., Any], model: nn.Module, **more: Any) -> Any:
        """One of torch-pruning's pruners for a model as it is now."""
        ignored = [module for name, module in model.named_modules() if name in self._unprunable]
        with untouched(model):  # its tracing leaves the model in evaluation mode
            return kind(
                model,
                self._example,
                importance=self._importance(),
                global_pruning=self._host.scope == "global",
                ignored_layers=ignored,
                in_channel_groups={},  # its defaults are shared by all pruners, and filled
                out_channel_groups={},
                num_heads={},
                **more,
            )

    def _note(self, group: Any, graph: Any) -> None:
        """Take down which channels a group of torch-pruning's is about to remove."""
        names = {self._model.get_submodule(name): name for name in self._names}
        for dep, channels in group:
            name = names.get(dep.target.module)
            if name is not None and graph.is_out_channel_pruning_fn(dep.handler):
                gone = set(channels)
                self._alive[name] = [index for i, index in enumerate(self._alive[name]) if i not in gone]
                return

    def _channels(self, model: nn.Module, graph: Any) -> dict[str, int]:
        return {name: int(graph.get_out_channels(model.get_submodule(name))) for name in self._names}

    def _measure(self, model: nn.Module, channels: Mapping[str, int]) -> Cost:
        return replace(measure(model, self._example), structures=sum(channels.values()))


class _Growing:
    """Adds the regulariser to the gradients, in place of weight decay, as torch-pruning's script does."""

    def __init__(
        self, settings: GrowingReg, optimizer: Optimizer, steps: int, make: Callable[..., Any]
    ) -> None:
        self._every = max(1, steps // settings.updates)
        growth = settings.growth / (steps // self._every)
        self._pruner = make(reg=settings.base, delta_reg=growth)
        self._groups = optimizer.param_groups
        self._decay = [group["weight_decay"] for group in self._groups]
        self._step = 0

    def before_step(self, model: nn.Module) -> None:
        """Add to the gradients, and grow when it is time."""
        for group in self._groups:
            group["weight_decay"] = 0.0
        self._pruner.regularize(model)
        self._step += 1
        if self._step % self._every == 0:
            self._pruner.update_reg()

    def end(self) -> None:
        """Give the optimizer its weight decay back."""
        for group, decay in zip(self._groups, self._decay, strict=True):
            group["weight_decay"] = decay
