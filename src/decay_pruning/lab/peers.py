"""Peers: torch-pruning's own pruning, as its users run it, as further arms of a comparison.

| arm | what it does from the dense start on |
|---|---|
| tp-one-shot | prunes once, at the start |
| tp-iterative | prunes in five rounds over the first 40 % of the steps |
| tp-growing-reg | trains half of the steps under growing regularisation (Wang et al., ICLR 2021), then prunes once |

Each removal is torch-pruning's own: small steps of its pruner until the target is met, as in `reproduce/main.py` of its
repository. What follows it is what its users do, too: a fresh optimizer. Dense start, data, steps, learning rates,
importance and ranking are those of the other arms.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch.optim import Optimizer

from decay_pruning.budget import Cost, Target, measure
from decay_pruning.engine import Event
from decay_pruning.errors import BudgetError, ConfigError
from decay_pruning.hosts import DepGraph, Goal, Host
from decay_pruning.hosts.depgraph import IMPORTANCES
from decay_pruning.pruner import Progress, PruningReport
from decay_pruning.surgery import untouched

logger = logging.getLogger(__name__)

#: Steps of torch-pruning's pruner from the whole network to nothing, as in its `reproduce/main.py`.
_INCREMENTS = 400


@dataclass(frozen=True)
class GrowingReg:
    """How regularisation grows; the defaults are those of torch-pruning's `reproduce/main.py`.

    Attributes:
        base: strength for all channels from the start.
        growth: by how much it has grown in the end for the least important channel of a layer group; for the most
            important one it does not grow.
        updates: in how many equal parts it grows.
    """

    base: float = 5e-4
    growth: float = 1e-2
    updates: int = 100


@dataclass(frozen=True)
class Peer:
    """How a peer spends its steps.

    Attributes:
        removals: when it prunes, each time an equal part of the way to the target: shares of the steps.
        growing: regularisation until the first removal.
    """

    removals: tuple[float, ...]
    growing: GrowingReg | None = None


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
    if host.heads or host.min_kept != 1 or host.round_to != 1:
        raise ConfigError("arms of torch-pruning do not take the host's heads, min_kept and round_to")
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
        self._model, self._example, self._optimizer, self._target = model, example, optimizer, target
        self._host, self._on_event = checked(host), on_event
        structures = self._host.graph(model, example).structures
        self._unprunable = structures.unprunable
        self._removals = [start + max(1, round(share * (total_steps - start))) for share in peer.removals]
        self._growing = (
            _Growing(peer.growing, optimizer, self._removals[0] - start) if peer.growing is not None else None
        )
        modules = dict(model.named_modules())
        self._pruner = self._torch_pruning([modules[name] for name in self._unprunable if name in modules])
        self._heads = {modules[name]: name for name in structures.groups}
        width = self._pruner.DG.get_out_channels
        self._alive = {name: list(range(width(module))) for module, name in self._heads.items()}
        self._widths = {name: len(ids) for name, ids in self._alive.items()}
        self._before = self._cost = self._measure()
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
            self._growing.before_step(self._pruner, self._model)

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
        while not goal.met(self._cost):
            if self._pruner.current_step == _INCREMENTS:
                raise BudgetError(
                    f"torch-pruning cannot meet the target: {100 * getattr(self._cost, goal.of) / before:.1f} % of "
                    f"{goal.of} are left, the target is {100 * keep:.1f} %"
                )
            for group in self._pruner.step(interactive=True):
                self._note(group)
                group.prune()
            self._cost = self._measure()
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

    def _torch_pruning(self, ignored: list[nn.Module]) -> Any:
        """torch-pruning's pruner, from the whole network to nothing in small steps."""
        importance = self._host.importance
        kind = tp.pruner.GrowingRegPruner if self._growing else tp.pruner.BasePruner
        with untouched(self._model):  # its tracing leaves the model in evaluation mode
            return kind(
                self._model,
                self._example,
                importance=IMPORTANCES[importance]() if isinstance(importance, str) else importance,
                global_pruning=self._host.scope == "global",
                pruning_ratio=1.0,
                iterative_steps=_INCREMENTS,
                ignored_layers=ignored,
                in_channel_groups={},  # its defaults are shared by all pruners, and filled
                out_channel_groups={},
                num_heads={},
                **(self._growing.strength if self._growing else {}),
            )

    def _note(self, group: Any) -> None:
        """Take down which channels a group of torch-pruning's is about to remove."""
        for dep, channels in group:
            name = self._heads.get(dep.target.module)
            if name is not None and self._pruner.DG.is_out_channel_pruning_fn(dep.handler):
                gone = set(channels)
                self._alive[name] = [index for i, index in enumerate(self._alive[name]) if i not in gone]
                return

    def _measure(self) -> Cost:
        cost = measure(self._model, self._example)
        return replace(cost, structures=sum(len(ids) for ids in self._alive.values()))


class _Growing:
    """Adds the regulariser to the gradients, in place of weight decay, as torch-pruning's script does."""

    def __init__(self, settings: GrowingReg, optimizer: Optimizer, steps: int) -> None:
        self._every = max(1, steps // settings.updates)
        #: For torch-pruning's `GrowingRegPruner`.
        self.strength = {"reg": settings.base, "delta_reg": settings.growth / (steps // self._every)}
        self._groups = optimizer.param_groups
        self._decay = [group["weight_decay"] for group in self._groups]
        self._step = 0

    def before_step(self, pruner: Any, model: nn.Module) -> None:
        """Add to the gradients, and grow when it is time."""
        for group in self._groups:
            group["weight_decay"] = 0.0
        pruner.regularize(model)
        self._step += 1
        if self._step % self._every == 0:
            pruner.update_reg()

    def end(self) -> None:
        """Give the optimizer its weight decay back."""
        for group, decay in zip(self._groups, self._decay, strict=True):
            group["weight_decay"] = decay
