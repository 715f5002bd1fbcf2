"""What OTOv2's own work costs per training step of VGG16-BN, against SGD's step and against forward + backward.

    python benchmarks/otov2_cost.py --out results/otov2-cost-cpu.json
    python benchmarks/otov2_cost.py --device cuda --out results/otov2-cost-gpu.json

`host` is a step after the partition in which nothing has passed the half-space test yet, so all structures are in the
redundant set and all are measured and shrunk: the dearest that there is. `momentum` is the same under SGD with
momentum, where the host reads the direction off the momentum buffer. Figures are the median and the least over
repeats (noise of the machine only ever adds). The bound is 10 % of SGD's step + 1 % of forward + backward.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from timing import clock, options, record
from torch import nn

from decay_pruning import OTOv2, Pruner, SmoothPruning, Target
from decay_pruning.lab import models


def bench(device: torch.device, batch: int, repeats: int) -> dict[str, Any]:
    """All figures."""
    torch.manual_seed(0)
    model = models.build("vgg16-bn").to(device)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, weight_decay=5e-4)

    def forward_backward() -> None:
        for p in model.parameters():
            p.grad = None
        nn.functional.cross_entropy(model(x), y).backward()

    def host(momentum: float) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=momentum)
        settings = OTOv2(lam=1e-6, epsilon=0.0, tolerance=0.21, deadline=None)
        pruner = Pruner(
            model, x[:1], optimizer, Target(structures=0.21), host=settings, smooth=SmoothPruning(steps=1)
        )
        pruner.engine.detach()

        def step() -> None:
            pruner.engine.before_step()
            pruner.engine.after_step()

        step()  # the partition
        return step

    forward_backward()
    calls: dict[str, Callable[[], Any]] = {"sgd": sgd.step, "host": host(0.0), "momentum": host(0.9)}
    times: dict[str, list[float]] = {key: [] for key in ("forward_backward", *calls)}
    for _ in range(repeats):
        times["forward_backward"].append(clock(device, forward_backward))
        for key, call in calls.items():
            times[key] += [clock(device, call) for _ in range(3)]
    median = {key: statistics.median(values) for key, values in times.items()}
    least = {key: min(values) for key, values in times.items()}
    row: dict[str, Any] = {"model": "vgg16-bn", "batch": batch, "seconds": median, "least_seconds": least}
    for name, seconds in (("share_of_bound", median), ("least_share_of_bound", least)):
        bound = 0.1 * seconds["sgd"] + 0.01 * seconds["forward_backward"]
        row[name] = {key: seconds[key] / bound for key in ("host", "momentum")}
    return row


def main() -> None:
    """Measure, print, and write one JSON file."""
    args = options(__doc__, 5)
    row = bench(torch.device(args.device), args.batch, args.repeats)
    for key in ("seconds", "least_seconds"):
        print(key, "  ".join(f"{what} {1000 * s:.2f} ms" for what, s in row[key].items()))
    print(row["share_of_bound"], row["least_share_of_bound"])
    record(args, {"row": row})


if __name__ == "__main__":
    main()
