"""Smooth pruning (SP): bring the norm of picked structures to zero over N steps.

After each optimizer step a decaying structure w is put onto a norm that shrinks with the schedule s, its direction
kept; m₀ is its norm at the pick:

    exact     w ← w · s(n/N)·m₀ / ‖w‖             the norm is that of the schedule, up as well as down (the paper's)
    shorten   w ← w · min(1, s(n/N)·m₀ / ‖w‖)     only what is above the schedule is taken away

Training goes on for all weights, the falling ones included. Source: arXiv 2406.03879, Smooth Pruning; docs/method.md
says what of it is published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from decay_pruning.checks import OneOf, above, at_least, check
from decay_pruning.schedules import SCHEDULES, Schedule, resolve
from decay_pruning.slices import SliceBatch
from decay_pruning.structures import Role

Steps = (
    Annotated[int, at_least(1, what="a number of optimizer steps")]
    | Annotated[float, above(0, below=1, what="a share of the training that is left")]
)
Bound = Literal["slice", "joint"]
Projection = Literal["shorten", "exact"]
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
        bound: "slice" follows the norm of each slice (parameter and dimension) by itself, "joint" the norm of all
            slices of a structure together.
        projection: "shorten" only takes away what is above the schedule; "exact" puts the norm onto it, up as well as
            down. A structure at norm zero has no direction and stays there. Where rows of one decaying structure cross
            columns of another, both scale the crossing, and either norm ends a little below the schedule.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    steps: Steps = 0.2
    schedule: Annotated[str, OneOf(SCHEDULES)] | Schedule = "linear"
    slices: SliceChoice = "all"
    bound: Bound = "slice"
    projection: Projection = "shorten"

    def __post_init__(self) -> None:
        check(self, "smooth")
        resolve(self.schedule)

    @classmethod
    def paper(cls, steps: int | float = 0.2, *, slices: SliceChoice = "all") -> SmoothPruning:
        """The paper's smooth pruning: (N − n)/N of the norm at the pick after n of N steps, exactly, over all weights.

        Ours are the default of N, and that the weights of a structure are all its slices, columns included.

        Args:
            steps: N, as in `SmoothPruning`.
            slices: the structure's weights; "gates" for hosts that prune by gates.
        """
        return cls(steps=steps, schedule="linear", slices=slices, bound="joint", projection="exact")

    @classmethod
    def one_step(cls) -> SmoothPruning:
        """N = 1: the host's own one-step pruning, the arm called `single`."""
        return cls(steps=1)

    @property
    def roles(self) -> frozenset[Role]:
        """The roles of the slices that fade on the way down."""
        return SLICES[self.slices]

    def left(self, n: int, N: int) -> float:
        """Fraction of the norm that is left after n of N steps; exactly 0 from the last step on."""
        return 0.0 if n >= N else max(0.0, float(resolve(self.schedule)(n, N)))


def joint(batch: SliceBatch, norms: Tensor) -> Tensor:
    """Norm of each structure from the norms of its slices: (slices,) → (slots,)."""
    return batch.per_slot(norms.square()).sqrt()


def factors(
    batch: SliceBatch, norms: Tensor, start: Tensor, left: Tensor | float, smooth: SmoothPruning
) -> Tensor:
    """What each slice of decaying structures is multiplied by, shape (slices,).

    All norms are taken before anything is scaled, so the order of structures does not matter.

    Args:
        batch: the decaying structures.
        norms: norm of each slice now, shape (slices,).
        start: the same at the pick.
        left: fraction of the norm that is left, shape (slots,), or one for all.
        smooth: bound and projection.
    """
    if smooth.bound == "joint":
        return _onto(joint(batch, norms), left * joint(batch, start), smooth.projection)[batch.slice_slot]
    of_slice = left[batch.slice_slot] if isinstance(left, Tensor) else left
    return _onto(norms, of_slice * start, smooth.projection)


def _onto(norm: Tensor, target: Tensor, projection: Projection) -> Tensor:
    far = norm > target if projection == "shorten" else norm > 0
    return torch.where(far, target / norm, 1.0)
