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
        rounded: cost with each new width rounded up to a multiple of 8. On most machines the model takes as long as
            that one would.
    """

    picks: Picks
    widths: Mapping[str, tuple[int, int]]
    now: Cost
    after: Cost
    unprunable: Mapping[str, str]
    rounded: Cost | None = None

    @classmethod
    def of(cls, structures: StructureSet, picks: Picks, costs: CostModel) -> Plan:
        """The plan of removing `picks`."""
        widths = {name: (len(g), len(g) - len(picks.get(name, ()))) for name, g in structures.groups.items()}
        fewer = {name: ids[: _to_even(*widths[name])] for name, ids in picks.items()}
        return cls(
            dict(picks),
            widths,
            costs.now,
            costs.after_picks(picks),
            dict(structures.unprunable),
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
        return "\n".join(lines)


def inspect(model: nn.Module, example_inputs: Any, host: Host | None = None, **options: Any) -> Plan:
    """Structures, layer groups, cost, and what cannot be pruned and why, as a plan that removes nothing.

    Args:
        model: any model.
        example_inputs: see `Pruner`.
        host: find the structures as this host does; with its settings, so without options.
        options: `ignored`, `heads`, `allow_inexact`, see `DepGraph`.

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


def _to_even(now: int, after: int) -> int:
    """How many of a layer group go if what stays is rounded up to a multiple."""
    return max(0, now - -(-after // _EVEN) * _EVEN)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    known = ("ignored", "heads", "allow_inexact")
    for name in options:
        if name not in known:
            raise ConfigError(
                f"inspect has no option {name!r}, only {', '.join(known)}{did_you_mean(name, known)}"
            )
    return options
