"""How costs grow: those of a step with parameters, and those of the graph with structures.

    python benchmarks/scaling.py --out results/scaling.json
    python benchmarks/scaling.py --graph --out results/scaling-graph.json

The first: two-layer perceptrons, a tenth of whose hidden units decay under SP + SR: four shapes of the same number of
parameters, then four of four times as many, and again.

The second, each case in a process of its own, in seconds of one core: the trace, a pick by magnitude, a plan, a step of
SP and a proven removal of a tenth of all structures, for one wide layer group, for many layer groups, and for layer
groups that meet in one concatenation (as in DenseNet); then the plan alone of Llamas on the meta device.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decay_pruning import (
    Custom,
    DepGraph,
    Goal,
    Picks,
    Plan,
    Pruner,
    Scene,
    SelfRectifying,
    SmoothPruning,
    Target,
    inspect,
    surgery,
)
from decay_pruning.graph import Graph
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


def wide(structures: int) -> tuple[nn.Module, torch.Tensor]:
    """All structures in one layer group."""
    return nn.Sequential(nn.Linear(16, structures), nn.ReLU(), nn.Linear(structures, 16)), torch.randn(2, 16)


class Residual(nn.Module):
    """Adds what a layer of 256 structures makes."""

    def __init__(self, width: int = 32, inner: int = 256) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + 0.1 * self.down(self.up(x).relu())
        return out


def deep(structures: int) -> tuple[nn.Module, torch.Tensor]:
    """A layer group for each 256 structures."""
    blocks = (Residual() for _ in range(structures // 256))
    return nn.Sequential(nn.Linear(16, 32), *blocks, nn.Linear(32, 16)), torch.randn(2, 16)


class Concatenated(nn.Module):
    """Each layer reads what all layers before it have made."""

    def __init__(self, layers: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16 + k * width, width) for k in range(layers))
        self.out = nn.Linear(16 + layers * width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        found: torch.Tensor = self.out(x)
        return found


def concatenated(structures: int) -> tuple[nn.Module, torch.Tensor]:
    """A layer group for each 64 structures, all of which meet."""
    return Concatenated(structures // 64), torch.randn(2, 16)


class Block(nn.Module):
    """One of a Llama: attention with heads, and a gated network."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (m(y).unflatten(-1, (-1, 128)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        out: torch.Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return out


def llama(layers: int) -> tuple[nn.Module, torch.Tensor]:
    """The shape of one of 7 billion parameters (at 32 layers), without weights."""
    with torch.device("meta"):
        words, head = nn.Embedding(32000, 4096), nn.Linear(4096, 32000, bias=False)
        model = nn.Sequential(words, *(Block(4096, 11008) for _ in range(layers)), nn.RMSNorm(4096), head)
    return model, torch.zeros(1, 16, dtype=torch.int64)


CASES: dict[str, tuple[Callable[[int], tuple[nn.Module, torch.Tensor]], tuple[int, ...]]] = {
    "wide": (wide, (2**14, 2**16, 2**18, 2**20)),
    "deep": (deep, (2**14, 2**16, 2**18, 2**20)),
    "concatenated": (concatenated, (2**10, 2**11, 2**12, 2**13)),
    "llama on the meta device": (llama, (4, 8, 16, 32)),
}


def graph(kind: str, size: int) -> dict[str, Any]:
    """Seconds of everything that goes over all structures, each once, and what they take."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Graph(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), torch.randn(2, 2))  # what the first one imports
    model, x = CASES[kind][0](size)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.process_time()  # others may be at work on the machine
        found = work()
        seconds[name] = time.process_time() - begin
        return found

    if next(model.parameters()).is_meta:
        plan = timed("plan", lambda: inspect(model, x, target=Target(macs=0.5)))
        structures, params = plan.now.structures, plan.now.params
    else:
        found = timed("trace", lambda: Graph(model, x, verify=False))
        tenth_gone = {name: group.ids[::10].tolist() for name, group in found.structures.groups.items()}
        pruner = timed(
            "pruner",
            lambda: Pruner(
                model,
                x,
                torch.optim.SGD(model.parameters(), lr=0.0),
                Target(structures=0.9),
                host=Custom(tenth),
                smooth=SmoothPruning(steps=10**9),
            ),
        )
        structures, params = len(found.structures), sum(p.numel() for p in model.parameters())
        scene = pruner._scene()
        goal = Goal("structures", 0.9 * structures)
        host = DepGraph()
        picks = timed("pick", lambda: host.begin().pick(scene, goal))
        timed("plan", lambda: str(Plan.of(pruner.structures, picks, scene.costs)))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(3):
            timed(
                "first step" if "first step" not in seconds else "step",
                lambda: (pruner.engine.before_step(), pruner.engine.after_step()),
            )
        timed("removal", lambda: surgery.remove(model, found.structures, tenth_gone, example_inputs=x))
    return {
        "kind": kind,
        "size": size,
        "structures": structures,
        "parameters": params,
        "seconds": seconds,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def graphs(limit: float) -> Iterator[dict[str, Any]]:
    """All cases, each in a process of its own."""
    for kind, (_, sizes) in CASES.items():
        for size in sizes:
            command = [sys.executable, "-W", "ignore", __file__, "--one", kind, str(size)]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            except subprocess.TimeoutExpired:
                yield {"kind": kind, "size": size, "error": f"not done in {limit:.0f} s"}
                break
            yield (
                json.loads(run.stdout.splitlines()[-1])
                if not run.returncode
                else {"kind": kind, "size": size, "error": run.stderr[-300:]}
            )


def main() -> None:
    """Run the cases and write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--graph", action="store_true", help="structures instead of parameters")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each case of --graph")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(graph(args.one[0], int(args.one[1]))))
        return
    rows: list[dict[str, Any]] = []
    for row in graphs(args.limit) if args.graph else ():
        rows.append(row)
        seconds = ", ".join(f"{name} {value:.2f}" for name, value in row.get("seconds", {}).items())
        print(
            f"{row['kind']:>25} {row.get('structures', 0):>10,} structures: {row.get('error', seconds)}",
            flush=True,
        )
    for size in () if args.graph else (2**20, 2**22, 2**24):
        for hidden in (2**10, 2**11, 2**12, 2**13):
            rows.append(bench(size // hidden, hidden, args.repeats))
            row = rows[-1]
            print(
                f"{row['parameters']:>12,} parameters, {row['decaying']:>4} decaying: {1e3 * row['seconds']:7.2f} ms"
            )
    if args.out:
        head = {"command": " ".join(["python", *sys.argv])}
        text = {**head, "versions": versions(), "machine": machine("cpu"), "rows": rows}
        write(args.out, json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
