"""The clock that the benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def clock(device: torch.device, function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
