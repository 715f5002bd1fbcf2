"""How much of a structure's norm is left after n of N steps of its decay.

A schedule is any callable `(n, N) -> fraction` with fraction 1 at n = 0 and 0 at n = N. The linear one is the
paper's (arXiv 2406.03879, Smooth Pruning). Whatever a schedule returns, the last step leaves exactly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

from decay_pruning.checks import did_you_mean, shown
from decay_pruning.errors import ConfigError

Schedule = Callable[[int, int], float]


def linear(n: int, N: int) -> float:
    """1 − n/N.

    >>> linear(25, 100)
    0.75
    """
    return 1.0 - n / N


def cosine(n: int, N: int) -> float:
    """½(1 + cos πn/N): slow at both ends.

    >>> round(cosine(25, 100), 4)
    0.8536
    """
    return 0.5 * (1.0 + math.cos(math.pi * n / N))


def exponential(n: int, N: int, *, rate: float = 5.0) -> float:
    """(e^(−r·n/N) − e^(−r)) / (1 − e^(−r)): fast first, shifted so that it ends at zero.

    >>> round(exponential(50, 100), 4)
    0.0759
    """
    end = math.exp(-rate)
    return (math.exp(-rate * n / N) - end) / (1.0 - end)


def polynomial(n: int, N: int, *, power: float = 2.0) -> float:
    """(1 − n/N)^p. Another power: `functools.partial(polynomial, power=3)`.

    >>> polynomial(50, 100)
    0.25
    """
    return float((1.0 - n / N) ** power)


#: Schedules by name, for recipes.
SCHEDULES: dict[str, Schedule] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "polynomial": polynomial,
}


def resolve(schedule: str | Schedule) -> Schedule:
    """The schedule itself, by name or as given.

    Raises:
        ConfigError: the name is unknown, or the callable is no schedule: it must return a fraction between 0 and 1,
            1 at the start.
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            hint = did_you_mean(schedule, SCHEDULES)
            raise ConfigError(
                f"no schedule is called {schedule!r}; choose one of {', '.join(SCHEDULES)}{hint}"
            )
        return SCHEDULES[schedule]
    if not callable(schedule):
        raise ConfigError(f"a schedule is a name or a function (n, N) -> fraction, not {shown(schedule)}")
    try:
        points = [schedule(n, 4) for n in range(5)]
    except Exception as error:
        raise ConfigError(
            f"a schedule is called with (n, N); {shown(schedule)} fails: {type(error).__name__}: {error}"
        ) from error
    numbers = [p for p in points if isinstance(p, Real) and not isinstance(p, bool)]
    if len(numbers) < len(points) or not all(-1e-6 <= p <= 1 + 1e-6 for p in points) or points[0] < 1 - 1e-6:
        raise ConfigError(
            f"a schedule returns a fraction from 1 (n = 0) down to 0; {shown(schedule)} gave {shown(points)} for N = 4"
        )
    return schedule
