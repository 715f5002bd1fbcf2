"""What a result file must hold beyond the types of its fields, so that everything that shows it can rely on it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from decay_pruning.errors import ConfigError

if TYPE_CHECKING:
    from decay_pruning.lab.results import Result, Run

_SECTIONS = ("data", "model", "dense", "prune", "report")


def check(result: Result) -> None:
    """See that a result can be shown and gone on with.

    Raises:
        ConfigError: it cannot; the message names the place.
    """
    recipe = result.recipe
    for name in _SECTIONS:
        _section(recipe.get(name, {}), f"recipe.{name}")
    target = recipe.get("prune", {}).get("target", {})
    _section(target, "recipe.prune.target")
    for name, share in target.items():
        if share is not None:
            _number(share, f"recipe.prune.target.{name}")
    for i, run in enumerate(result.runs):
        _run(run, f"runs[{i}]")


def _run(run: Run, at: str) -> None:
    if not re.fullmatch(r"[\w-]+", run.arm):
        raise ConfigError(f"{at}.arm is no name: {run.arm!r}")
    for name in ("accuracy", "accuracy_start", "accuracy_removed", "seconds"):
        value = getattr(run, name)
        if value is not None:
            _number(value, f"{at}.{name}")
    _numbers(run.latency, f"{at}.latency")
    _whole([run.steps], f"{at}.steps", least=1)
    for name, (before, after) in (("macs", run.macs), ("params", run.params)):
        _whole([before], f"{at}.{name}[0]", least=1)
        _whole([after], f"{at}.{name}[1]")
    for i, row in enumerate(run.rows):
        _whole([row.get("step"), row.get("macs", 0)], f"{at}.rows[{i}]")
        if row.get("accuracy") is not None:  # a metric that was not finite for a while is null
            _number(row["accuracy"], f"{at}.rows[{i}].accuracy")
    for i, event in enumerate(run.events):
        _whole([event.get("step"), event.get("count")], f"{at}.events[{i}]")
        _texts([event.get("kind"), event.get("group")], f"{at}.events[{i}]")
    for i, line in enumerate(run.lines):
        if not line.points:
            raise ConfigError(f"{at}.lines[{i}] has no points")
        _numbers([x for point in line.points for x in point], f"{at}.lines[{i}]")
    _report(run.report or {}, f"{at}.report")


def _report(report: Mapping[str, Any], at: str) -> None:
    _whole([report.get(name, 0) for name in ("picked", "released", "picked_again", "removed")], at)
    widths, reasons = report.get("widths", {}), report.get("unprunable", {})
    _section(widths, f"{at}.widths")
    _section(reasons, f"{at}.unprunable")
    for name, pair in widths.items():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ConfigError(f"{at}.widths.{name} must be two whole numbers")
        _whole(pair[:1], f"{at}.widths.{name}", least=1)
        _whole(pair[1:], f"{at}.widths.{name}")
    _texts(reasons.values(), f"{at}.unprunable")


def _section(value: object, at: str) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{at} must be a section")


def _whole(values: Iterable[Any], at: str, least: int = 0) -> None:
    for value in values:
        if type(value) is not int or not least <= value < 2**63:
            raise ConfigError(f"{at} must be a whole number of at least {least}")


def _numbers(values: Iterable[Any], at: str) -> None:
    for value in values:
        _number(value, at)


def _number(value: Any, at: str) -> None:
    if type(value) not in (int, float) or not (math.isfinite(value) and abs(value) < 1e18):
        raise ConfigError(f"{at} must be a finite number")


def _texts(values: Iterable[Any], at: str) -> None:
    if not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{at} must be text")
