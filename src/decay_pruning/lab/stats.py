"""The statistics of paired runs: mean, standard deviation, and the paired t interval.

Arms that share a seed share dense start and data order, so what is compared is the difference within each
seed. Few seeds and gains of the size of seed noise make the interval the message: a mean alone says little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of n values; `sd` is None for a single one."""

    mean: float
    sd: float | None
    n: int

    def show(self, digits: int = 2) -> str:
        """Mean ± standard deviation.

        >>> Spread(98.331, 0.54, 10).show()
        '98.33 ± 0.54'
        """
        return f"{self.mean:.{digits}f}" + (f" ± {self.sd:.{digits}f}" if self.sd is not None else "")


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with a t interval.

    Attributes:
        mean: of second minus first.
        low, high: ends of the interval; None for a single pair, where nothing can be said.
        n: pairs.
        confidence: of the interval, such as 0.95.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    confidence: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def show(self) -> str:
        """Mean and interval.

        >>> Difference(-0.33, -0.74, 0.07, 10, 0.95).show()
        '−0.33 [−0.74, +0.07]'
        """
        if self.low is None or self.high is None:
            return signed(self.mean)
        return f"{signed(self.mean)} [{signed(self.low)}, {signed(self.high)}]"


def signed(value: float) -> str:
    """Two digits with their sign."""
    return f"{value:+.2f}".replace("-", "−")


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (n − 1 in the denominator).

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to take the mean of")
    mean = math.fsum(values) / n
    if n == 1:
        return Spread(mean, None, 1)
    return Spread(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)), n)


def paired(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Difference:
    """second − first, pair by pair: mean ± t · sd/√n with n − 1 degrees of freedom (Student 1908).

    Raises:
        ValueError: sequences of different lengths or without values, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    s = spread([b - a for a, b in zip(first, second, strict=True)])
    if s.sd is None:
        return Difference(s.mean, None, None, s.n, confidence)
    half = t_quantile((1 + confidence) / 2, s.n - 1) * s.sd / math.sqrt(s.n)
    return Difference(s.mean, s.mean - half, s.mean + half, s.n, confidence)


def t_quantile(p: float, df: int) -> float:
    """The value that Student's t with `df` degrees of freedom stays below with probability p.

    >>> round(t_quantile(0.975, 4), 3)
    2.776

    Raises:
        ValueError: p outside (0, 1), or df below 1.
    """
    if not 0 < p < 1 or df < 1:
        raise ValueError(f"t quantile needs 0 < p < 1 and df >= 1, not p = {p} and df = {df}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if (1 + _within(middle, df)) / 2 < p:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(low)


def _within(angle: float, df: int) -> float:
    """P(|T| ≤ √df · tan(angle)), exact for whole df (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    sin, cos = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cos if odd else 1.0), 0.0
    for power in range(odd, df - 1, 2):  # of the cosine
        total += term
        term *= cos * cos * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sin * total) if odd else sin * total
