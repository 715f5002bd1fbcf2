"""A plan: what would be removed, printed before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from decay_pruning.budget import Cost, CostModel
from decay_pruning.checks import as_inputs, checked, did_you_mean
from decay_pruning.errors import ConfigError
from decay_pruning.hosts import DepGraph, Host, as_host
from decay_pruning.structures import Picks, StructureSet


@dataclass(frozen=True)
class Plan:
    """Layer by layer, what a removal would leave.

    Attributes:
        picks: what would go: layer group → original indices.
        widths: layer group → (now, after).
        now, after: cost of the whole model.
        unprunable: what cannot be pruned → the reason.
    """

    picks: Picks
    widths: Mapping[str, tuple[int, int]]
    now: Cost
    after: Cost
    unprunable: Mapping[str, str]

    @classmethod
    def of(cls, structures: StructureSet, picks: Picks, costs: CostModel) -> Plan:
        """The plan of removing `picks`."""
        widths = {name: (len(g), len(g) - len(picks.get(name, ()))) for name, g in structures.groups.items()}
        return cls(dict(picks), widths, costs.now, costs.after_picks(picks), dict(structures.unprunable))

    def __str__(self) -> str:
        pad = max([len(name) for name in [*self.widths, *self.unprunable]], default=0)
        lines = [f"{'layer group':<{pad}}   width"]
        for name, (now, after) in self.widths.items():
            lines.append(f"{name:<{pad}}   {now}" + (f" -> {after}" if after != now else ""))
        for label, field in (("MACs", "macs"), ("parameters", "params"), ("structures", "structures")):
            a, b = getattr(self.now, field), getattr(self.after, field)
            change = f" -> {b:,} ({100 * b / max(a, 1):.1f} %)" if b != a else ""
            lines.append(f"{label:<{pad}}   {a:,}{change}")
        if self.unprunable:
            lines.append("not prunable:")
            lines += [f"{name:<{pad}}   {reason}" for name, reason in self.unprunable.items()]
        return "\n".join(lines)


def inspect(model: nn.Module, example_inputs: Any, host: Host | None = None, **options: Any) -> Plan:
    """Structures, layer groups, cost, and what cannot be pruned and why, as a plan that removes nothing.

    Args:
        model: any model.
        example_inputs: see `Pruner`.
        host: find the structures as this host does; with its settings, so without options.
        options: `ignored`, `heads`, `allow_inexact`, `outputs`, see `DepGraph`.

    Raises:
        ConfigError: both a host and options, or an option that is unknown or has a wrong value.
        GraphError: the model cannot be traced, or nothing in it can be pruned.
    """
    if host is not None and options:
        raise ConfigError(f"give {', '.join(options)} to the host, not beside it")
    model, example_inputs = checked(model, nn.Module, "model"), as_inputs(example_inputs)
    finder = as_host(host) if host is not None else DepGraph(**_known(options))
    graph = finder.graph(model, example_inputs)
    return Plan.of(graph.structures, {}, CostModel(model, example_inputs, graph.structures))


def _known(options: dict[str, Any]) -> dict[str, Any]:
    known = ("ignored", "heads", "allow_inexact", "outputs")
    for name in options:
        if name not in known:
            raise ConfigError(
                f"inspect has no option {name!r}, only {', '.join(known)}{did_you_mean(name, known)}"
            )
    return options
