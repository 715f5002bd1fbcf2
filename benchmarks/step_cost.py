"""What the engine costs per training step, as ratios to forward + backward in the same run.

    python benchmarks/step_cost.py --out results/step-cost-cpu.json
    python benchmarks/step_cost.py --device cuda --out results/step-cost-gpu.json

Per model, with a tenth of all structures decaying:
  sp      smooth pruning: the projection after the optimizer step
  sp_sr   the same with the measurement of resistance before it (never releasing, so that it is all work)
  paper_sp, paper_sr_rate, paper_sr   the same by the paper's rule: its projection, with C_rate, and with C_len, too
  idle    a pruner whose first pick is still to come
  peer    torch-pruning's own group regulariser (`GroupNormPruner.regularize`), once per step
Each figure is the median over repeats, in turn with forward + backward.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from timing import clock, options, record
from torch import nn

from decay_pruning import Custom, Goal, Picks, Pruner, Scene, SelfRectifying, SmoothPruning, Target
from decay_pruning.lab import models

CASES: dict[str, tuple[str, int]] = {
    "resnet56": ("resnet56", 32),
    "resnet50": ("resnet50", 224),
    "vit-b": ("vit-b", 224),
}


def tenth(scene: Scene, goal: Goal) -> Picks:
    """Every tenth structure of every layer group."""
    return {name: group.ids[::10].tolist() for name, group in scene.structures.groups.items()}


def step(pruner: Pruner) -> None:
    """What the hooks do around one optimizer step."""
    pruner.engine.before_step()
    pruner.engine.after_step()


def bench(name: str, batch: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """All figures of one model."""
    architecture, size = CASES[name]
    torch.manual_seed(0)
    model = models.build(architecture, classes=10, channels=3).to(device)
    x = torch.randn(batch, 3, size, size, device=device)
    y = torch.randint(0, 10, (batch,), device=device)
    example = x[:1]

    def forward_backward() -> None:
        for p in model.parameters():
            p.grad = None
        nn.functional.cross_entropy(model(x), y).backward()

    def pruner(start: int, smooth: SmoothPruning, rectify: SelfRectifying | None) -> Pruner:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return Pruner(model, example, optimizer, Target(structures=0.9), host=Custom(tenth), start=start,
                      smooth=smooth, rectify=rectify)  # fmt: skip

    never = SelfRectifying(t_rate=1.0, criterion="outward_and_regrowth", warmup=0.0, judge_from=0.0)
    paper = SmoothPruning.paper(10**9)
    arms_of = {
        "sp": (0, SmoothPruning(steps=10**9), None),
        "sp_sr": (0, SmoothPruning(steps=10**9), never),
        "paper_sp": (0, paper, None),
        "paper_sr_rate": (0, paper, SelfRectifying(t_rate=1.0, criterion="rate", warmup=0.0, judge_from=0.0)),
        "paper_sr": (0, paper, replace(SelfRectifying.paper(t_rate=1.0), judge_from=0.0)),
        "idle": (10**9, SmoothPruning(steps=10**9), never),
    }
    forward_backward()
    arms: dict[str, Pruner] = {}
    for arm, settings in arms_of.items():
        arms[arm] = pruner(*settings)
        arms[arm].engine.before_step()
        arms[arm].engine.after_step()
    decaying = len(arms["sp_sr"].engine.decaying)

    peer = None
    if name != "vit-b" or device.type == "cpu":
        for module in model.modules():
            module.train()
        output_layer = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        peer = tp.pruner.GroupNormPruner(
            model, example, importance=tp.importance.GroupMagnitudeImportance(), ignored_layers=[output_layer]
        )
        model.train()
        peer.update_regularizer()

    times: dict[str, list[float]] = {key: [] for key in ("forward_backward", *arms, "peer")}
    forward_backward()
    for _ in range(repeats):
        times["forward_backward"].append(clock(device, forward_backward))
        for arm, p in arms.items():
            times[arm] += [clock(device, partial(step, p)) for _ in range(3)]
        if peer is not None:
            times["peer"].append(clock(device, lambda: peer.regularize(model)))
    whole = statistics.median(times["forward_backward"])
    row: dict[str, Any] = {
        "model": name,
        "input": [batch, 3, size, size],
        "parameters": sum(p.numel() for p in model.parameters()),
        "structures": len(arms["sp"].structures),
        "decaying": decaying,
        "forward_backward_s": whole,
        "ratio": {k: statistics.median(v) / whole for k, v in times.items() if v and k != "forward_backward"},
        "seconds": {k: statistics.median(v) for k, v in times.items() if v},
    }
    if device.type == "cuda":
        row["memory"] = memory(device, forward_backward, arms["sp_sr"])
    return row


def memory(device: torch.device, forward_backward: Callable[[], None], pruner: Pruner) -> dict[str, float]:
    """Peak bytes of a training step with the engine at work, and how much of it the engine adds."""
    torch.cuda.reset_peak_memory_stats(device)
    forward_backward()
    pruner.engine.before_step()
    pruner.engine.after_step()
    with_engine = torch.cuda.max_memory_allocated(device)
    before = torch.cuda.memory_allocated(device)
    pruner.engine.fade_out()
    pruner.engine.held, pruner.engine._holding = {}, None  # the index maps and figures are gone now
    freed = before - torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    forward_backward()
    return {
        "peak": with_engine,
        "index_maps": freed,
        "added": with_engine / (torch.cuda.max_memory_allocated(device)) - 1,
    }


def main() -> None:
    """Run the cases and write one JSON file, after each of them."""
    args = options(__doc__, 5, list(CASES))
    rows = []
    for name in args.models:
        row = bench(name, args.batch, torch.device(args.device), args.repeats)
        rows.append(row)
        shares = "  ".join(f"{arm} {100 * share:.3f} %" for arm, share in row["ratio"].items())
        print(f"{name}: forward + backward {row['forward_backward_s']:.3f} s; {shares}", flush=True)
        record(args, {"rows": rows})


if __name__ == "__main__":
    main()
