"""Small networks by kind: two of each that no report and no other test has named.

Each entry says which layer groups are expected, with their numbers of structures, and words of the reasons of what is
refused. `test_kinds.py` tries all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Build = Callable[[], tuple[nn.Module, Any]]


@dataclass(frozen=True)
class Kind:
    """One network.

    Attributes:
        build: makes the model and its example inputs.
        groups: layer group → number of structures.
        refused: layer → words of its reason, beside the layers that feed the output.
        options: for the graph.
    """

    build: Build
    groups: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {}


def kind(
    name: str, groups: Mapping[str, int] = {}, refused: Mapping[str, str] = {}, **options: Any
) -> Callable[[Build], Build]:
    """Register a network under the words for what it shows."""

    def register(build: Build) -> Build:
        assert name not in KINDS
        KINDS[name] = Kind(build, dict(groups), dict(refused), options)
        return build

    return register
