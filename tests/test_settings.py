"""Schedules, settings and the arithmetic of resistance."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decay_pruning import ConfigError, Pruner, SelfRectifying, SmoothPruning, schedules
from decay_pruning.resistance import Resistance, c_rate, of_gradient

from .registry import build_model, example


@given(name=st.sampled_from(sorted(schedules.SCHEDULES)), N=st.integers(1, 500))
def test_schedules_fall_from_one_to_zero(name, N):
    path = [schedules.SCHEDULES[name](n, N) for n in range(N + 1)]
    assert path[0] == pytest.approx(1)
    assert path[-1] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(path))
    assert SmoothPruning(schedule=name).left(N, N) == 0.0


def test_any_callable_is_a_schedule():
    cubic = functools.partial(schedules.polynomial, power=3.0)
    assert SmoothPruning(schedule=cubic).left(1, 2) == 0.125


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 1.5}, "between 0 and 1"),
        ({"steps": "ten"}, "number of optimizer steps"),
        ({"schedule": "linaer"}, r"smooth\.schedule must be one of .*did you mean 'linear'\?"),
        ({"schedule": lambda n, N: 2.0}, "a fraction"),
        ({"slices": "gamma"}, "slices"),
        ({"bound": "both"}, "bound"),
    ],
)
def test_wrong_smooth_settings(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SmoothPruning(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"t_rate": 2.0},
        {"t_rate": -1.5, "criterion": "outward"},
        {"rate_per": "n"},
        {"average": 1.0},
        {"warmup": 1.0},
        {"judge_from": -0.1},
        {"cooldown": -1},
        {"criterion": "x"},
    ],
)
def test_wrong_rectify_settings(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SelfRectifying(**wrong)


def test_a_fraction_needs_total_steps():
    model = build_model("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="total_steps"):
        Pruner(model, example(), optimizer, 0.5)


def test_a_decay_that_does_not_fit_is_told_at_once():
    model = build_model("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="do not fit"):
        Pruner(model, example(), optimizer, 0.5, smooth=SmoothPruning(steps=20), total_steps=10)


def test_another_models_optimizer_is_told_at_once():
    optimizer = torch.optim.SGD(build_model("plain").parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="trains none"):
        Pruner(build_model("residual"), example(), optimizer, 0.5, total_steps=10)


def test_resistance_of_known_vectors():
    w, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[-0.6, -0.8]])  # descent points straight outward
    seen = of_gradient(
        ww=(w * w).sum(1), wg=(w * g).sum(1), gg=(g * g).sum(1), lr_wg=0.5 * (w * g).sum(1),
        start=torch.tensor([10.0]), steps=torch.tensor([20]),
    )  # fmt: skip
    assert float(seen["outward"]) == pytest.approx(1)
    assert float(seen["growth"]) == pytest.approx(1)
    assert float(seen["regrowth"]) == pytest.approx(0.5 * 1 / (10 / 20))
    assert float(seen["first_order"]) == pytest.approx(5)


@pytest.mark.parametrize(("per", "expected"), [("step", 1 / 13**0.5), ("decay", 1 / (10 / 20))])
def test_escape_rate_of_known_vectors(per, expected):
    """From (3, 4) to (0, 6): from length 5 to 6, with a step of length √13."""
    x, after = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 6.0]])
    found = c_rate(
        after.norm(dim=1), grown=(after.square() - x.square()).sum(1), moved=(after - x).square().sum(1),
        start=torch.tensor([10.0]), steps=torch.tensor([20]), per=per,
    )  # fmt: skip
    assert float(found) == pytest.approx(expected)


def test_no_weight_or_no_gradient_is_no_resistance():
    zero, one = torch.zeros(1), torch.ones(1)
    for ww, gg in ((zero, one), (one, zero)):
        seen = of_gradient(ww=ww, wg=zero, gg=gg, lr_wg=zero, start=one, steps=one)
        assert all(float(x) == 0 for x in seen.values())
    for per in ("step", "decay"):
        assert float(c_rate(one, grown=zero, moved=zero, start=one, steps=one, per=per)) == 0
        assert float(c_rate(zero, grown=-one, moved=one, start=zero, steps=one, per="decay")) == 0


@given(values=st.lists(st.floats(-1, 1), min_size=1, max_size=20), beta=st.none() | st.floats(0.1, 0.99))
def test_averages(values, beta):
    rectify = SelfRectifying(average=beta)
    mean = 0.0
    for n, value in enumerate(values, 1):
        mean += rectify.weight(n) * (value - mean)
    if beta is None:
        expected = sum(values) / len(values)
    else:
        weights = [beta ** (len(values) - 1 - i) for i in range(len(values))]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert math.isclose(mean, expected, abs_tol=1e-6)


def resistance(**figures):
    """As a criterion sees it: NaN where nothing was measured."""
    none = torch.full((len(next(iter(figures.values()))),), torch.nan)
    return Resistance(
        **{name: torch.tensor(figures[name]) if name in figures else none for name in Resistance._fields}
    )


@pytest.mark.parametrize("wrong", [[True], torch.ones(2), torch.ones(3, 1), torch.ones(3) * 1j, 0.5])
def test_a_criterion_that_returns_something_else(wrong):
    with pytest.raises(ConfigError, match=r"one bool or figure per decaying structure, shape \(3,\)"):
        SelfRectifying(criterion=lambda seen, settings: wrong).strength(resistance(c_len=[1.0, 2.0, 3.0]))


def released(seen, **settings):
    return SelfRectifying(**settings).strength(seen).gt(-torch.inf).tolist()


def test_criteria():
    rate, length, first = [0.5, 0.5, -0.5], [0.5, -0.5, 0.5], [0.0, 2.0, 1.0]
    seen = resistance(c_rate=rate, c_len=length, first_order=first)
    old = resistance(outward=rate, regrowth=length)
    assert released(seen, t_rate=0, t_len=0) == [True, False, False]
    assert released(seen, t_rate=0, t_len=0, criterion="rate") == [True, True, False]
    assert released(seen, t_rate=0, t_len=0, criterion="len") == [True, False, True]
    assert released(seen, criterion="first_order") == [False, True, True]
    assert released(resistance(worth=first)) == [False, True, True], "without thresholds"
    assert SelfRectifying().rule == SelfRectifying.exchange().rule
    assert released(seen, t_len=0.4) == [True, False, False], "with the usual T_rate"
    assert released(seen, criterion="rate_and_len") == released(seen, t_rate=0, t_len=1)
    assert SelfRectifying.paper().rule == SelfRectifying(criterion="rate_and_len").rule
    assert released(old, t_rate=0, t_len=0, criterion="outward_and_regrowth") == [True, False, False]
    assert released(old, criterion="outward_and_regrowth", t_len=0.4) == [True, False, False]
    assert released(old, criterion="outward") == [True, True, False]
    assert released(old, criterion="regrowth") == [True, False, True]
    assert released(seen, criterion=lambda seen, settings: seen.first_order > 1) == [False, True, False]


@pytest.mark.parametrize(
    ("rectify", "most"),
    [
        (SelfRectifying(), 40),
        (SelfRectifying(max_share=0.5), 20),
        (SelfRectifying(t_rate=0.1), 2),
        (SelfRectifying(criterion="first_order"), 2),
        (SelfRectifying.paper(), 40),
    ],
)
def test_how_many_go_at_most(rectify, most):
    """An exchange stops by itself; a fixed share needs a cap."""
    assert rectify.most(40) == most


def test_what_goes_first():
    """C_len orders what passes thresholds; a figure orders itself."""
    seen = resistance(c_rate=[0.5, 0.5], c_len=[0.2, 0.1], first_order=[1.0, 3.0])
    assert SelfRectifying(t_rate=0, t_len=0).strength(seen).tolist() == pytest.approx([0.2, 0.1])
    assert SelfRectifying(criterion="first_order").strength(seen).tolist() == [1.0, 3.0]
