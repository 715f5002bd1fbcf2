"""What the engine costs per training step, as ratios to forward + backward in the same run.

    python benchmarks/step_cost.py --out results/step-cost-cpu.json
    python benchmarks/step_cost.py --device cuda --out results/step-cost-gpu.json

Per model, with a tenth of all structures decaying:
  sp      smooth pruning: the projection after the optimizer step
  sp_sr   the same with the measurement of resistance before it (never releasing, so that it is all work)
  exchange  SR as it is by default, while it is observed (15 % of a decay)
  paper_sp, paper_sr_rate, paper_sr   the same by the paper's rule: its projection, with C_rate, and with C_len, too
  idle    a pruner whose first pick is still to come
  peer    torch-pruning's own group regulariser (`GroupNormPruner.regularize`), once per step
Each figure is the median over repeats, in turn with forward + backward.

    python benchmarks/step_cost.py --models tiny --out results/step-cost-tiny.json

`tiny` is 56 layers so narrow that arithmetic is nothing: what is left is the host's side. Beside the shortest step it
tells how many kernels one dispatches (views left out), and how many of them copy between host and device. Its arms are
SP, SR by |<g, x>| and by exchange (while it is observed, and after its verdict), and a pruner that waits.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from timing import clock, options, record
from torch import nn
from torch.profiler import ProfilerActivity, profile

from decay_pruning import Custom, Goal, Picks, Pruner, Scene, SelfRectifying, SmoothPruning, Target
from decay_pruning.lab import models

#: Operators that only look at memory in another way, or make room.
VIEWS = frozenset(
    f"aten::{name}"
    for name in ("slice", "select", "view", "unbind", "split_with_sizes", "detach", "unsqueeze", "empty", "to", "alias",
                 "resolve_conj", "resolve_neg", "lift_fresh", "as_strided", "expand", "reshape", "numpy_T")
)  # fmt: skip
#: Operators that make the host wait for the device.
READS = frozenset(("aten::item", "aten::is_nonzero", "aten::_local_scalar_dense"))
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
        own = copy.deepcopy(model)
        for mine, p in zip(own.parameters(), model.parameters(), strict=True):
            mine.grad = None if p.grad is None else p.grad.clone()
        optimizer = torch.optim.SGD(own.parameters(), lr=1e-9)
        return Pruner(own, example, optimizer, Target(structures=0.9), host=Custom(tenth), start=start,
                      smooth=smooth, rectify=rectify)  # fmt: skip

    never = SelfRectifying(t_rate=1.0, criterion="outward_and_regrowth", warmup=0.0, judge_from=0.0)
    paper = SmoothPruning.paper(10**9)
    arms_of = {
        "sp": (0, SmoothPruning(steps=10**9), None),
        "sp_sr": (0, SmoothPruning(steps=10**9), never),
        "exchange": (0, SmoothPruning(steps=10**9), SelfRectifying(warmup=0.0, judge_from=0.5)),
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


def tiny(device: torch.device, repeats: int) -> dict[str, Any]:
    """The host's side of a step."""
    torch.manual_seed(0)
    parts = [(nn.Conv2d(10, 10, 1), nn.BatchNorm2d(10), nn.ReLU()) for _ in range(56)]
    blank = nn.Sequential(*(layer for part in parts for layer in part), nn.Flatten(), nn.Linear(10, 2))
    long = SmoothPruning(steps=10**9)
    first = SelfRectifying(criterion="first_order", warmup=0.0, judge_from=0.5)
    arms: dict[str, tuple[int, SmoothPruning, SelfRectifying | None]] = {
        "sp": (0, long, None),
        "first_order": (0, long, first),
        "exchange": (0, long, SelfRectifying(warmup=0.0, judge_from=0.5)),
        "exchange_after": (0, long, SelfRectifying(warmup=0.0, judge_from=1e-9)),
        "idle": (10**9, long, SelfRectifying()),
    }
    row: dict[str, Any] = {"model": "tiny", "seconds": {}, "kernels": {}, "copies": {}}
    for arm, (start, smooth, rectify) in arms.items():
        model, x = copy.deepcopy(blank).to(device), torch.randn(8, 10, 1, 1, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        pruner = Pruner(model, x[:1], optimizer, Target(structures=0.9), host=Custom(tenth), start=start,
                        smooth=smooth, rectify=rectify)  # fmt: skip
        model(x).square().mean().backward()
        for _ in range(5):
            step(pruner)
        row["seconds"][arm] = min(clock(device, partial(step, pruner)) for _ in range(100 * repeats))
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step(pruner)
        outer = [e for e in seen.events() or () if e.name.startswith("aten::") and not _inside(e)]
        row["kernels"][arm] = sum(e.name not in VIEWS for e in outer)
        row["copies"][arm] = sum(e.name in READS or _copies(e) for e in outer)
    return row


def _inside(event: Any) -> bool:
    return event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")


def _copies(event: Any) -> bool:
    return event.name == "aten::to" and any(e.name == "aten::_to_copy" for e in event.cpu_children)


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
    args = options(__doc__, 5, [*CASES, "tiny"])
    rows = []
    for name in args.models:
        if name == "tiny":
            rows.append(tiny(torch.device(args.device), args.repeats))
            print(f"tiny: {rows[-1]}", flush=True)
            record(args, {"rows": rows})
            continue
        row = bench(name, args.batch, torch.device(args.device), args.repeats)
        rows.append(row)
        shares = "  ".join(f"{arm} {100 * share:.3f} %" for arm, share in row["ratio"].items())
        print(f"{name}: forward + backward {row['forward_backward_s']:.3f} s; {shares}", flush=True)
        record(args, {"rows": rows})


if __name__ == "__main__":
    main()
