"""Runtimes: what a model runs on when it is timed, and the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import nn

from decay_pruning.keeping import contents
from decay_pruning.proof import copied
from decay_pruning.speed._works import Work, doing
from decay_pruning.surgery import call

#: Passes before those that are timed.
_WARMUP = 3
#: A whole model is timed for so many seconds, and so many times at least and at most.
_WHOLE, _LEAST, _MOST = 1.0, 5, 100
#: A single work: seconds in all, and the fewest repetitions.
_WORK, _WORKS = 0.01, 5


class Runtime(Protocol):
    """What tells how long things take, in seconds."""

    @property
    def name(self) -> str:
        """Part of the name of the table of times on disk."""

    def whole(self, model: nn.Module, example_inputs: Any) -> float:
        """A forward pass of a model."""

    def work(self, work: Work, device: torch.device) -> float:
        """A single work."""


class Eager:
    """torch as it is, layer by layer."""

    name = "eager"

    def whole(self, model: nn.Module, example_inputs: Any) -> float:
        """A forward pass of a model: the first quartile, since other work on the machine only ever adds."""
        times = passes(model, example_inputs, seconds=_WHOLE)
        return statistics.quantiles(times, n=4)[0]

    def work(self, work: Work, device: torch.device) -> float:
        """A single work: the shortest time."""
        do, times = doing(work, device), list[float]()
        with torch.no_grad():
            do()
            spent = 0.0
            while spent < _WORK or len(times) < _WORKS:
                times.append(_timed(do, device, 10 if device.type == "cuda" else 1))
                spent += max(times[-1], 1e-5)
        return min(times)


class Compiled(Eager):
    """`torch.compile`; a single work is timed as torch does it anyway."""

    name = "compiled"

    def whole(self, model: nn.Module, example_inputs: Any) -> float:
        """A forward pass of the compiled model."""
        compiled = cast(nn.Module, torch.compile(model, dynamic=False))
        return statistics.quantiles(passes(compiled, example_inputs, seconds=_WHOLE), n=4)[0]


class Own(Eager):
    """A user's function (model, example inputs) → seconds."""

    def __init__(self, function: Callable[[nn.Module, Any], float]) -> None:
        self._function = function

    def whole(self, model: nn.Module, example_inputs: Any) -> float:
        """What the function says."""
        return float(self._function(model, example_inputs))


def as_runtime(runtime: Any) -> Runtime:
    """A runtime by name, as a function that times a model, or as it is."""
    if runtime is None:
        return Eager()
    if isinstance(runtime, str):
        return {"eager": Eager, "compiled": Compiled}[runtime]()
    whole: Runtime = runtime if hasattr(runtime, "whole") else Own(runtime)
    return whole


def passes(
    model: nn.Module,
    example_inputs: Any,
    *,
    repeats: int | None = None,
    warmup: int = _WARMUP,
    seconds: float = 0.0,
) -> list[float]:
    """Seconds of forward passes in evaluation mode, on the device that the model is on; it is left as it was.

    Args:
        model: the model.
        example_inputs: see `Pruner`.
        repeats: how many; None for as many as fit into `seconds`.
        warmup: passes before those.
        seconds: see `repeats`.
    """
    times: list[float] = []
    example_inputs = copied(example_inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    put_back = contents(model.modules())
    try:
        for module, _ in modes:  # never by eval(): it may merge weights
            module.training = False
        with torch.no_grad():
            for _ in range(warmup):
                call(model, example_inputs)
            while not _enough(times, repeats, seconds):
                times.append(_timed(lambda: call(model, example_inputs), device))
    finally:
        put_back()
        for module, mode in modes:
            module.training = mode
    return times


def _enough(times: list[float], repeats: int | None, seconds: float) -> bool:
    if repeats is not None:
        return len(times) >= repeats
    return len(times) >= _MOST or (len(times) >= _LEAST and sum(times) >= seconds)


def _timed(function: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats
