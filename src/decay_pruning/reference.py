"""The Decay Pruning Method per structure, in plain loops: written to be read, and the oracle of the fast path.

SP, and SR by its thresholds. What concerns several structures at once (`max_share`, picking others) is not stated here.

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


@dataclass
class Decaying:
    """One structure on its way to zero.

    Attributes:
        slices: what fades.
        N: length of the decay in optimizer steps.
        start: norm of each slice at the pick.
        n: steps done.
        c_rate, c_len: observations so far.
        alive: "decaying", "released" or "zero".
    """

    slices: Sequence[Slice]
    N: int
    start: list[float]
    n: int = 0
    c_rate: list[float] = field(default_factory=list)
    c_len: list[float] = field(default_factory=list)
    alive: str = "decaying"


def pick(slices: Sequence[Slice], N: int, parameters: Mapping[str, Tensor]) -> Decaying:
    """Pick a structure: remember its norms."""
    norms = [float(parameters[name].detach()[mask].norm()) for name, mask in masks(slices, parameters)]
    return Decaying(slices, N, norms)


def observe(s: Decaying, parameters: Mapping[str, Tensor], lr: float, *, warmup: float) -> None:
    """Before an optimizer step: how much does the gradient resist? (see `rectify` for the definitions)"""
    if s.n + 1 <= warmup * s.N:
        return
    w = torch.cat([parameters[name].detach()[mask] for name, mask in masks(s.slices, parameters)])
    g = torch.cat([_grad(parameters[name])[mask] for name, mask in masks(s.slices, parameters)])
    growth = float(-(g @ w) / w.norm()) if w.norm() > 0 else 0.0
    taken = sum(m * m for m in s.start) ** 0.5 / s.N
    s.c_rate.append(growth / float(g.norm()) if g.norm() > 0 else 0.0)
    s.c_len.append(lr * growth / taken if taken > 0 else 0.0)


def step(
    structures: Sequence[Decaying],
    parameters: Mapping[str, Tensor],
    schedule: Callable[[int, int], float],
    *,
    bound: str,
    t_rate: float | None = None,
    t_len: float = 0.0,
    judge_from: float = 0.25,
) -> None:
    """After an optimizer step: judge (SR, where t_rate is given), then shrink (SP), then hold zeros."""
    factors = []
    for s in structures:
        if s.alive != "decaying":
            continue
        s.n += 1
        if t_rate is not None and judge_from * s.N <= s.n < s.N and s.c_rate:
            rate, length = sum(s.c_rate) / len(s.c_rate), sum(s.c_len) / len(s.c_len)
            if rate > t_rate and length > t_len:
                s.alive = "released"
                continue
        left = 0.0 if s.n >= s.N else max(0.0, schedule(s.n, s.N))
        parts = masks(s.slices, parameters)
        norms = [float(parameters[name].detach()[mask].norm()) for name, mask in parts]
        if bound == "joint":
            whole, limit = sum(x * x for x in norms) ** 0.5, left * sum(m * m for m in s.start) ** 0.5
            shrink = [limit / whole if whole > limit else 1.0] * len(parts)
        else:
            shrink = [left * m / x if x > left * m else 1.0 for x, m in zip(norms, s.start, strict=True)]
        factors += [(name, mask, f) for (name, mask), f in zip(parts, shrink, strict=True)]
        if s.n >= s.N:
            s.alive = "zero"
    with torch.no_grad():
        for name, mask, f in factors:  # all norms were taken before anything is scaled
            parameters[name][mask] *= f
        for s in structures:
            if s.alive == "zero":
                for name, mask in masks(s.slices, parameters):
                    parameters[name][mask] = 0.0


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
