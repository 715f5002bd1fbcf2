"""Mean, spread and the paired t interval, against printed tables and by simulation."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from decay_pruning.lab.stats import paired, spread, t_quantile

# One-sided 97.5 % and 99.5 % points, as every printed table of Student's t has them.
TABLE = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    3: (3.182, 5.841),
    4: (2.776, 4.604),
    5: (2.571, 4.032),
    9: (2.262, 3.250),
    10: (2.228, 3.169),
    19: (2.093, 2.861),
    30: (2.042, 2.750),
    120: (1.980, 2.617),
}


@pytest.mark.parametrize("df", TABLE)
def test_quantiles_agree_with_the_printed_table(df: int) -> None:
    assert t_quantile(0.975, df) == pytest.approx(TABLE[df][0], abs=6e-4)
    assert t_quantile(0.995, df) == pytest.approx(TABLE[df][1], abs=6e-4)


def test_quantiles_agree_with_closed_forms() -> None:
    for p in (0.6, 0.9, 0.999, 0.99999):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
        a = 4 * p * (1 - p)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / a), rel=1e-9)
    assert t_quantile(0.975, 100_000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), rel=1e-4)


def test_quantiles_are_symmetric() -> None:
    assert t_quantile(0.5, 7) == pytest.approx(0, abs=1e-12)
    assert t_quantile(0.1, 7) == -t_quantile(0.9, 7)


@pytest.mark.parametrize(("p", "df"), [(0.0, 3), (1.0, 3), (0.9, 0)])
def test_impossible_quantiles_are_refused(p: float, df: int) -> None:
    with pytest.raises(ValueError, match="t quantile needs"):
        t_quantile(p, df)


def test_paired_interval_of_a_worked_example() -> None:
    first, second = [10.0, 12.0, 9.0, 11.0, 13.0], [11.0, 14.0, 9.5, 12.0, 15.5]
    result = paired(first, second)  # differences 1, 2, 0.5, 1, 2.5: mean 1.4, sd 0.82158, t(4) = 2.7764
    assert result.mean == pytest.approx(1.4)
    assert result.low == pytest.approx(1.4 - 2.7764 * 0.821584 / math.sqrt(5), abs=1e-4)
    assert result.high == pytest.approx(1.4 + 2.7764 * 0.821584 / math.sqrt(5), abs=1e-4)
    assert result.clear
    assert not paired(second, [v + d for v, d in zip(second, [1, -1, 1, -1, 0], strict=True)]).clear


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(0)
    trials, covered = 2000, 0
    for _ in range(trials):
        first = [draw.gauss(50, 10) for _ in range(5)]
        second = [f + 0.3 + draw.gauss(0, 1) for f in first]
        interval = paired(first, second)
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= 0.3 <= interval.high
    assert covered / trials == pytest.approx(0.95, abs=0.02)


def test_one_pair_has_no_interval() -> None:
    result = paired([1.0], [2.0])
    assert (result.mean, result.low, result.high, result.clear) == (1.0, None, None, False)


def test_spread() -> None:
    assert spread([1.0, 2.0, 4.0]).mean == pytest.approx(7 / 3)
    assert spread([1.0, 2.0, 4.0]).sd == pytest.approx(statistics.stdev([1, 2, 4]))
    assert spread([3.0]).sd is None
    with pytest.raises(ValueError, match="no values"):
        spread([])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paired([1.0, 2.0], [1.0])
