"""How much faster pruned networks really are, beside what their MACs promise.

    python benchmarks/speedup.py --networks torchvision:resnet50 timm:vit_small --out results/speedup-cpu.json
    python benchmarks/speedup.py --runtimes eager onnxruntime --rounds 30

Stock networks with random weights (`make models`), each pruned in several ways:
  macs        a target of MACs
  macs-4, -8  the same with widths rounded up to multiples of 4 and 8
  macs-cost   the same with scores weighed by what a structure costs
  latency     a target of latency on this machine, for each batch size
  tp          torch-pruning at the MACs of `macs`, global, its own ranking
In each runtime and batch size, one pass of every network in turn, many times over; the shortest of each counts, and a
speed-up is dense over pruned. `by_kind` says where torch's time goes, from the table of times by width.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import stock
import torch
from timing import clock
from torch import nn

from decay_pruning import DecayPruningError, DepGraph, Pruner, SmoothPruning, Target, measure
from decay_pruning.budget import batched
from decay_pruning.exporting import _run_onnx, _write_onnx
from decay_pruning.lab.results import machine, versions, write
from decay_pruning.speed import Eager, Table, uses

NETWORKS = (
    "torchvision:resnet18", "torchvision:resnet50", "torchvision:vgg16_bn", "torchvision:mobilenet_v2",
    "torchvision:densenet121", "torchvision:regnet_y_400mf", "torchvision:convnext_tiny",
    "torchvision:efficientnet_b0", "torchvision:vit_b_16", "torchvision:swin_t",
)  # fmt: skip
RUNTIMES = ("eager", "compiled", "onnxruntime")
HOST: dict[str, Any] = {"importance": "magnitude", "min_kept": 0.1, "allow_inexact": True}


def arms(keep: float, batches: list[int]) -> dict[str, tuple[DepGraph, Target]]:
    """Name → how it is pruned."""
    plain = Target(macs=keep)
    return {
        "macs": (DepGraph(**HOST), plain),
        "macs-4": (DepGraph(**HOST, round_to=4), plain),
        "macs-8": (DepGraph(**HOST, round_to=8), plain),
        "macs-cost": (DepGraph(**HOST), Target(macs=keep, per_cost=True)),
        **{f"latency-{n}": (DepGraph(**HOST), Target(latency=keep, batch=n)) for n in batches},
    }


def pruned(dense: nn.Module, x: Any, host: DepGraph, target: Target) -> nn.Module:
    """A copy, pruned at once."""
    model = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, x, optimizer, target, host=host, smooth=SmoothPruning.one_step(), total_steps=99)
    for _ in range(20):
        optimizer.step()
        if pruner.done:
            break
    pruner.finish()
    return model


def by_torch_pruning(dense: nn.Module, x: Any, macs: int) -> nn.Module:
    """A copy, pruned by torch-pruning with the least ratio that leaves so many MACs."""
    tp = importlib.import_module("torch_pruning")
    low, high, best = 0.0, 0.95, copy.deepcopy(dense)
    for _ in range(8):
        model, ratio = copy.deepcopy(dense), (low + high) / 2
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
        importance = tp.importance.GroupMagnitudeImportance(p=1)
        tp.pruner.BasePruner(
            model,
            x,
            importance,
            pruning_ratio=ratio,
            global_pruning=True,
            max_pruning_ratio=0.9,
            ignored_layers=last,
        ).step()
        if measure(model, x).macs <= macs:
            high, best = ratio, model
        else:
            low = ratio
    return best


def runner(model: nn.Module, runtime: str, inputs: Any, folder: Path) -> Callable[[], Any]:
    """A forward pass in a runtime."""
    if runtime == "onnxruntime":
        path = folder / f"{id(model)}.onnx"
        _write_onnx(model, inputs, path, None)
        run = _run_onnx(path)
        return lambda: run(inputs)
    call = cast(nn.Module, torch.compile(model, dynamic=False)) if runtime == "compiled" else model
    return lambda: call(*inputs) if isinstance(inputs, tuple) else call(inputs)


def shortest(runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of the shortest pass of each, one of each in turn."""
    best = dict.fromkeys(runs, math.inf)
    with torch.no_grad():
        for run in runs.values():
            run(), run()
        for _ in range(rounds):
            for name, run in runs.items():
                best[name] = min(best[name], clock(device, run))
    return best


def by_kind(
    models: Mapping[str, nn.Module], inputs: Any, device: torch.device
) -> dict[str, dict[str, float]]:
    """Seconds by kind of work, and of the five dearest works, as the table has them."""
    table, found = Table(Eager(), device), {}
    for name, model in models.items():
        times: dict[str, float] = {}
        single: dict[str, float] = {}
        for use in uses(model, inputs):
            seconds = use.times * table.seconds(use.work, use.work.sizes)
            times[use.work.kind] = times.get(use.work.kind, 0.0) + seconds
            single[use.work.name] = single.get(use.work.name, 0.0) + seconds
        dearest = sorted(single, key=lambda each: -single[each])[:5]
        found[name] = times | {each: single[each] for each in dearest}
    table.save()
    return found


def study(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One network."""
    dense, x = stock.build(name)
    dense.eval()
    x = batched(x, 1)
    models, seconds, failed = {"dense": dense}, {}, {}
    made: dict[str, Callable[[], nn.Module]] = {
        arm: lambda host=host, target=target: pruned(dense, x, host, target)  # type: ignore[misc]
        for arm, (host, target) in arms(args.keep, args.batches).items()
    }
    made["tp"] = lambda: by_torch_pruning(dense, x, measure(models["macs"], x).macs)
    for arm, make in made.items():
        start = time.perf_counter()
        try:
            models[arm] = make().eval()
        except (DecayPruningError, KeyError, RuntimeError, ValueError, AttributeError) as error:
            failed[arm] = f"{type(error).__name__}: {error}"[:300]
        seconds[arm] = time.perf_counter() - start
    macs = {arm: measure(model, x).macs for arm, model in models.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for runtime in args.runtimes:
            for batch in args.batches:
                inputs = batched(x, batch)
                runs: dict[str, Callable[[], Any]] = {}
                for arm, model in models.items():
                    try:
                        runs[arm] = runner(model, runtime, inputs, Path(folder))
                    except Exception as error:  # an exporter can meet anything
                        failed[f"{arm} {runtime}"] = f"{type(error).__name__}: {error}"[:300]
                best = shortest(runs, args.rounds, torch.device("cpu"))
                up = {arm: best["dense"] / best[arm] for arm in best}
                rows.append({"runtime": runtime, "batch": batch, "seconds": best, "speed_up": up})
                said = "  ".join(f"{arm} {up[arm]:.2f}/{macs['dense'] / macs[arm]:.2f}" for arm in up)
                print(f"{name} {runtime} batch {batch} (measured/MACs): {said}", flush=True)
    kinds: dict[str, nn.Module] = {arm: m for arm, m in models.items() if arm in ("dense", "macs", "macs-8")}
    where = {str(batch): by_kind(kinds, batched(x, batch), torch.device("cpu")) for batch in args.batches}
    return {
        "network": name,
        "macs": macs,
        "made_in": seconds,
        "failed": failed,
        "rows": rows,
        "by_kind": where,
    }


def main() -> None:
    """All networks; the file is written after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("decay_pruning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found = []
    for name in args.networks:
        found.append(study(name, args))
        if args.out:
            given = {k: v for k, v in vars(args).items() if k != "out"}
            made = {"settings": given, "versions": versions() | stock.versions(), "machine": machine("cpu")}
            write(args.out, json.dumps({**made, "networks": found}, indent=1))


if __name__ == "__main__":
    main()
