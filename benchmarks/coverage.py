"""What share of real models can be pruned: one process and one time limit for each model.

    python benchmarks/coverage.py --out results/coverage.json            # all models whose packages are installed
    python benchmarks/coverage.py --only torchvision:resnet50 hf:bert --limit 60

Random weights (`stock`). Of each model: seconds of one forward pass, of the trace alone, and of the search with its
proofs; the share of MACs that some layer group can lower, what is left of them if each layer group keeps one
structure, and whether half of all structures can be removed, proven. Beside them the seconds in which torch-pruning
builds its graph and prunes once, without a proof. `benchmarks/tables.py` writes the table.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stock
import torch

from decay_pruning import surgery
from decay_pruning.budget import CostModel
from decay_pruning.counting import count
from decay_pruning.graph import Graph
from decay_pruning.lab import results as lab
from decay_pruning.structures import StructureSet


def fastest(work: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def peer(name: str) -> dict[str, Any]:
    """What torch-pruning takes to build its graph of one model, and to prune it once by magnitude."""
    tp = importlib.import_module("torch_pruning")
    torch.set_num_threads(1)
    model, x = stock.build(name)
    copies = [copy.deepcopy(model) for _ in range(3)]

    def prune() -> None:
        each = copies.pop()
        importance = tp.importance.MagnitudeImportance(p=2)
        last = [m for m in each.modules() if isinstance(m, torch.nn.Linear)][-1:]
        tp.pruner.BasePruner(each, x, importance, pruning_ratio=0.3, ignored_layers=last).step()

    return {"peer": fastest(prune)}


def look(name: str) -> dict[str, Any]:
    """What the library makes of one model."""
    torch.set_num_threads(1)
    model, x = stock.build(name)
    surgery.observe(model, x)
    found: dict[str, Any] = {"forward": fastest(lambda: surgery.observe(model, x))}
    found["traced"] = fastest(lambda: Graph(model, x, verify=False))
    start = time.perf_counter()
    structures = Graph(model, x).structures
    found["searched"] = time.perf_counter() - start
    found["groups"] = len(structures.groups)
    found["unprunable"] = dict(structures.unprunable)
    costs = CostModel(model, x, structures)
    found["macs"] = costs.now.macs
    found["share"] = _share(model, x, structures)
    gone = {key: torch.arange(len(group)) > 0 for key, group in structures.groups.items()}
    found["least"] = costs.after(gone).macs / max(1, costs.now.macs)
    half = {
        key: group.ids[::2].tolist() if len(group) > 2 else [] for key, group in structures.groups.items()
    }
    try:
        surgery.remove(model, structures, half, example_inputs=x)
        found["removed"] = True
    except Exception as error:
        found["removed"] = f"{type(error).__name__}: {error}"[:300]
    return found


def _share(model: Any, x: Any, structures: StructureSet) -> float:
    """The share of all MACs that becomes less when some layer group becomes narrower."""
    places = {c.place for group in structures.groups.values() for c in group.couplings}
    products = count(model, x)
    narrower = sum(p.macs for p in products if any(place in places for place in p.makers))
    return narrower / max(1, sum(p.macs for p in products))


def _alone(name: str, who: str, limit: float) -> dict[str, Any]:
    """`look` or `peer` in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", who, name]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {limit:.0f} s"}
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["no message"])[-1][:400]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=stock.MODELS, default=list(stock.MODELS), metavar="MODEL"
    )
    parser.add_argument("--limit", type=float, default=120, help="seconds for each model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        who, name = options.one
        print(json.dumps(look(name) if who == "library" else peer(name)))
        return
    results: dict[str, Any] = {}
    for name in options.only:
        results[name] = _alone(name, "library", options.limit)
        if "error" not in results[name]:
            other = _alone(name, "peer", min(options.limit, 45))
            results[name]["peer"] = other.get("peer", other.get("error"))
        one = results[name]
        if "error" in one:
            print(f"{name:40} {one['error'][:200]}", flush=True)
        else:
            seconds = ", ".join(f"{key} {one[key]:.2f}" for key in ("forward", "traced", "searched"))
            counts = f"{one['groups']} layer groups, {len(one['unprunable'])} refused"
            macs = f"in groups {one['share']:.0%}, least {one['least']:.0%}"
            print(
                f"{name:40} {seconds} s; {counts}; {macs}; removed: {one['removed']}",
                flush=True,
            )
        if options.out:
            found = {
                "command": " ".join(["python", *sys.argv]),
                "versions": lab.versions() | stock.versions(),
                "machine": lab.machine("cpu"),
                "models": results,
            }
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
