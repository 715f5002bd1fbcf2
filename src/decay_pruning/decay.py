"""Smooth pruning (SP): bring the norm of picked structures to zero over N steps.

After each optimizer step the slices of a decaying structure are projected onto a bound that shrinks with the schedule:
w ← w · min(1, s(n/N)·m₀ / ‖w‖), with m₀ the norm at the pick (arXiv 2406.03879, Smooth Pruning). Training goes on for
all weights, the falling ones included; the projection only takes away what is above the bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from decay_pruning.errors import ConfigError
from decay_pruning.schedules import Schedule, resolve
from decay_pruning.structures import Role, SliceBatch

Bound = Literal["slice", "joint"]
SliceChoice = Literal["all", "rows", "norm", "columns", "rows+norm", "norm+columns", "gates"]

_ROWS = frozenset({Role.ROW, Role.BIAS})
_NORM = frozenset({Role.SCALE, Role.SHIFT})
_COLUMNS = frozenset({Role.COLUMN})
SLICES: dict[SliceChoice, frozenset[Role]] = {
    "all": _ROWS | _NORM | _COLUMNS,
    "rows": _ROWS,
    "norm": _NORM,
    "columns": _COLUMNS,
    "rows+norm": _ROWS | _NORM,
    "norm+columns": _NORM | _COLUMNS,
    "gates": frozenset({Role.SCALE}),
}


@dataclass(frozen=True)
class SmoothPruning:
    """How a picked structure fades.

    Attributes:
        steps: N. An int counts optimizer steps. A float in (0, 1) is the share of the training that is left when
            the first structures are picked, divided among the planned rounds; it needs `total_steps`.
        schedule: fraction of the norm that is left after n of N steps: a name in `schedules.SCHEDULES` or any callable.
        slices: which slices are bounded on the way down. Whatever the choice, all of a structure is exactly zero
            at the end. Rows alone are scale-invariant in front of batch-norm, so that nothing fades until the last
            step: docs/how-to-choose.md shows what each choice does to the function.
        bound: "slice" bounds the norm of each slice (parameter and dimension) by itself, "joint" the norm of all
            slices of a structure together.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    steps: int | float = 0.2
    schedule: str | Schedule = "linear"
    slices: SliceChoice = "all"
    bound: Bound = "slice"

    def __post_init__(self) -> None:
        resolve(self.schedule)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int | float):
            raise ConfigError(f"smooth.steps is a number of steps or a fraction, not {self.steps!r}")
        if isinstance(self.steps, int) and self.steps < 1:
            raise ConfigError(f"smooth.steps must be at least 1, not {self.steps}")
        if isinstance(self.steps, float) and not 0 < self.steps < 1:
            raise ConfigError(
                f"smooth.steps = {self.steps}: a float is the share of the training that is left, between 0 and 1; "
                "write an int for a number of optimizer steps"
            )
        if self.slices not in SLICES:
            raise ConfigError(f"smooth.slices must be one of {', '.join(SLICES)}, not {self.slices!r}")
        if self.bound not in get_args(Bound):
            raise ConfigError(f"smooth.bound must be 'slice' or 'joint', not {self.bound!r}")

    @classmethod
    def one_step(cls) -> SmoothPruning:
        """N = 1: the host's own one-step pruning, the arm called `single`."""
        return cls(steps=1)

    @property
    def roles(self) -> frozenset[Role]:
        return SLICES[self.slices]

    def left(self, n: int, N: int) -> float:
        """Fraction of the norm that is left after n of N steps; exactly 0 from the last step on."""
        return 0.0 if n >= N else max(0.0, float(resolve(self.schedule)(n, N)))


def joint(batch: SliceBatch, norms: Tensor) -> Tensor:
    """Norm of each structure from the norms of its slices: (slices,) → (slots,)."""
    return batch.per_slot(norms.square()).sqrt()


@torch.no_grad()
def project_(
    batch: SliceBatch, tensors: Mapping[str, Tensor], start: Tensor, left: Tensor, bound: Bound
) -> None:
    """Project the slices of decaying structures onto their bound, in place.

    All norms are taken before anything is scaled, so the order of structures does not matter.

    Args:
        batch: the decaying structures.
        tensors: parameters by name.
        start: norm of each slice at the pick, shape (slices,).
        left: fraction of the norm that is left, shape (slots,).
        bound: see `SmoothPruning`.
    """

    def factors(norms: Tensor) -> Tensor:
        if bound == "joint":
            return _shrink(joint(batch, norms), left * joint(batch, start))[batch.slice_slot]
        return _shrink(norms, left[batch.slice_slot] * start)

    batch.rescale_(tensors, factors)


def _shrink(norm: Tensor, limit: Tensor) -> Tensor:
    return torch.where(norm > limit, limit / norm, 1.0)
