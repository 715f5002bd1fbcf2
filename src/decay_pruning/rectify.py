"""Self-rectifying (SR): release a decaying structure whose gradient resists the decay.

The paper (arXiv 2406.03879) names two criteria, C_rate and C_len, and two thresholds, T_rate and T_len. Its equations
were not available to us: **the definitions below are ours**, made to measure what the paper describes. For a decaying
structure with weights w (all its slices), loss gradient g, learning rate η, picked at norm m₀, at step n of N:

    radial growth  ρ = −⟨g, w⟩ / ‖w‖     how fast descent would lengthen the structure; positive resists the decay
    C_rate = ρ / ‖g‖                     share of the descent direction that points outward, a cosine in [−1, 1]
    C_len  = η·ρ / (m₀/N)                length that descent would win back, over the length that the decay takes

Each is averaged over the steps of the decay so far, because a minibatch gradient is noisy. To try another definition,
add a quantity to `measure` or write another `Criterion`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from decay_pruning.errors import ConfigError


class Resistance(NamedTuple):
    """What is known of each decaying structure, each of shape (slots,); the first four are running averages."""

    c_rate: Tensor  #: see above
    c_len: Tensor  #: see above
    growth: Tensor  #: ρ
    first_order: Tensor  #: |⟨g, w⟩|, the first-order estimate of what removal changes in the loss


#: (averages so far, settings) → shape (slots,). Either bool: release? The largest C_len go first then. Or a figure
#: of how valuable each structure is: the largest go first, those at zero or below never.
Criterion = Callable[[Resistance, "SelfRectifying"], Tensor]


def rate_and_len(seen: Resistance, settings: SelfRectifying) -> Tensor:
    """C_rate > T_rate and C_len > T_len."""
    t_rate, t_len = settings.thresholds
    return (seen.c_rate > t_rate) & (seen.c_len > t_len)


def rate_only(seen: Resistance, settings: SelfRectifying) -> Tensor:
    """C_rate > T_rate."""
    return seen.c_rate > settings.thresholds[0]


def len_only(seen: Resistance, settings: SelfRectifying) -> Tensor:
    """C_len > T_len."""
    return seen.c_len > settings.thresholds[1]


def first_order(seen: Resistance, settings: SelfRectifying) -> Tensor:
    """|⟨g, w⟩|, without a threshold: of each pick the share `max_share` is released."""
    return seen.first_order


#: Criteria by name, for recipes.
CRITERIA: dict[str, Criterion] = {
    "rate_and_len": rate_and_len,
    "rate": rate_only,
    "len": len_only,
    "first_order": first_order,
}


@dataclass(frozen=True)
class SelfRectifying:
    """When a decaying structure is let go again.

    Attributes:
        t_rate: T_rate, a cosine between −1 and 1; None for 0.02 where a criterion needs it.
        t_len: T_len, a ratio: 1 means that plain gradient descent alone would cancel the decay; None for 0.01.
        criterion: a name in `CRITERIA`, or any `Criterion`. None for the paper's two thresholds, "rate_and_len", where
            one of them is given, and otherwise for "first_order", which knows most of what removal costs
            (docs/rectifying.md).
        average: None for the plain mean over the decay so far, or the factor β in (0, 1) of an exponential average
            (bias-corrected).
        warmup: share of the decay, in [0, 1), whose gradients are not averaged.
        judge_from: share of the decay, in [0, 1), from which on structures can be released. The last step never judges.
        max_share: the largest share of one pick that is released, in (0, 1], and at least one structure. Those with the
            largest figure go first, under thresholds those with the largest C_len.
        cooldown: for how many later picks a released structure is not picked again.
        retries: how often the host may pick others in place of released ones with rectifying on. One more
            round, without rectifying, meets the target for sure.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    t_rate: float | None = None
    t_len: float | None = None
    criterion: str | Criterion | None = None
    average: float | None = None
    warmup: float = 0.1
    judge_from: float = 0.25
    max_share: float = 0.05
    cooldown: int = 1
    retries: int = 0

    def __post_init__(self) -> None:
        if self.t_rate is not None and not -1 <= self.t_rate <= 1:
            raise ConfigError(f"rectify.t_rate is a cosine between -1 and 1, not {self.t_rate}")
        if self.average is not None and not 0 < self.average < 1:
            raise ConfigError(f"rectify.average is None or a factor between 0 and 1, not {self.average}")
        if not 0 < self.max_share <= 1:
            raise ConfigError(f"rectify.max_share is a share of the pick in (0, 1], not {self.max_share}")
        for name in ("warmup", "judge_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"rectify.{name} is a share of the decay in [0, 1), not {getattr(self, name)}"
                )
        for name in ("cooldown", "retries"):
            if getattr(self, name) < 0:
                raise ConfigError(f"rectify.{name} must not be negative, not {getattr(self, name)}")
        if isinstance(self.criterion, str) and self.criterion not in CRITERIA:
            raise ConfigError(
                f"no criterion is called {self.criterion!r}; choose one of {', '.join(CRITERIA)}"
            )

    @property
    def thresholds(self) -> tuple[float, float]:
        """T_rate and T_len."""
        return 0.02 if self.t_rate is None else self.t_rate, 0.01 if self.t_len is None else self.t_len

    def observes(self, n: int, N: int) -> bool:
        """Whether the gradient of step n of N (counted from 1) goes into the averages."""
        return n > self.warmup * N

    def judges(self, n: int, N: int) -> bool:
        """Whether step n of N (counted from 1) can release."""
        return self.judge_from * N <= n < N

    def weight(self, seen: int) -> float:
        """Weight of the newest of `seen` observations in the average."""
        if self.average is None:
            return 1.0 / seen
        return float((1 - self.average) / (1 - self.average**seen))

    def most(self, picked: int) -> int:
        """How many of `picked` structures can be released."""
        return max(1, int(self.max_share * picked))

    def strength(self, seen: Resistance) -> Tensor:
        """How strongly each structure asks to be released, shape (slots,); −∞ where it does not."""
        given = self.t_rate is not None or self.t_len is not None
        chosen = self.criterion or ("rate_and_len" if given else "first_order")
        rule = CRITERIA[chosen] if isinstance(chosen, str) else chosen
        found = rule(seen, self)
        asks, figure = (found, seen.c_len) if found.dtype == torch.bool else (found > 0, found)
        return torch.where(asks, figure, -torch.inf)


def measure(ww: Tensor, wg: Tensor, gg: Tensor, lr_wg: Tensor, start: Tensor, steps: Tensor) -> Resistance:
    """The quantities of one step, from inner products per structure, each of shape (slots,).

    Args:
        ww, wg, gg: ⟨w, w⟩, ⟨w, g⟩ and ⟨g, g⟩ before the optimizer step.
        lr_wg: Σ η⟨w, g⟩ over slices, each with the learning rate of its parameter.
        start: m₀, the joint norm at the pick.
        steps: N.

    A structure at norm zero, or without a gradient, shows no resistance (zeros).
    """
    length = ww.sqrt()
    growth = -_ratio(wg, length)
    return Resistance(
        c_rate=_ratio(growth, gg.sqrt()),
        c_len=-_ratio(_ratio(lr_wg, length), start / steps),
        growth=growth,
        first_order=wg.abs(),
    )


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)
