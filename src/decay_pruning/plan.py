"""A plan: what would be removed, printed before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from decay_pruning.budget import Cost, CostModel, Target, as_target
from decay_pruning.checks import as_inputs, checked, did_you_mean
from decay_pruning.errors import ConfigError
from decay_pruning.graph import Graph
from decay_pruning.hosts import DepGraph, Goal, Host, Scene, as_host, choose
from decay_pruning.structures import Picks, StructureSet
from decay_pruning.valueless import is_valueless

#: Widths that most machines work in, and the share of the saving from which on others are worth a word.
_EVEN, _MUCH = 8, 0.15


@dataclass(frozen=True)
class Plan:
    """Layer by layer, what a removal would leave.

    Attributes:
        picks: what would go: layer group → original indices.
        widths: layer group → (now, after).
        now, after: cost of the whole model.
        unprunable: what cannot be pruned → the reason.
        verified: how it was verified that these structures can go, in words.
        picked: by what they were picked, in words; empty where nothing was.
        rounded: cost with each new width rounded up to a multiple of 8. On most machines the model takes as long as
            that one would.
    """

    picks: Picks
    widths: Mapping[str, tuple[int, int]]
    now: Cost
    after: Cost
    unprunable: Mapping[str, str]
    verified: str = ""
    picked: str = ""
    rounded: Cost | None = None

    @classmethod
    def of(
        cls, structures: StructureSet, picks: Picks, costs: CostModel, *, verified: str = "", picked: str = ""
    ) -> Plan:
        """The plan of removing `picks`."""
        widths = {name: (len(g), len(g) - len(picks.get(name, ()))) for name, g in structures.groups.items()}
        fewer = {name: ids[: _to_even(*widths[name])] for name, ids in picks.items()}
        return cls(
            dict(picks),
            widths,
            costs.now,
            costs.after_picks(picks),
            dict(structures.unprunable),
            verified,
            picked,
            costs.after_picks(fewer),
        )

    @property
    def wasted(self) -> float:
        """The share of the MACs saved that odd widths take back where the machine works in multiples of 8."""
        saved = self.now.macs - self.after.macs
        return (self.rounded.macs - self.after.macs) / saved if self.rounded and saved > 0 else 0.0

    def __str__(self) -> str:
        pad = max([len(name) for name in [*self.widths, *self.unprunable]], default=0)
        lines = [f"{'layer group':<{pad}}   width"]
        for name, (now, after) in self.widths.items():
            lines.append(f"{name:<{pad}}   {now}" + (f" -> {after}" if after != now else ""))
        for label, field in (("MACs", "macs"), ("parameters", "params"), ("structures", "structures")):
            a, b = getattr(self.now, field), getattr(self.after, field)
            change = f" -> {b:,} ({100 * b / max(a, 1):.1f} %)" if b != a else ""
            lines.append(f"{label:<{pad}}   {a:,}{change}")
        for field, unit, word in (("latency", 1e-3, "ms"), ("memory", 2**20, "MiB")):
            a, b = getattr(self.now, field), getattr(self.after, field)
            if a is not None and b is not None:
                change = f" -> {b / unit:.4g} {word} ({100 * b / a:.1f} %)" if b != a else ""
                lines.append(f"{field:<{pad}}   {a / unit:.4g} {word}{change}")
        if self.wasted > _MUCH and self.after.latency is None:
            lines.append(
                f"odd widths: rounded up to multiples of {_EVEN}, in which most machines work, they take back "
                f"{100 * self.wasted:.0f} % of the MACs saved. A host with round_to={_EVEN} or a target of latency "
                "keeps what costs nothing."
            )
        if self.unprunable:
            lines.append("not prunable:")
            lines += [f"{name:<{pad}}   {reason}" for name, reason in self.unprunable.items()]
        lines += [f"picked {self.picked}"] * bool(self.picked) + [self.verified] * bool(self.verified)
        return "\n".join(lines)


def inspect(
    model: nn.Module,
    example_inputs: Any,
    host: Host | None = None,
    *,
    target: Target | float | None = None,
    **options: Any,
) -> Plan:
    """Structures, layer groups, cost, and what cannot be pruned and why; with a target also what would go.

    Nothing is removed. The model may be on the meta device, where it has shapes and no weights: one of many billion
    parameters is looked at on a laptop. Layer groups are then tried on a small twin of it, which the plan says, and the
    same share of each would go, unless a host is given that needs no weights.

    Args:
        model: any model.
        example_inputs: see `Pruner`; for a model on the meta device they may be ordinary tensors.
        host: find the structures as this host does; with its settings, so without options.
        target: what is to be left, see `Pruner`; None picks nothing.
        options: `ignored`, `heads`, `allow_inexact`, `outputs`, see `DepGraph`.

    Raises:
        ConfigError: both a host and options, an option that is unknown or has a wrong value, or a target with a host
            that picks by what it sees in training, or by weights that are not there.
        GraphError: the model cannot be traced, or nothing in it can be pruned.
        BudgetError: the target is out of reach even if all that can go goes.
    """
    if host is not None and options:
        raise ConfigError(f"give {', '.join(options)} to the host, not beside it")
    model, example_inputs = checked(model, nn.Module, "model"), as_inputs(example_inputs)
    wanted = None if target is None else as_target(target)
    finder = as_host(host) if host is not None else DepGraph(**_known(options))
    if wanted is not None and not finder.rounds:
        raise ConfigError(
            f"{type(finder).__name__} picks by what it sees in training, so there is no plan before it; leave out the "
            "target"
        )
    graph = finder.graph(model, example_inputs)
    costs = CostModel(model, example_inputs, graph.structures, wanted)
    picks: Picks = {}
    picked = ""
    if wanted is not None:
        scene = _scene(model, graph, costs, wanted)
        if host is None and is_valueless(model):
            nothing = {name: torch.zeros(len(group)) for name, group in graph.structures.groups.items()}
            picks = choose(scene, nothing, scene.goal, scope="local")
            picked = "the same share of every layer group, since the model has no weights to rank them by"
        else:
            picks, picked = finder.begin().pick(scene, scene.goal), f"by {type(finder).__name__}"
    return Plan.of(graph.structures, picks, costs, verified=graph.verified, picked=picked)


def _scene(model: nn.Module, graph: Graph, costs: CostModel, target: Target) -> Scene:
    """A network that nobody trains yet."""
    structures = graph.structures
    every = {name: torch.ones(len(group), dtype=torch.bool) for name, group in structures.groups.items()}
    none = {name: ~mask for name, mask in every.items()}
    parameters = dict(model.named_parameters())
    return Scene(
        model=model,
        optimizer=torch.optim.SGD(parameters.values(), lr=0.0),
        graph=graph,
        structures=structures,
        parameters=parameters,
        costs=costs,
        step=0,
        start=0,
        total=None,
        goal=Goal(target.of, target.at_most(getattr(costs.now, target.of)), target.weighs),
        decaying=0,
        held=0,
        find_eligible=lambda: every,
        find_fading=lambda: none,
        find_wanting=lambda: True,
        one_step=True,
    )


def _to_even(now: int, after: int) -> int:
    """How many of a layer group go if what stays is rounded up to a multiple."""
    return max(0, now - -(-after // _EVEN) * _EVEN)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    known = ("ignored", "heads", "allow_inexact", "outputs")
    for name in options:
        if name not in known:
            raise ConfigError(
                f"inspect has no option {name!r}, only {', '.join(known)}{did_you_mean(name, known)}"
            )
    return options
