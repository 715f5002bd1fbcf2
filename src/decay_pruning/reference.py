"""The Decay Pruning Method per structure, in plain loops: written to be read, and the oracle of the fast path.

SP in both projections, and SR: by thresholds, with the paper's criteria and those of descent alone, and by exchange.
The cap `max_share` and the rounds that follow a release are not stated here.

Nothing here is fast and nothing imports it. A structure is a list of *slices*; a slice is (parameter name, dimension,
positions). Elements are addressed one by one through masks, so overlaps are visible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Slice = tuple[str, int, Sequence[int]]


def masks(slices: Sequence[Slice], parameters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Which elements each slice has: a crossing of two slices of one structure belongs to the first of them only."""
    taken: dict[str, Tensor] = {}
    result = []
    for name, dim, positions in slices:
        mask = torch.zeros(parameters[name].shape, dtype=torch.bool)
        for p in positions:
            mask.select(dim, p).fill_(True)
        if name in taken:
            mask &= ~taken[name]
        taken[name] = taken.get(name, torch.zeros_like(mask)) | mask
        result.append((name, mask))
    return result


def vector(slices: Sequence[Slice], tensors: Mapping[str, Tensor]) -> Tensor:
    """All elements of a structure: the paper's x, or its gradient g."""
    return torch.cat([tensors[name].detach()[mask] for name, mask in masks(slices, tensors)])


@dataclass
class Decaying:
    """One structure on its way to zero.

    Attributes:
        slices: what fades.
        N: length of the decay in optimizer steps.
        start: norm of each slice at the pick.
        n: steps done.
        x: its weights before the optimizer's step, where that step is observed.
        c_rate_step, c_rate_decay, c_len, outward, regrowth, worth: observations so far.
        alive: "decaying", "released" or "zero".
    """

    slices: Sequence[Slice]
    N: int
    start: list[float]
    n: int = 0
    x: Tensor | None = None
    c_rate_step: list[float] = field(default_factory=list)
    c_rate_decay: list[float] = field(default_factory=list)
    c_len: list[float] = field(default_factory=list)
    outward: list[float] = field(default_factory=list)
    regrowth: list[float] = field(default_factory=list)
    worth: list[float] = field(default_factory=list)
    alive: str = "decaying"

    @property
    def per_step(self) -> float:
        """L_s = L_init/N, what the decay takes in one step."""
        return _joint(self.start) / self.N


def pick(slices: Sequence[Slice], N: int, parameters: Mapping[str, Tensor]) -> Decaying:
    """Pick a structure: remember its norms."""
    norms = [float(parameters[name].detach()[mask].norm()) for name, mask in masks(slices, parameters)]
    return Decaying(slices, N, norms)


def before_step(
    s: Decaying,
    parameters: Mapping[str, Tensor],
    lr: float,
    *,
    warmup: float,
    parallel: Sequence[Sequence[Slice]] = (),
) -> None:
    """Before an optimizer step: the gradient's figures (`resistance` defines them), and the weights as they are.

    `parallel` are the structures of the same layer group that do not decay.
    """
    if s.n + 1 <= warmup * s.N:
        return
    gradients = {name: _grad(p) for name, p in parameters.items()}
    s.x, g = vector(s.slices, parameters), vector(s.slices, gradients)
    others = [float(vector(slices, gradients).norm()) for slices in parallel]
    s.c_len.append(_over(float(g.norm()), sum(others) / len(others) if others else 0.0))
    growth = -_over(float(g @ s.x), float(s.x.norm()))
    s.outward.append(_over(growth, float(g.norm())))
    s.regrowth.append(_over(lr * growth, s.per_step))
    s.worth.append((growth * _joint(s.start)) ** 2)


def after_step(s: Decaying, parameters: Mapping[str, Tensor]) -> None:
    """After the optimizer's own step: C_rate, how far it has lengthened the structure."""
    if s.x is None:
        return
    x, s.x = s.x, None
    now = vector(s.slices, parameters)
    gain = float(now.norm() - x.norm())
    s.c_rate_step.append(_over(gain, float((now - x).norm())))
    s.c_rate_decay.append(_over(gain, s.per_step))


#: What a structure is worth, and what it costs in the unit of the target.
Worth = tuple[float, float]


def exchange(decaying: Sequence[Worth], offer: Sequence[Sequence[Worth]], margin: float = 1.0) -> list[int]:
    """SR by worth: which decaying structures stay, given what the host would take next, in parts of equal rank."""
    order = sorted(range(len(decaying)), key=lambda i: -decaying[i][0] / decaying[i][1])
    best, most = 0, 0.0
    for count in range(1, len(order) + 1):
        kept = [decaying[i] for i in order[:count]]
        paid, missing = 0.0, sum(price for _, price in kept)
        for part in offer:
            price = sum(p for _, p in part)
            share = min(1.0, missing / price) if price else 0.0
            paid += share * sum(worth for worth, _ in part)
            missing -= share * price
        gain = sum(worth for worth, _ in kept) - margin * paid
        if missing <= 0 and gain > most:
            best, most = count, gain
    return order[:best]


def step(
    structures: Sequence[Decaying],
    parameters: Mapping[str, Tensor],
    schedule: Callable[[int, int], float],
    *,
    bound: str,
    projection: str = "shorten",
    rate: str = "c_rate_step",
    length: str = "c_len",
    t_rate: float = float("inf"),
    t_len: float = 0.0,
    judge_from: float = 0.25,
) -> None:
    """After an optimizer step: judge (SR), put onto the target norm (SP), hold zeros."""
    factors = []
    for s in structures:
        if s.alive != "decaying":
            continue
        s.n += 1
        judged = judge_from * s.N <= s.n < s.N
        if judged and _mean(getattr(s, rate)) > t_rate and _mean(getattr(s, length)) > t_len:
            s.alive = "released"
            continue
        left = 0.0 if s.n >= s.N else max(0.0, schedule(s.n, s.N))
        parts = masks(s.slices, parameters)
        norms = [float(parameters[name].detach()[mask].norm()) for name, mask in parts]
        targets = [left * m for m in s.start]
        if bound == "joint":
            norms, targets = [_joint(norms)] * len(parts), [_joint(targets)] * len(parts)
        for (name, mask), norm, target in zip(parts, norms, targets, strict=True):
            moves = norm > target if projection == "shorten" else norm > 0
            factors.append((name, mask, target / norm if moves else 1.0))
        if s.n >= s.N:
            s.alive = "zero"
    with torch.no_grad():
        for name, mask, f in factors:  # all norms were taken before anything is scaled
            parameters[name][mask] *= f
        for s in structures:
            if s.alive == "zero":
                for name, mask in masks(s.slices, parameters):
                    parameters[name][mask] = 0.0


def _joint(norms: Sequence[float]) -> float:
    return float(sum(x * x for x in norms) ** 0.5)


def _mean(seen: Sequence[float]) -> float:
    return sum(seen) / len(seen) if seen else float("-inf")


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
