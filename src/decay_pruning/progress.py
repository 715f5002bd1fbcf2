"""What a pruner tells: where it is, and what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Where a pruner is. MACs and parameters are those of the model as it is now; the rest counts structures.

    `macs_left` are those when everything that is fading will be gone.
    """

    step: int
    round: int
    macs: int
    params: int
    macs_start: int
    params_start: int
    decaying: int
    held: int
    released: int
    removed: int
    macs_left: int

    def __str__(self) -> str:
        counts = ", ".join(
            f"{getattr(self, name)} {name}" for name in ("decaying", "held", "released", "removed")
        )
        return f"step {self.step:,}, {100 * self.macs / self.macs_start:.1f} % of MACs; {counts}"


@dataclass(frozen=True)
class PruningReport:
    """What was done. Pairs are (before, after).

    Attributes:
        macs, params, structures: of the whole model.
        latency, memory: seconds and peak bytes of a forward pass, where the target is one of these.
        picked: picks made, those of `picked_again` included.
        decayed: structures whose decay came to its end.
        released: structures let go by self-rectifying.
        picked_again: structures picked again after a release.
        removed: structures that are gone.
        rounds: picks of the host.
        steps: optimizer steps from the start to the last removal.
        widths: layer group → (before, after).
        unprunable: what was never considered → the reason.
    """

    macs: tuple[int, int]
    params: tuple[int, int]
    structures: tuple[int, int]
    picked: int
    decayed: int
    released: int
    picked_again: int
    removed: int
    rounds: int
    steps: int
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    unprunable: Mapping[str, str] = field(default_factory=dict)
    latency: tuple[float, float] | None = None
    memory: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        def share(pair: tuple[int, int]) -> str:
            return f"{pair[0]:,} -> {pair[1]:,} ({100 * pair[1] / max(1, pair[0]):.1f} %)"

        timed = []
        for name, pair, unit, word in (
            ("latency", self.latency, 1e-3, "ms"),
            ("memory", self.memory, 2**20, "MiB"),
        ):
            if pair is not None:
                a, b = (value / unit for value in pair)
                timed.append(f"{name:<10}  {a:.4g} -> {b:.4g} {word} ({100 * b / a:.1f} %)")

        return "\n".join(
            [
                f"MACs        {share(self.macs)}",
                f"parameters  {share(self.params)}",
                f"structures  {share(self.structures)}",
                *timed,
                f"picked {self.picked} (again after a release: {self.picked_again}), decayed {self.decayed}, "
                f"released {self.released}, removed {self.removed}, in {self.rounds} rounds and {self.steps} steps",
            ]
        )
