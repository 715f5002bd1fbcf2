"""How the cost of a step grows: with parameters, not with the number of structures.

    python benchmarks/scaling.py --out results/scaling.json

Two-layer perceptrons, a tenth of whose hidden units decay under SP + SR: four shapes of the same number of
parameters, then four of four times as many, and again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decay_pruning import Custom, Goal, Picks, Pruner, Scene, SelfRectifying, SmoothPruning, Target
from decay_pruning.lab.results import machine, versions, write


def tenth(scene: Scene, goal: Goal) -> Picks:
    """Every tenth structure."""
    return {name: group.ids[::10].tolist() for name, group in scene.structures.groups.items()}


def bench(outer: int, hidden: int, repeats: int) -> dict[str, Any]:
    """Median seconds of one step of the engine for 2 · outer · hidden parameters and `hidden` structures."""
    model = nn.Sequential(nn.Linear(outer, hidden), nn.ReLU(), nn.Linear(hidden, outer))
    model(torch.randn(2, outer)).sum().backward()
    pruner = Pruner(
        model,
        torch.randn(1, outer),
        torch.optim.SGD(model.parameters(), lr=0.0),
        Target(structures=0.9),
        host=Custom(tenth),
        smooth=SmoothPruning(steps=10**9),
        rectify=SelfRectifying(t_rate=1.0, criterion="outward", warmup=0.0, judge_from=0.0),
    )
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        pruner.engine.before_step()
        pruner.engine.after_step()
        times.append(time.perf_counter() - begin)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "decaying": len(pruner.engine.decaying),
        "seconds": statistics.median(times[2:]),
    }


def main() -> None:
    """Run the cases and write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in (2**20, 2**22, 2**24):
        for hidden in (2**10, 2**11, 2**12, 2**13):
            rows.append(bench(size // hidden, hidden, args.repeats))
            row = rows[-1]
            print(
                f"{row['parameters']:>12,} parameters, {row['decaying']:>4} decaying: {1e3 * row['seconds']:7.2f} ms"
            )
    if args.out:
        head = {"command": f"python benchmarks/scaling.py --repeats {args.repeats} --out {args.out}"}
        text = {**head, "versions": versions(), "machine": machine("cpu"), "rows": rows}
        write(args.out, json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
