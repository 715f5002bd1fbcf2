"""The table of times: a work at a grid of widths, measured where it has gaps, read between them, kept on disk."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from decay_pruning.ranks import agreed
from decay_pruning.speed._runtime import Runtime
from decay_pruning.speed._works import Work

logger = logging.getLogger("decay_pruning")

#: Widths at which a staircase may have its steps.
STEPS = (64, 32, 16, 8, 4, 2)
#: What is counted, not laid side by side: a finer grid than powers of four would tell nothing more.
_COUNTED = frozenset({"elements", "products"})
#: Staircases are looked for below this width: they are the same further up, and harder to see.
_TRIED = 128
#: Less than this share of the time is nothing.
_NOTHING = 0.02


class Table:
    """Seconds by work, for one device, runtime, and number of threads.

    Args:
        runtime: the clock.
        device: where works are done.
        folder: where the table is kept; None for the user's own folder for such things.
    """

    def __init__(self, runtime: Runtime, device: torch.device, folder: Path | None = None) -> None:
        self.runtime, self.device = runtime, device
        self.path = (folder or _folder()) / f"{_name(runtime, device)}.json"
        self._known: dict[str, float] = agreed(lambda: _read(self.path))
        self._fresh = 0

    def __len__(self) -> int:
        return len(self._known)

    def seconds(self, work: Work, sizes: Sequence[float]) -> float:
        """How long this work takes at other sizes, between those of the grid by straight lines."""
        sides = [_around(size, 4 if work.kind in _COUNTED else 2) for size in sizes]
        total = 0.0
        for corner in itertools.product(*sides):
            weight = math.prod(w for _, w in corner)
            if weight > 0:
                total += weight * self.at(replace(work, sizes=tuple(size for size, _ in corner)))
        return total

    def at(self, work: Work) -> float:
        """How long this work takes; measured if it is not known yet."""
        name = work.name
        if name not in self._known:
            self._known[name] = agreed(lambda: self._measured(work))
            self._fresh += 1
        return self._known[name]

    def step(self, work: Work, axis: int) -> int:
        """The largest step in one size below which narrower is not faster; 1 where every single one counts.

        Half way between two widths that are a step apart, a straight line has half of the difference, and a staircase
        all of the upper one. What differs by next to nothing counts as level.
        """
        top = 2 ** int(math.log2(min(_TRIED, max(1, work.sizes[axis]))))
        near = [_nearest(size) for size in work.sizes]

        def at(size: int) -> float:
            return self.at(replace(work, sizes=tuple(size if i == axis else n for i, n in enumerate(near))))

        for step in STEPS:
            if step > top // 4:  # coarser ones are not told from noise
                continue
            high, low, middle = at(top), at(top - step), at(top - step // 2)
            rise = high - low
            if rise <= _NOTHING * high or (middle - (high + low) / 2) / rise >= 0.25:
                return step
        return 1

    def save(self) -> None:
        """Write what was measured, beside what others have written meanwhile. A folder that refuses is no fault."""
        if not self._fresh:
            return
        self._fresh = 0
        try:
            _write(self.path, {**_read(self.path), **self._known})
        except OSError as error:
            logger.info("times are not kept: %s cannot be written (%s)", self.path, error.strerror or error)

    def _measured(self, work: Work) -> float:
        try:
            return self.runtime.work(work, self.device)
        except (RuntimeError, ValueError, TypeError) as error:
            logger.debug("cannot be timed alone: %s (%s)", work.name, error)
            return 0.0


def _around(size: float, base: int) -> list[tuple[int, float]]:
    """The points of the grid beside a size, and how near it is to each: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, …"""
    low = base ** int(math.log(max(1.0, size), base) + 1e-9)
    points = [low, low * 3 // 2, low * base] if base == 2 and low > 1 else [low, low * base]
    for a, b in itertools.pairwise(points):
        if size < b:
            part = (max(size, a) - a) / (b - a)
            return [(a, 1 - part), (b, part)]
    return [(points[-1], 1.0)]


def _nearest(size: float) -> int:
    return max(_around(size, 2), key=lambda each: each[1])[0]


# -- on disk -------------------------------------------------------------------------------------------------


def _folder() -> Path:
    """Where programs keep what they can make again."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "decay-pruning" / "latency"


def _name(runtime: Runtime, device: torch.device) -> str:
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = f"{torch.get_num_threads()}-threads" if device.type == "cpu" else "one"
    words = [device.type, chip, threads, f"torch-{torch.__version__}", "table-1"]
    return re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(words))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, float]:
    """The times in a file; of one that is missing or damaged, none."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        times = {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {name: value for name, value in times.items() if 0 <= value < math.inf}


def _write(path: Path, times: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(times, file, indent=0, sort_keys=True)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
