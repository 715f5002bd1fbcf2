"""Self-rectifying (SR): release a decaying structure whose gradient resists the decay.

The paper (arXiv 2406.03879) judges by two criteria, C_rate and C_len, against two thresholds, T_rate and T_len. They
and others are defined in `resistance`. Each is averaged over the decay so far: a minibatch gradient is noisy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from decay_pruning.checks import Count, OneOf, Share, above, check
from decay_pruning.errors import ConfigError
from decay_pruning.resistance import SOURCES, Resistance, Source

#: (averages so far, settings) → shape (slots,). Either bool: release? Those that resist longest go first then. Or a
#: figure of how valuable each structure is: the largest go first, those at zero or below never.
Criterion = Callable[[Resistance, "SelfRectifying"], Tensor]


class Rule(NamedTuple):
    """A criterion by thresholds: every figure that is named must exceed its threshold; or by one figure alone."""

    rate: str | None = None  #: compared with T_rate
    len: str | None = None  #: compared with T_len, and orders what is released
    figure: str | None = None  #: no thresholds: the largest go first
    exchange: bool = (
        False  #: compared with what the host would take instead, once, and as many go as gain by that
    )
    t_rate: float = 0.0  #: T_rate where it is not given
    t_len: float = 1.0  #: T_len where it is not given

    @property
    def sources(self) -> frozenset[Source]:
        """What has to be read for it."""
        return frozenset(SOURCES[name] for name in (self.rate, self.len, self.figure) if name)


#: Criteria by name, for recipes: the paper's first. A function of your own can be put beside them.
CRITERIA: dict[str, Rule | Criterion] = {
    "rate_and_len": Rule("c_rate", "c_len"),
    "rate": Rule("c_rate"),
    "len": Rule(None, "c_len"),
    "outward_and_regrowth": Rule("outward", "regrowth", t_rate=0.02, t_len=0.01),
    "outward": Rule("outward", t_rate=0.02),
    "regrowth": Rule(None, "regrowth", t_len=0.01),
    "first_order": Rule(figure="first_order"),
    "worth": Rule(figure="worth", exchange=True),
}


@dataclass(frozen=True)
class SelfRectifying:
    """When a decaying structure is let go again.

    Attributes:
        t_rate: T_rate; None for 0 (whatever goes outward) with C_rate, 0.02 with "outward".
        t_len: T_len; None for 1 (more than its neighbours) with C_len, 0.01 with "regrowth".
        criterion: a name in `CRITERIA`, or any `Criterion`. None for the paper's two thresholds, "rate_and_len", where
            one of them is given, and otherwise for "worth": what stays is worth more than what the host would take
            instead (see `decay_pruning.exchange`). A function of your own gets every figure of `Resistance`.
        average: None for the plain mean over the decay so far, or the factor β in (0, 1) of an exponential average
            (bias-corrected).
        warmup: share of the decay, in [0, 1), whose gradients are not averaged.
        judge_from: share of the decay, in [0, 1), from which on structures can be released; "worth" judges once, then.
            The last step never judges.
        max_share: the largest share of one pick that is released, in (0, 1], and at least one structure. Those with the
            largest figure go first, under thresholds those with the largest C_len (or whatever stands in its place).
            None for 0.05, and for 1 under "worth".
        cooldown: for how many later picks a released structure is not picked again.
        retries: how often the host may pick others in place of released ones with rectifying on. One more
            round, without rectifying, meets the target for sure.
        margin: under "worth", how many times as much as what would go in its place a structure must be worth to stay.
        rate_per: what C_rate is a share of: "step", so that it is between −1 and 1, or "decay", the length that the
            decay takes in one step.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    t_rate: float | None = None
    t_len: float | None = None
    criterion: Annotated[str, OneOf(CRITERIA)] | Criterion | None = None
    average: Annotated[float, above(0, below=1)] | None = None
    warmup: Share = 0.1
    judge_from: Share = 0.25
    max_share: Annotated[float, above(0, most=1)] | None = None
    cooldown: Count = 1
    retries: Count = 0
    margin: Annotated[float, above(0)] = 4.0
    rate_per: Literal["step", "decay"] = "step"

    def __post_init__(self) -> None:
        check(self, "rectify")
        a_share = self.rule is not None and (self.rule.rate != "c_rate" or self.rate_per == "step")
        if self.t_rate is not None and a_share and not -1 <= self.t_rate <= 1:
            raise ConfigError(f"rectify.t_rate is a share between -1 and 1, not {self.t_rate}")

    @classmethod
    def paper(
        cls,
        t_rate: float | None = None,
        t_len: float | None = None,
        *,
        rate_per: Literal["step", "decay"] = "step",
    ) -> SelfRectifying:
        """The paper's rule: a structure is released where both C_rate > T_rate and C_len > T_len.

        Ours are the normalisers of both criteria and the defaults of their thresholds (the paper's are not known), that
        both are averaged over the decay so far, that no verdict falls before a quarter of it, and that what was
        released is not picked in the next round.

        Args:
            t_rate: T_rate; None for 0: training lengthens what the decay shortens.
            t_len: T_len; None for 1: its gradient is larger than its neighbours'.
            rate_per: what C_rate is a share of, see `SelfRectifying`.
        """
        return cls(t_rate, t_len, "rate_and_len", warmup=0.0, max_share=1.0, rate_per=rate_per)

    @classmethod
    def exchange(cls, margin: float = 4.0) -> SelfRectifying:
        """The default, by name: release what is worth `margin` times what the host would take in its place.

        Both per unit of the target. No share has to be guessed; see `decay_pruning.exchange`. How `margin` was found:
        docs/how-to-choose.md.
        """
        return cls(criterion="worth", margin=margin)

    @property
    def rule(self) -> Rule | None:
        """The criterion as a rule by name; None for a function."""
        chosen = self._chosen
        return chosen if isinstance(chosen, Rule) else None

    @property
    def exchanges(self) -> bool:
        """Whether decaying structures are compared with what the host would take in their place."""
        return self.rule is not None and self.rule.exchange

    @property
    def _chosen(self) -> Rule | Criterion:
        given = self.t_rate is not None or self.t_len is not None
        criterion = self.criterion or ("rate_and_len" if given else "worth")
        return CRITERIA[criterion] if isinstance(criterion, str) else criterion

    @property
    def sources(self) -> frozenset[Source]:
        """What has to be read while something decays."""
        return frozenset(SOURCES.values()) if self.rule is None else self.rule.sources

    @property
    def figures(self) -> tuple[str, ...]:
        """The figures of `Resistance` that are measured, in its order."""
        if self.rule is not None and self.rule.figure is not None:
            return (self.rule.figure,)
        return tuple(name for name in Resistance._fields if SOURCES[name] in self.sources)

    @property
    def thresholds(self) -> tuple[float, float]:
        """T_rate and T_len."""
        rule = self.rule or Rule()
        return (
            rule.t_rate if self.t_rate is None else self.t_rate,
            rule.t_len if self.t_len is None else self.t_len,
        )

    def observes(self, n: int, N: int) -> bool:
        """Whether the gradient of step n of N (counted from 1) goes into the averages."""
        return n > self.warmup * N and not (self.exchanges and n > self._verdict(N))

    def judges(self, n: int, N: int) -> bool:
        """Whether step n of N (counted from 1) can release."""
        return self.judge_from * N <= n < N and not (self.exchanges and n > self._verdict(N))

    def _verdict(self, N: int) -> int:
        """The first step of N that judges."""
        return max(1, math.ceil(self.judge_from * N))

    def weight(self, seen: int) -> float:
        """Weight of the newest of `seen` observations in the average."""
        if self.average is None:
            return 1.0 / seen
        return float((1 - self.average) / (1 - self.average**seen))

    def most(self, picked: int) -> int:
        """How many of `picked` structures can be released."""
        share = self.max_share or (1.0 if self.exchanges else 0.05)
        return max(1, int(share * picked))

    def strength(self, seen: Resistance) -> Tensor:
        """How strongly each structure asks to be released, shape (slots,); −∞ where it does not.

        Raises:
            ConfigError: a criterion of the user's returned something else than one bool or figure per structure.
        """
        rule = self.rule
        if rule is None:
            return self._asked(seen)
        if rule.figure is not None:
            figure: Tensor = getattr(seen, rule.figure)
            return torch.where(figure > 0, figure, -torch.inf)
        compared = zip((rule.rate, rule.len), self.thresholds, strict=True)
        asks = [getattr(seen, name) > threshold for name, threshold in compared if name]
        return torch.where(torch.stack(asks).all(0), getattr(seen, rule.len or rule.rate or ""), -torch.inf)

    def _asked(self, seen: Resistance) -> Tensor:
        assert not isinstance(self._chosen, Rule)
        found = self._chosen(seen, self)
        if not isinstance(found, Tensor) or found.shape != seen.c_len.shape or found.is_complex():
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                "a criterion of rectify returns a tensor with one bool or figure per decaying structure, shape "
                f"{tuple(seen.c_len.shape)}, not {what}"
            )
        if found.dtype == torch.bool:
            return torch.where(found, seen.c_len, -torch.inf)
        return torch.where(found > 0, found.to(seen.c_len.dtype), -torch.inf)
