"""What the benchmarks of time share: their options, a clock, and how a result is written down."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from decay_pruning.lab.results import machine, versions, write


def options(about: str | None, repeats: int, models: list[str] | None = None) -> argparse.Namespace:
    """The command line, and as many threads as it asks for."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if models:
        parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def record(args: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """Write figures with command, versions and machine, if a file was asked for."""
    if not args.out:
        return
    command = f"python benchmarks/{Path(sys.argv[0]).name} --device {args.device} --batch {args.batch}"
    command += f" --threads {args.threads} --repeats {args.repeats}"
    if "models" in args:
        command += f" --models {' '.join(args.models)}"
    made = {"command": command, "versions": versions(), "machine": machine(args.device)}
    write(args.out, json.dumps({**made, **figures}, indent=1))


def clock(device: torch.device, function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
