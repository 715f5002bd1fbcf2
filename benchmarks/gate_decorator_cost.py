"""What Gate Decorator's own work costs per training step, as ratios to forward + backward and to SGD's step.

    python benchmarks/gate_decorator_cost.py --out results/gate-decorator-cost-cpu.json
    python benchmarks/gate_decorator_cost.py --device cuda --out results/gate-decorator-cost-gpu.json

Per model:
  tick    a step of a Tick: the scores of all gates, and convolutions put to rest
  tock    a step of a Tock: the gradients of λ Σ|φ|
Both are what the hooks add to a step while nothing decays. `forward_backward` is that of the gated network, and `plain`
that of the network as it was. Each figure is the median over repeats, in turn.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import clock, options, record
from torch import nn

from decay_pruning import GateDecorator, Pruner, SmoothPruning
from decay_pruning.lab import models

MODELS = ("vgg16-bn", "resnet56")
NEVER = 10**9


def bench(name: str, batch: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """All figures of one model."""
    torch.manual_seed(0)
    plain = models.build(name).to(device)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)

    def forward_backward(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad = None
        nn.functional.cross_entropy(model(x), y).backward()

    def at_work(tock: int) -> tuple[nn.Module, Callable[[], None]]:
        model = copy.deepcopy(plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        host = GateDecorator(tick=NEVER, tock=tock)
        pruner = Pruner(model, x[:1], optimizer, 0.5, host=host, smooth=SmoothPruning.one_step())
        pruner.engine.detach()

        def step() -> None:
            pruner.engine.before_step()
            pruner.engine.after_step()

        return model, step

    arms = {"tick": at_work(0), "tock": at_work(NEVER)}
    gated = arms["tick"][0]
    sgd = torch.optim.SGD(plain.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    times: dict[str, list[float]] = {key: [] for key in ("plain", "forward_backward", "sgd", *arms)}
    for repeat in range(repeats + 1):
        seconds = {"plain": clock(device, partial(forward_backward, plain))}
        seconds["forward_backward"] = clock(device, partial(forward_backward, gated))
        seconds["sgd"] = clock(device, sgd.step)
        for arm, (model, step) in arms.items():
            forward_backward(model)  # a Tick has taken the gradients of convolutions away
            kept = [p.grad for p in model.parameters()]  # to free them is `zero_grad`'s work
            seconds[arm] = clock(device, step)
            del kept
        if repeat:  # the first is a warm-up
            for key, value in seconds.items():
                times[key].append(value)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        "model": name,
        "input": list(x.shape),
        "parameters": sum(p.numel() for p in plain.parameters()),
        "seconds": medians,
        "of_forward_backward": {arm: medians[arm] / medians["forward_backward"] for arm in arms},
        "of_sgd": {arm: medians[arm] / medians["sgd"] for arm in arms},
    }


def main() -> None:
    """Run the models and write one JSON file."""
    args = options(__doc__, 15, list(MODELS))
    rows = []
    for name in args.models:
        row = bench(name, args.batch, torch.device(args.device), args.repeats)
        rows.append(row)
        print(name, "  ".join(f"{key} {1000 * s:.3f} ms" for key, s in row["seconds"].items()))
        for of in ("of_forward_backward", "of_sgd"):
            print(f"  {of}:", "  ".join(f"{arm} {100 * r:.2f} %" for arm, r in row[of].items()), flush=True)
    record(args, {"rows": rows})


if __name__ == "__main__":
    main()
